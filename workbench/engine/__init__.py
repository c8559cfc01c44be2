"""The only code that changes a running model: its attention function, its cache, the session."""
