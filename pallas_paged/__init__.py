"""Paged attention for JAX: kernels, KV cache and block tables."""
