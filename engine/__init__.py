"""The serving engine: scheduler, runner, sampling and the LLM API."""
