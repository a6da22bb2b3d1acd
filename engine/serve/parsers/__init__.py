"""What a chat server reads out of a model's text: reasoning, and calls of tools."""
