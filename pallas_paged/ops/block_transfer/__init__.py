"""Copies of blocks out of the KV cache and back (swapping)."""
