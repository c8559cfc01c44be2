"""Blocks put in place of parts of a Llama-like model: what they compute, and how they are trained. No session is needed."""
