"""The server: OpenAI's HTTP interface on top of the engine."""
