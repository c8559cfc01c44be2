"""Cache methods: which tokens' K and V stay."""
