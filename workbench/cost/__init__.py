"""What follows from a trace: FLOPs, bytes and metrics. Pure functions."""
