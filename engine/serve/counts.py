"""How many tokens a request had, for its usage and its line in the log."""

from collections.abc import Sequence
from typing import Any

from pallas_paged.engine.outputs import RequestOutput
from pallas_paged.engine.serve.responses import Usage, usage_of


class Counts:
    """Tokens of a request's prompts and of what they gave.

    Args:
      num_prompts: how many prompts it has.
    """

    def __init__(self, num_prompts: int):
        """Counts from nothing."""
        self._prompts = [0] * num_prompts
        self._cached = [0] * num_prompts
        self._num_completion = 0

    def note(self, place: int, output: RequestOutput) -> None:
        """Adds what an output of the prompt at a place holds, all of which is new."""
        self._prompts[place] = len(output.prompt_token_ids)
        self._cached[place] = output.num_cached_tokens
        self._num_completion += sum([len(one.token_ids) for one in output.outputs])

    def usage(self) -> Usage:
        """Returns what has been noted."""
        return usage_of(sum(self._prompts), self._num_completion, sum(self._cached))

    def fields(self, finish_reasons: Sequence[str | None]) -> dict[str, Any]:
        """Returns what the log says of it."""
        return {
            "prompt_tokens": sum(self._prompts),
            "completion_tokens": self._num_completion,
            "cached_tokens": sum(self._cached),
            "finish_reasons": list(finish_reasons),
        }
