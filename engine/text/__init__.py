"""Text to tokens and tokens to text: prompts, tokenizers, stop strings, what requests give back."""
