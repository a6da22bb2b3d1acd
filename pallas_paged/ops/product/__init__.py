"""Products of activations and weights."""
