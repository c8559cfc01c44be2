"""The only code that observes a running model. It changes nothing and leaves nothing behind."""
