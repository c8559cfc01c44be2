"""Decoding methods, one a file."""
