"""Write of new keys and values into the KV cache."""
