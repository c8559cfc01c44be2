"""Models: what can be loaded, and what a model is made of."""
