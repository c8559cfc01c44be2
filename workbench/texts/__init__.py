"""Texts every installation has: standard-library prose and recall documents. Plain strings, no torch."""
