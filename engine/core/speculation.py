"""Guesses a sequence's next tokens: from its own (prompt look-up), or as a small model has it.

The guesses, drafts, are computed together with the sequence's last token in one step, which samples
behind each of them as if the others were right. So many of the samples count as the drafts agree
with, and the one behind; they are those that would have been drawn one by one, for a sample's key
depends on the request's seed and the position alone. A small model draws its guesses with the same
keys, on the device, see `pallas_paged.engine.device.drafted`. Saxena, "Prompt Lookup Decoding",
2023; Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", 2023.
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

    def __post_init__(self) -> None:
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ValueError("must not have a minimum above the maximum")


@dataclasses.dataclass(frozen=True)
class DraftModelSettings:
    """How a small model guesses tokens; likewise.

    Attributes:
      num_speculative_tokens: the drafts of a step.
      model: folder with the small model, in Hugging Face format.
      min_gain: see `NgramSettings`.
    """

    num_speculative_tokens: int
    model: str
    min_gain: float = 0.25


Settings = NgramSettings | DraftModelSettings
_METHODS: dict[str, type[Settings]] = {"ngram": NgramSettings, "draft_model": DraftModelSettings}


def speculation_settings(config: Any) -> Settings | None:
    """Returns the settings in an engine's `speculative_config`; None for None.

    Raises:
      ValueError: a key or a value is not usable.
    """
    if config is None:
        return None
    try:
        return _settings(config)
    except ValueError as error:
        raise ValueError(f"speculative_config={config!r} {error}") from None


def _settings(config: Any) -> Settings:
    if not isinstance(config, dict):
        raise ValueError("must be a dictionary or None")
    values = dict(config)
    method = values.pop("method", None)
    if method not in _METHODS:
        raise ValueError(f"must have a method, one of {', '.join(map(repr, _METHODS))}")
    kind = _METHODS[method]
    fields = {field.name: field for field in dataclasses.fields(kind)}
    needed = [n for n, field in fields.items() if field.default is dataclasses.MISSING]
    if not set(needed) <= set(values) <= set(fields):
        others = ", ".join(name for name in fields if name not in needed)
        raise ValueError(
            f"must have {' and '.join(needed)} with the method {method!r}, and may have {others}"
        )
    for name, value in values.items():
        if name == "min_gain":
            if not isinstance(value, int | float) or isinstance(value, bool) or not value >= 0:
                raise ValueError("must have a min_gain >= 0")
        elif name == "model":
            if not isinstance(value, str):
                raise ValueError("must have a folder as model")
        elif type(value) is not int or not 1 <= value <= 64:
            raise ValueError(f"must have an integer from 1 to 64 as {name}")
    return kind(**values)


def num_right(drafts: Sequence[int], samples: Sequence[int]) -> int:
    """Returns how many of the drafts are what was sampled in their places."""
    for place, (draft, sample) in enumerate(zip(drafts, samples, strict=False)):
        if draft != sample:
            return place
    return len(drafts)


class Proposer:
    """Proposes drafts, and tells which sequences are better off without.

    Attributes:
      num_speculative_tokens: the most drafts of a step.
      num_ahead: for how many tokens behind a step's own there shall be room, where the device
        guesses.
      num_drafts: tokens that were proposed.
      num_accepted: of them, those that were right.
    """

    num_ahead = 0

    def __init__(self, num_speculative_tokens: int, min_gain: float) -> None:
        """Knows nothing yet; forgets a sequence with the sequence.

        Args:
          num_speculative_tokens: see above.
          min_gain: see `NgramSettings`.
        """
        self.num_speculative_tokens = num_speculative_tokens
        self.num_drafts = self.num_accepted = 0
        self._min_gain = min_gain
        self._luck: weakref.WeakKeyDictionary[TokenSequence, _Luck] = weakref.WeakKeyDictionary()

    def propose(self, sequence: TokenSequence, most: int) -> list[int]:
        """Returns at most `most` tokens that may follow those of a sequence."""
        raise NotImplementedError

    def is_worth_it(self, sequence: TokenSequence, num_drafts: int, num_accepted: int) -> bool:
        """Takes in how a step went, and returns whether the sequence shall go on with drafts."""
        self.num_drafts += num_drafts
        self.num_accepted += num_accepted
        luck = self._luck.setdefault(sequence, _Luck())
        luck.num_steps += 1
        luck.gain += (num_accepted - luck.gain) / min(luck.num_steps, _PATIENCE)
        return luck.num_steps < _PATIENCE or luck.gain >= self._min_gain


class _Luck:
    """How a sequence's steps went."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.gain = 0.0


class NgramProposer(Proposer):
    """Takes what followed the last time."""

    def __init__(self, settings: NgramSettings) -> None:
        """Guesses by these settings."""
        super().__init__(settings.num_speculative_tokens, settings.min_gain)
        self.settings = settings
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


class _Known:
    """What is known of a sequence: where its last occurrence of each n-gram ends."""

    def __init__(self) -> None:
        self.ends: dict[tuple[int, ...], int] = {}
        self.num_read = 0


class ModelProposer(Proposer):
    """Takes what a model guessed on the device, behind a sequence's last step."""

    def __init__(self, settings: DraftModelSettings) -> None:
        """Guesses by these settings."""
        super().__init__(settings.num_speculative_tokens, settings.min_gain)
        self.num_ahead = settings.num_speculative_tokens

    def propose(self, sequence: TokenSequence, most: int) -> list[int]:
        """See `Proposer`."""
        return sequence.proposals[:most]


def make_proposer(settings: Settings | None) -> Proposer | None:
    """Returns what guesses by these settings; None for None."""
    if settings is None:
        return None
    if isinstance(settings, NgramSettings):
        return NgramProposer(settings)
    return ModelProposer(settings)


def propose(
    proposer: Proposer,
    columns: RowColumns,
    sequences: Sequence[TokenSequence],
    rows: np.ndarray,
) -> None:
    """Gives drafts to the sequences in these rows that wait for nothing but their next token."""
    speculates, num_known = columns.speculates[rows], columns.num_known[rows]
    is_next = speculates & (num_known - columns.num_dispatched[rows] == 1)
    num_left = columns.max_length[rows] - num_known - 1
    for b in np.flatnonzero(is_next & (num_left > 0)).tolist():
        sequence = sequences[b]
        if sequence.group.is_forked:
            sequence.drafts = proposer.propose(sequence, int(num_left[b]))
            columns.num_drafts[rows[b]] = len(sequence.drafts)
