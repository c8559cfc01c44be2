"""Experiments: setups run on workloads, and what is measured of them."""
