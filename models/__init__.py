"""Flax NNX models, and the loading of Hugging Face checkpoints into them."""
