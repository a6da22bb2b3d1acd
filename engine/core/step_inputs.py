"""How a step's inputs are packed into one vector, and what its fields are called.

A host-to-device copy costs about the same for 4 bytes and for 100 KB, so a step's inputs travel
as a single int32 vector; floats and unsigned integers keep their bits.
"""

import functools
import math
from typing import Any, NamedTuple

import numpy as np

from pallas_paged.engine.core.buckets import Bucket
from pallas_paged.engine.core.request import MAX_ENDING_IDS

Shape = tuple[int, ...]


class FullInputs[A](NamedTuple):
    """What only full steps need.

    Attributes:
      wants_logprobs: i32[B], 1 where the sampled token's log-probabilities are asked for.
      uses_bias: i32[B], see `LogitInputs`, as are the next five.
      uses_penalties: i32[B].
      uses_mask: i32[B].
      repetition_penalty: f32[B].
      presence_penalty: f32[B].
      frequency_penalty: f32[B].
      counted_rows: i32[B], `rows` where the sequence's last input token is one of its output and
        has to be counted for the penalties, R elsewhere.
    """

    wants_logprobs: A
    uses_bias: A
    uses_penalties: A
    uses_mask: A
    repetition_penalty: A
    presence_penalty: A
    frequency_penalty: A
    counted_rows: A


class ManyInputs[A](NamedTuple):
    """What only buckets with several steps need.

    Attributes:
      num_steps: i32[B], how many tokens each sequence computes one after the other; 0 for padding.
      ending_ids: i32[B, `MAX_ENDING_IDS`], the tokens that end it; -1 for padding.
    """

    num_steps: A
    ending_ids: A


class DraftInputs[A](NamedTuple):
    """What only buckets with drafts need; L is the bucket's `num_logits`.

    Attributes:
      num_drafts: i32[B], of each sequence.
      places: i32[L], the tokens that are sampled behind, those of a sequence together.
      owners: i32[L], the sequence of each of them.
      firsts: i32[B], where a sequence's begin in the L.
    """

    num_drafts: A
    places: A
    owners: A
    firsts: A


class PrefixInputs[A](NamedTuple):
    """What only buckets that share a prefix need.

    Attributes:
      shares_prefix: i32[B], 1 where the sequence begins with the prefix.
      prefix_row: i32[1], an allocator row whose table begins with its blocks.
      prefix_blocks: i32[1], how many there are; 0 if there is none.
    """

    shares_prefix: A
    prefix_row: A
    prefix_blocks: A


class StepInputs[A](NamedTuple):
    """What one step needs from the host; T tokens, B sequences, R allocator rows.

    Attributes:
      input_ids: i32[T]; where `input_on_device`, replaced by the row's last sampled token.
      positions: i32[T], see `AttentionMetadata`, as are the next three.
      slot_mapping: i32[T].
      seq_lens: i32[B].
      query_start_loc: i32[B + 1].
      rows: i32[B], the allocator's row of each sequence; R for padding.
      table_places: i32[B], what to write into the device's block tables before anything else: row *
        M + column, with the tables' width M; row R, column 0 for padding.
      table_blocks: i32[B], the blocks to write there; the null block for padding.
      input_on_device: i32[B], 1 where the sequence's single input token is the last one sampled.
      sample_rows: i32[B], `rows` where a token is sampled, R elsewhere.
      logits_indices: i32[B], the token whose hidden state gives the sequence's logits.
      temperature: f32[B], see `SamplingInputs`, as is everything below.
      top_k: i32[B].
      top_p: f32[B].
      min_p: f32[B].
      seeds: u32[B, 2].
      sample_index: i32[B].
      sample_positions: i32[B].
      full: in full steps only, else None.
      many: in buckets with several steps only, else None. Everything above is of the first one.
      drafts: in buckets with drafts only, else None. `logits_indices` are not used then, and
        `sample_positions` are those behind each sequence's last known token.
      prefix: in buckets that share a prefix only, else None.
    """

    input_ids: A
    positions: A
    slot_mapping: A
    seq_lens: A
    query_start_loc: A
    rows: A
    table_places: A
    table_blocks: A
    input_on_device: A
    sample_rows: A
    logits_indices: A
    temperature: A
    top_k: A
    top_p: A
    min_p: A
    seeds: A
    sample_index: A
    sample_positions: A
    full: FullInputs[A] | None = None
    many: ManyInputs[A] | None = None
    drafts: DraftInputs[A] | None = None
    prefix: PrefixInputs[A] | None = None


@functools.cache
def layout(bucket: Bucket) -> dict[str, tuple[Shape, np.dtype]]:
    """Returns shape and dtype of each field of `StepInputs`, in the order they are packed.

    Those of `prefix`, `full`, `many` or `drafts` follow, where the bucket has them.
    """
    T, B = bucket.num_tokens, bucket.num_seqs
    i32, f32, u32 = np.dtype(np.int32), np.dtype(np.float32), np.dtype(np.uint32)
    plain = {
        "input_ids": ((T,), i32),
        "positions": ((T,), i32),
        "slot_mapping": ((T,), i32),
        "seq_lens": ((B,), i32),
        "query_start_loc": ((B + 1,), i32),
        "rows": ((B,), i32),
        "table_places": ((B,), i32),
        "table_blocks": ((B,), i32),
        "input_on_device": ((B,), i32),
        "sample_rows": ((B,), i32),
        "logits_indices": ((B,), i32),
        "temperature": ((B,), f32),
        "top_k": ((B,), i32),
        "top_p": ((B,), f32),
        "min_p": ((B,), f32),
        "seeds": ((B, 2), u32),
        "sample_index": ((B,), i32),
        "sample_positions": ((B,), i32),
    }
    if bucket.shares_prefix:
        sizes = (("shares_prefix", B), ("prefix_row", 1), ("prefix_blocks", 1))
        plain |= {name: ((size,), i32) for name, size in sizes}
    if bucket.num_steps > 1:
        return plain | {"num_steps": ((B,), i32), "ending_ids": ((B, MAX_ENDING_IDS), i32)}
    if bucket.num_drafts:
        L = bucket.num_logits
        names = (("num_drafts", B), ("places", L), ("owners", L), ("firsts", B))
        plain |= {name: ((size,), i32) for name, size in names}
    if not bucket.is_full:
        return plain
    return plain | {
        "wants_logprobs": ((B,), i32),
        "uses_bias": ((B,), i32),
        "uses_penalties": ((B,), i32),
        "uses_mask": ((B,), i32),
        "repetition_penalty": ((B,), f32),
        "presence_penalty": ((B,), f32),
        "frequency_penalty": ((B,), f32),
        "counted_rows": ((B,), i32),
    }


def packed_size(bucket: Bucket) -> int:
    """Returns the number of int32 in a packed step."""
    return sum(math.prod(shape) for shape, _ in layout(bucket).values())


def views(packed: np.ndarray, bucket: Bucket) -> StepInputs[np.ndarray]:
    """Returns the fields of a packed step on the host: views, through which it can be written."""
    arrays, offset = {}, 0
    for name, (shape, dtype) in layout(bucket).items():
        size = math.prod(shape)
        arrays[name] = packed[offset : offset + size].view(dtype).reshape(shape)
        offset += size
    return step_inputs(arrays)


def step_inputs(arrays: dict[str, Any]) -> StepInputs[Any]:
    """Returns the fields by their names."""
    if len(arrays) == _NUM_PLAIN:  # most steps, and what follows takes longer than all their views
        return StepInputs(**arrays)

    def part[T: tuple[Any, ...]](kind: type[T]) -> T | None:
        fields: Any = kind
        mine = {name: array for name, array in arrays.items() if name in fields._fields}
        return kind(**mine) if mine else None

    plain = {name: array for name, array in arrays.items() if name in StepInputs._fields}
    return StepInputs(
        **plain,
        full=part(FullInputs),
        many=part(ManyInputs),
        drafts=part(DraftInputs),
        prefix=part(PrefixInputs),
    )


_NUM_PLAIN = len(StepInputs._fields) - len(StepInputs._field_defaults)


def seed_words(seed: int) -> tuple[int, int]:
    """Returns a request's 64-bit seed as the two words of a row of `StepInputs.seeds`."""
    return seed >> 32, seed & 0xFFFFFFFF
