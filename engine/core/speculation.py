"""Guesses a sequence's next tokens from its own: what followed the last time (prompt look-up).

The guesses, drafts, are computed together with the sequence's last token in one step, which samples
behind each of them as if the others were right. So many of the samples count as the drafts agree
with, and the one behind; they are those that would have been drawn one by one, for a sample's key
depends on the request's seed and the position alone. Saxena, "Prompt Lookup Decoding", 2023;
Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", 2023.
"""

import dataclasses
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from pallas_paged.engine.core.request import TokenSequence
from pallas_paged.engine.core.row_columns import RowColumns

_PATIENCE = 24
"""Steps of a sequence, with or without drafts, before it may be given up."""


@dataclasses.dataclass(frozen=True)
class NgramSettings:
    """How tokens are guessed. The names are those of vLLM's `speculative_config`.

    Attributes:
      num_speculative_tokens: the most drafts of a step.
      prompt_lookup_max: the most last tokens that are looked for.
      prompt_lookup_min: the fewest.
      min_gain: tokens that a step has to gain, on average, for a request to go on with drafts.
    """

    num_speculative_tokens: int
    prompt_lookup_max: int = 4
    prompt_lookup_min: int = 2
    min_gain: float = 0.25


def ngram_settings(config: Any) -> NgramSettings | None:
    """Returns the settings in an engine's `speculative_config`; None for None.

    Raises:
      ValueError: a key or a value is not usable.
    """
    if config is None:
        return None
    fields = config if isinstance(config, dict) else {}
    values: dict[str, Any] = {
        "prompt_lookup_max": 4,
        "prompt_lookup_min": 2,
        "min_gain": 0.25,
    } | fields
    method, names = values.pop("method", None), {f.name for f in dataclasses.fields(NgramSettings)}
    numbers = [values.get(name) for name in sorted(names - {"min_gain"})]
    gain = values["min_gain"]
    for is_right, rule in (
        (isinstance(config, dict), "must be a dictionary or None"),
        (method == "ngram", "must have the method 'ngram'"),
        (
            set(values) == names,
            f"must have num_speculative_tokens, and may have {', '.join(sorted(names))}",
        ),
        (
            all(type(number) is int and 1 <= number <= 64 for number in numbers),
            "must have integers from 1 to 64",
        ),
        (isinstance(gain, int | float) and gain >= 0, "must have a min_gain >= 0"),
    ):
        if not is_right:
            raise ValueError(f"speculative_config={config!r} {rule}")
    settings = NgramSettings(**values)
    if settings.prompt_lookup_min > settings.prompt_lookup_max:
        raise ValueError(f"speculative_config={config!r} must not have a minimum above the maximum")
    return settings


def num_right(drafts: Sequence[int], samples: Sequence[int]) -> int:
    """Returns how many of the drafts are what was sampled in their places."""
    for place, (draft, sample) in enumerate(zip(drafts, samples, strict=False)):
        if draft != sample:
            return place
    return len(drafts)


class _Known:
    """What is known of a sequence: where its last occurrence of each n-gram ends, and its luck."""

    def __init__(self) -> None:
        self.ends: dict[tuple[int, ...], int] = {}
        self.num_read = 0
        self.num_steps = 0
        self.gain = 0.0


class NgramProposer:
    """Proposes drafts, and tells which sequences are better off without.

    Attributes:
      settings: as given.
      num_drafts: tokens that were proposed.
      num_accepted: of them, those that were right.
    """

    def __init__(self, settings: NgramSettings) -> None:
        """Knows nothing yet; forgets a sequence with the sequence."""
        self.settings = settings
        self.num_drafts = self.num_accepted = 0
        self._known: weakref.WeakKeyDictionary[TokenSequence, _Known]
        self._known = weakref.WeakKeyDictionary()

    def propose(self, sequence: TokenSequence, most: int) -> list[int]:
        """Returns at most `most` tokens that may follow those of a sequence."""
        tokens, settings = sequence.token_ids, self.settings
        known = self._known.setdefault(sequence, _Known())
        lengths = range(settings.prompt_lookup_min, settings.prompt_lookup_max + 1)
        # What ends with the last token is looked for, and what follows it is not known.
        for end in range(known.num_read + 1, len(tokens)):
            for length in lengths:
                if length <= end:
                    known.ends[tuple(tokens[end - length : end])] = end
        known.num_read = len(tokens) - 1
        for length in reversed(lengths):
            found = known.ends.get(tuple(tokens[-length:])) if length < len(tokens) else None
            if found is not None:
                return tokens[found : found + min(most, settings.num_speculative_tokens)]
        return []

    def is_worth_it(self, sequence: TokenSequence, num_drafts: int, num_accepted: int) -> bool:
        """Takes in how a step went, and returns whether the sequence shall go on with drafts."""
        self.num_drafts += num_drafts
        self.num_accepted += num_accepted
        known = self._known.setdefault(sequence, _Known())
        known.num_steps += 1
        known.gain += (num_accepted - known.gain) / min(known.num_steps, _PATIENCE)
        return known.num_steps < _PATIENCE or known.gain >= self.settings.min_gain


def propose(
    proposer: NgramProposer,
    columns: RowColumns,
    sequences: Sequence[TokenSequence],
    rows: np.ndarray,
) -> None:
    """Gives drafts to the sequences in these rows that wait for nothing but their next token."""
    waits, num_known = columns.waits_for_host[rows], columns.num_known[rows]
    is_next = waits & (num_known - columns.num_dispatched[rows] == 1)
    num_left = columns.max_length[rows] - num_known - 1
    for b in np.flatnonzero(is_next & (num_left > 0)).tolist():
        sequence = sequences[b]
        if sequence.group.beams is None and sequence.group.is_forked:
            sequence.drafts = proposer.propose(sequence, int(num_left[b]))
            columns.num_drafts[rows[b]] = len(sequence.drafts)
