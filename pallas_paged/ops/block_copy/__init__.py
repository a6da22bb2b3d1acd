"""Copy of blocks inside the KV cache."""
