"""From the scheduler's decision to the arrays of one step: padded, then packed into one.

A host-to-device copy costs about the same for 4 bytes and for 100 KB, so a step's inputs travel
as a single int32 vector; floats and unsigned integers keep their bits. `unpack` is the inverse
inside the compiled step.
"""

import math
from typing import Any, NamedTuple

import jax
import numpy as np

from pallas_paged.block_tables import BlockTables
from pallas_paged.engine.buckets import Bucket
from pallas_paged.engine.logits import LogitInputs
from pallas_paged.engine.sampling import SamplingInputs, seed_words
from pallas_paged.engine.scheduler import ScheduledSequence, ScheduledStep
from pallas_paged.kv_cache import AttentionMetadata

Shape = tuple[int, ...]


class FullInputs[A](NamedTuple):
    """What only full steps need.

    Attributes:
      wants_logprobs: i32[B], 1 where the sampled token's log-probabilities are asked for.
      uses_bias: i32[B], see `LogitInputs`, as are the next four.
      uses_penalties: i32[B].
      repetition_penalty: f32[B].
      presence_penalty: f32[B].
      frequency_penalty: f32[B].
      counted_rows: i32[B], `rows` where the sequence's last input token is one of its output and
        has to be counted for the penalties, R elsewhere.
    """

    wants_logprobs: A
    uses_bias: A
    uses_penalties: A
    repetition_penalty: A
    presence_penalty: A
    frequency_penalty: A
    counted_rows: A


class StepInputs[A](NamedTuple):
    """What one step needs from the host; T tokens, B sequences, M blocks, R allocator rows.

    Attributes:
      input_ids: i32[T]; where `input_on_device`, replaced by the row's last sampled token.
      positions: i32[T], see `AttentionMetadata`, as are the next four.
      slot_mapping: i32[T].
      block_tables: i32[B, M].
      seq_lens: i32[B].
      query_start_loc: i32[B + 1].
      rows: i32[B], the allocator's row of each sequence; R for padding.
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
    """

    input_ids: A
    positions: A
    slot_mapping: A
    block_tables: A
    seq_lens: A
    query_start_loc: A
    rows: A
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


def layout(bucket: Bucket, max_blocks_per_seq: int) -> dict[str, tuple[Shape, np.dtype]]:
    """Returns shape and dtype of each field of `StepInputs`, in the order they are packed.

    Those of `StepInputs.full` follow, where the bucket is full.
    """
    T, B = bucket.num_tokens, bucket.num_seqs
    i32, f32, u32 = np.dtype(np.int32), np.dtype(np.float32), np.dtype(np.uint32)
    plain = {
        "input_ids": ((T,), i32),
        "positions": ((T,), i32),
        "slot_mapping": ((T,), i32),
        "block_tables": ((B, max_blocks_per_seq), i32),
        "seq_lens": ((B,), i32),
        "query_start_loc": ((B + 1,), i32),
        "rows": ((B,), i32),
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
    if not bucket.is_full:
        return plain
    return plain | {
        "wants_logprobs": ((B,), i32),
        "uses_bias": ((B,), i32),
        "uses_penalties": ((B,), i32),
        "repetition_penalty": ((B,), f32),
        "presence_penalty": ((B,), f32),
        "frequency_penalty": ((B,), f32),
        "counted_rows": ((B,), i32),
    }


def wants_logprobs(scheduled: ScheduledSequence) -> bool:
    """Whether the share's sampled token comes with log-probabilities."""
    return scheduled.samples and scheduled.sequence.sampling_params.logprobs is not None


def prompt_targets(share: ScheduledSequence) -> range:
    """Returns the positions of the prompt's tokens whose log-probabilities the share brings.

    Each position once in a request's life, whatever is computed again after a preemption. The
    token at position p is predicted by the one before it, which may be in another chunk than it.
    """
    sequence = share.sequence
    if sequence.sampling_params.prompt_logprobs is None:
        return range(0)
    first = max(share.start, sequence.group.num_prompt_logprobs) + 1
    return range(first, min(share.start + share.num_tokens, sequence.num_prompt_tokens - 1) + 1)


def needs_full(step: ScheduledStep) -> bool:
    """Whether the step needs the full variant, see `pallas_paged.engine.step`."""
    return any(
        wants_logprobs(share)
        or len(prompt_targets(share)) > 0
        or (share.samples and share.sequence.logit_rules is not None)
        for share in step.scheduled
    )


def packed_size(bucket: Bucket, max_blocks_per_seq: int) -> int:
    """Returns the number of int32 in a packed step."""
    return sum(math.prod(shape) for shape, _ in layout(bucket, max_blocks_per_seq).values())


def build(step: ScheduledStep, state: BlockTables, bucket: Bucket) -> np.ndarray:
    """Returns the packed inputs of `step`, padded to `bucket`: i32[packed_size(...)].

    `state` is the allocator's state in NumPy with the blocks of every scheduled token appended.
    """
    num_rows, max_blocks_per_seq = state.tables.shape
    packed = np.zeros(packed_size(bucket, max_blocks_per_seq), np.int32)
    x = views(packed, bucket, max_blocks_per_seq)
    x.rows[:] = x.sample_rows[:] = num_rows

    B = len(step.scheduled)
    rows = np.array([s.row for s in step.scheduled], np.int32)
    starts = np.array([s.start for s in step.scheduled], np.int32)
    counts = np.array([s.num_tokens for s in step.scheduled], np.int32)
    samples = np.array([s.samples for s in step.scheduled], bool)
    ends = np.cumsum(counts, dtype=np.int32)
    T = int(ends[-1])

    token_row = np.repeat(rows, counts)
    positions = np.arange(T, dtype=np.int32) + np.repeat(starts - (ends - counts), counts)
    S = state.block_size
    x.positions[:T] = positions
    x.slot_mapping[:T] = state.tables[token_row, positions // S] * S + positions % S
    x.block_tables[:B] = state.tables[rows]
    x.seq_lens[:B] = np.where(counts > 0, starts + counts, 0)
    x.query_start_loc[1 : B + 1] = ends
    x.query_start_loc[B + 1 :] = T
    x.rows[:B] = rows
    x.sample_rows[:B] = np.where(samples, rows, num_rows)
    x.logits_indices[:B] = ends - 1  # for a share without tokens, the last one of its parent
    x.sample_positions[:B] = starts + counts
    for b, (scheduled, end) in enumerate(zip(step.scheduled, ends.tolist(), strict=True)):
        sequence, params = scheduled.sequence, scheduled.sequence.sampling_params
        if scheduled.input_on_device:
            x.input_on_device[b] = 1
        elif scheduled.num_tokens:
            begin = scheduled.start
            ids = sequence.token_ids[begin : begin + scheduled.num_tokens]
            x.input_ids[end - scheduled.num_tokens : end] = ids
        x.temperature[b] = params.temperature
        x.top_k[b] = params.top_k
        x.top_p[b] = params.top_p
        x.min_p[b] = params.min_p
        x.seeds[b] = seed_words(params.seed)
        x.sample_index[b] = sequence.index
    if x.full is not None:
        _fill_full(x.full, step.scheduled, num_rows)
    return packed


def _fill_full(
    x: FullInputs[np.ndarray], scheduled: tuple[ScheduledSequence, ...], num_rows: int
) -> None:
    """Fills the fields that only full steps have."""
    x.counted_rows[:] = num_rows
    x.repetition_penalty[:] = 1.0
    for b, share in enumerate(scheduled):
        x.wants_logprobs[b] = wants_logprobs(share)
        rules = share.sequence.logit_rules
        if rules is None or not share.samples:
            continue
        x.uses_bias[b] = rules.uses_bias
        if rules.uses_penalties:
            x.uses_penalties[b] = 1
            x.repetition_penalty[b] = rules.repetition_penalty
            x.presence_penalty[b] = rules.presence_penalty
            x.frequency_penalty[b] = rules.frequency_penalty
            if share.start + share.num_tokens > share.sequence.num_prompt_tokens:
                x.counted_rows[b] = share.row


def views(packed: np.ndarray, bucket: Bucket, max_blocks_per_seq: int) -> StepInputs[np.ndarray]:
    """Returns the fields of a packed step on the host: views, through which it can be written."""
    arrays, offset = {}, 0
    for name, (shape, dtype) in layout(bucket, max_blocks_per_seq).items():
        size = math.prod(shape)
        arrays[name] = packed[offset : offset + size].view(dtype).reshape(shape)
        offset += size
    return _step_inputs(arrays)


def unpack(packed: jax.Array, bucket: Bucket, max_blocks_per_seq: int) -> StepInputs[jax.Array]:
    """Returns the fields of a packed step on the device, inside a trace."""
    arrays, offset = {}, 0
    for name, (shape, dtype) in layout(bucket, max_blocks_per_seq).items():
        size = math.prod(shape)
        bits = jax.lax.slice_in_dim(packed, offset, offset + size).reshape(shape)
        arrays[name] = bits if dtype == np.int32 else jax.lax.bitcast_convert_type(bits, dtype)
        offset += size
    return _step_inputs(arrays)


def _step_inputs(arrays: dict[str, Any]) -> StepInputs[Any]:
    plain = {name: array for name, array in arrays.items() if name in StepInputs._fields}
    if len(plain) == len(arrays):
        return StepInputs(**plain)
    full = {name: array for name, array in arrays.items() if name in FullInputs._fields}
    return StepInputs(**plain, full=FullInputs(**full))


def attention_metadata(x: StepInputs[jax.Array], bucket: Bucket) -> AttentionMetadata:
    """Returns what the model's attention needs of a step's inputs."""
    return AttentionMetadata(
        positions=x.positions,
        slot_mapping=x.slot_mapping,
        block_tables=x.block_tables,
        seq_lens=x.seq_lens,
        query_start_loc=x.query_start_loc,
        max_query_len=1 if bucket.is_decode else bucket.num_tokens,
    )


def logit_inputs(x: StepInputs[jax.Array]) -> LogitInputs:
    """Returns what the rules of a full step need of its inputs."""
    assert x.full is not None, "not a full step"
    return LogitInputs(
        rows=x.rows,
        uses_bias=x.full.uses_bias,
        uses_penalties=x.full.uses_penalties,
        repetition_penalty=x.full.repetition_penalty,
        presence_penalty=x.full.presence_penalty,
        frequency_penalty=x.full.frequency_penalty,
    )


def sampling_inputs(x: StepInputs[jax.Array]) -> SamplingInputs:
    """Returns what sampling needs of a step's inputs."""
    return SamplingInputs(
        temperature=x.temperature,
        top_k=x.top_k,
        top_p=x.top_p,
        min_p=x.min_p,
        seeds=x.seeds,
        sample_index=x.sample_index,
        positions=x.sample_positions,
    )
