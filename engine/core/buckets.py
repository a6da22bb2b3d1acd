"""The few step shapes an engine compiles, and which of them holds a given step."""

import bisect
import dataclasses
from collections.abc import Sequence

_LEAST_SHARE = 8
"""A step is large enough when so many times what it costs by itself is spent on its tokens."""
MIN_SHARING = 8
"""The fewest sequences for which a prefix is read for several of them at a time."""
MIN_TABLE_WIDTH = 128
"""Blocks of the narrowest table, if any sequence may have more than twice as many."""


@dataclasses.dataclass(frozen=True, order=True)
class Bucket:
    """The shape of one compiled step: T tokens of B sequences with up to M blocks each.

    A decode bucket has one token per sequence; `num_tokens == num_seqs` alone does not say so.
    A full one also does what few requests ask for, see `pallas_paged.engine.device.step`. One with
    `num_steps` K > 1, a plain decode bucket, makes up to K decode steps one after the other. One
    with `num_drafts` D > 0, a mixed bucket, samples behind up to D + 1 tokens of a sequence; if it
    `proposes`, a small model also guesses D tokens behind the last one. One without `filters` has
    no sequence with a top-k or a top-p, and one without `has_decodes`, a mixed bucket, no sequence
    with one token. One that `shares_prefix`, a plain decode bucket, is told of blocks that several
    sequences begin with, and reads them for several at a time. A plain one that `has_logprobs` also
    gives the log-probability of each token that it samples; a full one always can.
    """

    num_tokens: int
    num_seqs: int
    table_width: int
    is_decode: bool
    is_full: bool = False
    num_steps: int = 1
    num_drafts: int = 0
    proposes: bool = False
    filters: bool = True
    has_decodes: bool = True
    shares_prefix: bool = False
    has_logprobs: bool = False

    @property
    def is_common(self) -> bool:
        """Whether it is for steps in which nobody asks for anything but tokens."""
        return not self.is_full and not self.has_logprobs

    @property
    def num_logits(self) -> int:
        """Tokens of a step behind which can be sampled, those of all sequences together."""
        return min(self.num_tokens, self.num_seqs * (1 + self.num_drafts))

    def __str__(self) -> str:
        kind = "decode" if self.is_decode else "mixed"
        full = " full" if self.is_full else ""
        shape = f"{self.num_tokens}x{self.num_seqs}, {self.table_width} blocks each"
        steps = f", up to {self.num_steps} steps" if self.num_steps > 1 else ""
        drafts = f", up to {self.num_drafts} drafts each" if self.num_drafts else ""
        drafts += ", proposing as many" if self.proposes else ""
        without = "" if self.filters else ", without top-k and top-p"
        without += "" if self.has_decodes else ", prompts only"
        without += ", sharing a prefix" if self.shares_prefix else ""
        without += ", with log-probabilities" if self.has_logprobs else ""
        return f"{kind} {shape}{full}{steps}{drafts}{without}"


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The step shapes of an engine, smallest first.

    Attributes:
      decode_seqs: numbers of sequences of steps with one token each; none if decode steps run in
        the buckets of mixed ones.
      mixed_tokens: numbers of tokens of steps that hold prompt chunks.
      mixed_seqs: numbers of sequences of those.
      table_widths: numbers of blocks of the longest sequence of a step.
      num_steps: the most decode steps that one program makes one after the other.
      num_drafts: the most drafts of a sequence in a step.
      draft_tokens: numbers of tokens of steps with drafts.
      proposes: whether steps with drafts guess the next ones, see `Bucket`.
      step_cost: tokens that take as long to compute as a step does whatever its size.
      specialised: whether plain steps that do not need all of it have programs of their own: decode
        steps without `Bucket.filters`, and steps of a few prompts without `Bucket.has_decodes`. A
        device that can look at what a step needs, and skip the rest, has no use for them.
      shares_prefix: whether plain decode steps of `sharing_seqs` have programs with
        `Bucket.shares_prefix`.
      has_logprobs: whether each plain step also has a program with `Bucket.has_logprobs`; else
        steps are full in which somebody asks for the log-probability of a sampled token.
    """

    decode_seqs: tuple[int, ...]
    mixed_tokens: tuple[int, ...]
    mixed_seqs: tuple[int, ...]
    table_widths: tuple[int, ...]
    num_steps: int = 1
    num_drafts: int = 0
    draft_tokens: tuple[int, ...] = ()
    proposes: bool = False
    step_cost: int = 0
    specialised: bool = False
    shares_prefix: bool = False
    has_logprobs: bool = False

    @classmethod
    def for_limits(
        cls,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_blocks_per_seq: int,
        *,
        deterministic: bool = False,
        num_steps: int = 1,
        num_drafts: int = 0,
        proposes: bool = False,
        step_cost: int = 0,
        specialised: bool = False,
        shares_prefix: bool = False,
        has_logprobs: bool = False,
    ) -> "Buckets":
        """Returns few sizes up to the maxima; one of each kind for a deterministic engine.

        Sequences of decode steps grow twofold up to 8 and by halves of that from there on, tokens
        of mixed steps twofold up to 512 and fourfold from there on, tables eightfold. What a step
        is padded with costs as much as what it computes. Where steps are `specialised` there are
        two programs for each, and on a GPU few sequences cost no less than 64: they grow twofold up
        to there.
        """
        if deterministic:
            sizes = (), (max_num_batched_tokens,), (max_num_seqs,), (max_blocks_per_seq,)
            return cls(*sizes, has_logprobs=has_logprobs)
        return cls(
            _decode_sizes(max_num_seqs, 64 if specialised else 8),
            _mixed_sizes(max_num_batched_tokens),
            _geometric(8, max_num_seqs, 8),
            _table_widths(max_blocks_per_seq),
            num_steps,
            num_drafts,
            _geometric(8, max_num_batched_tokens, 2) if num_drafts else (),
            proposes,
            step_cost,
            specialised,
            shares_prefix,
            has_logprobs,
        )

    @property
    def sharing_seqs(self) -> tuple[int, ...]:
        """Numbers of sequences of decode steps that share a prefix: few of all, fourfold.

        They are for GPUs, where products of few rows cost what reading the weights does.
        """
        sizes: list[int] = []
        for size in reversed(self.decode_seqs if self.shares_prefix else ()):
            if size >= MIN_SHARING and (not sizes or 4 * size <= sizes[-1]):
                sizes.append(size)
        return tuple(reversed(sizes))

    def worth_while(self, num_tokens: int, num_fixed: int) -> int:
        """Returns how many of `num_tokens` a step with prompts should compute.

        No more than fill the smallest bucket in which little goes to the step itself, and to
        `num_fixed` tokens of sequences that decode: prompts are done one after the other then, each
        earlier than all at once would be, and nobody waits long for a token. And fewer than all
        where the padding of the next larger bucket would cost more than a step for those that are
        left; the sequences that decode have another token in that.
        """
        full = [size for size in self.mixed_tokens if num_fixed < size < num_tokens]
        enough = max(_LEAST_SHARE * self.step_cost, _LEAST_SHARE // 2 * num_fixed)
        if full and full[-1] >= enough:
            return next(size for size in full if size >= enough)
        if not full:
            return num_tokens
        later = self.step_cost + _at_least(self.mixed_tokens, num_tokens - full[-1] + num_fixed)
        padded = _at_least(self.mixed_tokens, num_tokens)
        return full[-1] if full[-1] + later < padded else num_tokens

    def pick(
        self,
        num_tokens: int,
        num_seqs: int,
        table_width: int,
        *,
        is_decode: bool,
        is_full: bool = False,
        has_drafts: bool = False,
        filters: bool = True,
        has_decodes: bool = True,
        shares_prefix: bool = False,
        has_logprobs: bool = False,
    ) -> Bucket:
        """Returns the smallest bucket that holds a step of `num_tokens` of `num_seqs` sequences.

        `table_width` is the number of blocks of the longest of them. `is_decode` tells that each
        sequence has one token; equal numbers alone do not say so. `filters`, `has_decodes`,
        `shares_prefix` and, where the engine has such buckets, `has_logprobs` as in `Bucket`.
        """
        width = _at_least(self.table_widths, table_width)
        assert self.has_logprobs or is_full or not has_logprobs, "there is no such plain bucket"
        has_logprobs &= not is_full
        if has_drafts:
            size = _at_least(self.draft_tokens, num_tokens)
            seqs = _at_least(self.mixed_seqs, num_seqs)
            drafts = self.num_drafts, self.proposes
            return Bucket(size, seqs, width, False, is_full, 1, *drafts, has_logprobs=has_logprobs)
        if is_decode and self.decode_seqs:
            shares_prefix &= bool(self.sharing_seqs) and not is_full
            sizes = self.sharing_seqs if shares_prefix else self.decode_seqs
            size = _at_least(sizes, num_seqs)
            num_steps = 1 if is_full else self.num_steps
            filters |= is_full or shares_prefix or not self.specialised
            return Bucket(
                *(size, size, width, True, is_full, num_steps),
                filters=filters,
                shares_prefix=shares_prefix,
                has_logprobs=has_logprobs,
            )
        size = _at_least(self.mixed_tokens, num_tokens)
        seqs = _at_least(self.mixed_seqs, num_seqs)
        has_decodes |= is_full or not self.specialised or seqs > self.mixed_seqs[0]
        return Bucket(
            *(size, seqs, width, False, is_full),
            has_decodes=has_decodes,
            has_logprobs=has_logprobs,
        )

    def holding(
        self,
        num_tokens: int,
        num_seqs: int,
        table_width: int,
        *,
        is_decode: bool,
        is_full: bool = False,
        has_drafts: bool = False,
        filters: bool = True,
        has_decodes: bool = True,
        shares_prefix: bool = False,
        has_logprobs: bool = False,
    ) -> list[Bucket]:
        """Returns all buckets that hold such a step, see `pick`, smallest first.

        A decode step fits into those of steps with prompts, too; these come last.
        """
        fits = [
            bucket
            for bucket in self.all()
            if bucket.num_tokens >= num_tokens
            and bucket.num_seqs >= num_seqs
            and bucket.table_width >= table_width
            and bucket.is_full == is_full
            and (bucket.num_drafts > 0) == has_drafts
            and (is_decode or not bucket.is_decode)
            and bucket.filters >= filters
            and bucket.has_decodes >= has_decodes
            and bucket.shares_prefix <= shares_prefix
            and (bucket.has_logprobs >= has_logprobs or is_full)
        ]
        return sorted(fits, key=lambda bucket: (not bucket.is_decode, bucket))

    def largest(self) -> list[Bucket]:
        """Returns the largest bucket of each kind, the full ones, whose temporaries are larger."""
        every = self.all()
        kinds = [[b for b in every if b.is_decode == is_decode] for is_decode in (True, False)]
        return [max(kind) for kind in kinds if kind]

    def all(self) -> list[Bucket]:
        """Returns every bucket that `pick` can return."""
        shapes = [(size, size, True) for size in self.decode_seqs]
        shapes += [
            (tokens, seqs, False) for tokens in self.mixed_tokens for seqs in self.mixed_seqs
        ]
        plain = [
            Bucket(tokens, seqs, width, is_decode, False, self.num_steps if is_decode else 1)
            for tokens, seqs, is_decode in shapes
            for width in self.table_widths
        ]
        drafts = [
            Bucket(tokens, seqs, width, False, False, 1, self.num_drafts, self.proposes)
            for tokens in self.draft_tokens
            for seqs in self.mixed_seqs
            for width in self.table_widths
        ]
        plain += drafts
        full = [dataclasses.replace(bucket, is_full=True, num_steps=1) for bucket in plain]
        plain += self._special(plain)
        with_logprobs = [dataclasses.replace(bucket, has_logprobs=True) for bucket in plain]
        return plain + (with_logprobs if self.has_logprobs else []) + full

    def _special(self, plain: Sequence[Bucket]) -> list[Bucket]:
        """Returns the plain buckets that leave something out, or are told of a shared prefix."""
        decode = [bucket for bucket in plain if bucket.is_decode]
        sharing = [
            dataclasses.replace(bucket, shares_prefix=True)
            for bucket in decode
            if bucket.num_seqs in self.sharing_seqs
        ]
        if not self.specialised:
            return sharing
        few = self.mixed_seqs[0]
        mixed = [b for b in plain if not (b.is_decode or b.num_drafts) and b.num_seqs == few]
        return [
            *sharing,
            *(dataclasses.replace(bucket, filters=False) for bucket in decode),
            *(dataclasses.replace(bucket, has_decodes=False) for bucket in mixed),
        ]


def _geometric(first: int, last: int, ratio: int) -> tuple[int, ...]:
    sizes = []
    while first < last:
        sizes.append(first)
        first *= ratio
    return (*sizes, last)


def _decode_sizes(last: int, twofold_to: int) -> tuple[int, ...]:
    sizes = {*_geometric(1, last, 2), *_geometric(twofold_to * 3 // 2, last, 2)}
    return tuple(sorted(size for size in sizes if size <= last))


def _mixed_sizes(last: int) -> tuple[int, ...]:
    return (*_geometric(32, min(last, 512), 2)[:-1], *_geometric(min(last, 512), last, 4))


def _table_widths(last: int) -> tuple[int, ...]:
    """Returns powers of eight from the narrowest table on, none of them near the widest."""
    sizes = _geometric(MIN_TABLE_WIDTH, last, 8)
    return tuple(size for size in sizes if 2 * size < last or size == last)


def _at_least(sizes: Sequence[int], size: int) -> int:
    assert size <= sizes[-1], f"a step of {size} does not fit the largest bucket {sizes[-1]}"
    return sizes[bisect.bisect_left(sizes, size)]
