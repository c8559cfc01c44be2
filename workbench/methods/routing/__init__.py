"""Routing methods: what each token is computed by."""
