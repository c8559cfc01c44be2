"""Traces and results: values that are saved, reopened and drawn. No model, no GPU, no transformers."""
