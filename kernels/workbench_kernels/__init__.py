"""Attention kernels. Each file holds the formula, its torch reference (the specification) and how it is launched."""
