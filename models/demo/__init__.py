"""A small Llama that ships with the package; `benchmarks/train_demo_model.py` trains it."""

from pathlib import Path

DEMO_MODEL = Path(__file__).parent
"""The folder of the checkpoint, in Hugging Face format."""
