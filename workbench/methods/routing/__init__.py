"""Routing methods: which experts a token is given, or what is computed in their place or in the place of an FFN."""
