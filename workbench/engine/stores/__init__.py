"""How one layer's K and V lie in memory."""
