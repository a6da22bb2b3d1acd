"""The few step shapes an engine compiles, and which of them holds a given step."""

import bisect
import dataclasses
from collections.abc import Sequence

from pallas_paged.engine.config import EngineConfig


@dataclasses.dataclass(frozen=True, order=True)
class Bucket:
    """The shape of one compiled step: T tokens of B sequences.

    A decode bucket has one token per sequence; `num_tokens == num_seqs` alone does not say so.
    A full one also does what few requests ask for, see `pallas_paged.engine.step`.
    """

    num_tokens: int
    num_seqs: int
    is_decode: bool
    is_full: bool = False

    def __str__(self) -> str:
        kind = "decode" if self.is_decode else "mixed"
        return f"{kind} {self.num_tokens}x{self.num_seqs}{' full' if self.is_full else ''}"


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The step shapes of an engine, smallest first.

    Attributes:
      decode_seqs: numbers of sequences of decode steps.
      mixed_tokens: numbers of tokens of steps that hold prompt chunks.
      mixed_seqs: numbers of sequences of those.
    """

    decode_seqs: tuple[int, ...]
    mixed_tokens: tuple[int, ...]
    mixed_seqs: tuple[int, ...]

    @classmethod
    def for_config(cls, config: EngineConfig) -> "Buckets":
        """Returns powers of two (decode) and of four (mixed) up to the configured maxima."""
        if config.deterministic:
            return cls((), (config.max_num_batched_tokens,), (config.max_num_seqs,))
        return cls(
            _geometric(1, config.max_num_seqs, 2),
            _geometric(32, config.max_num_batched_tokens, 4),
            _geometric(8, config.max_num_seqs, 8),
        )

    def pick(
        self, num_tokens: int, num_seqs: int, *, is_decode: bool, is_full: bool = False
    ) -> Bucket:
        """Returns the smallest bucket that holds a step of `num_tokens` of `num_seqs` sequences.

        `is_decode` tells that each sequence has one token; equal numbers alone do not say so.
        """
        if is_decode and self.decode_seqs:
            size = _at_least(self.decode_seqs, num_seqs)
            return Bucket(size, size, is_decode=True, is_full=is_full)
        return Bucket(
            _at_least(self.mixed_tokens, num_tokens),
            _at_least(self.mixed_seqs, num_seqs),
            is_decode=False,
            is_full=is_full,
        )

    def largest(self) -> list[Bucket]:
        """Returns the largest bucket of each kind, the full ones, whose temporaries are larger."""
        every = self.all()
        kinds = [[b for b in every if b.is_decode == is_decode] for is_decode in (True, False)]
        return [max(kind) for kind in kinds if kind]

    def all(self) -> list[Bucket]:
        """Returns every bucket that `pick` can return."""
        decode = [Bucket(size, size, is_decode=True) for size in self.decode_seqs]
        mixed = [
            Bucket(tokens, seqs, is_decode=False)
            for tokens in self.mixed_tokens
            for seqs in self.mixed_seqs
        ]
        plain = decode + mixed
        return plain + [dataclasses.replace(bucket, is_full=True) for bucket in plain]


def _geometric(first: int, last: int, ratio: int) -> tuple[int, ...]:
    sizes = []
    while first < last:
        sizes.append(first)
        first *= ratio
    return (*sizes, last)


def _at_least(sizes: Sequence[int], size: int) -> int:
    assert size <= sizes[-1], f"a step of {size} does not fit the largest bucket {sizes[-1]}"
    return sizes[bisect.bisect_left(sizes, size)]
