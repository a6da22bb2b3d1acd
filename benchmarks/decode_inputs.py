"""The packed inputs of a decode step, as the engine's planner would make them."""

import numpy as np

from pallas_paged.engine.core import step_inputs
from pallas_paged.engine.core.buckets import Bucket


def shuffled_tables(num_seqs: int, blocks_per_seq: int) -> np.ndarray:
    """Returns block tables i32[num_seqs, blocks_per_seq] of blocks 1, 2, ... in random order."""
    blocks = np.random.default_rng(0).permutation(num_seqs * blocks_per_seq)
    return 1 + blocks.astype(np.int32).reshape(num_seqs, blocks_per_seq)


def decode_inputs(
    bucket: Bucket,
    tables: np.ndarray,
    *,
    context: int,
    block_size: int,
    padding_place: int,
    temperature: float = 0.0,
    num_shared_blocks: int = 0,
) -> np.ndarray:
    """Returns i32[`packed_size`]: as many sequences as `bucket` holds, their tokens on the device.

    Args:
      bucket: of a plain decode step.
      tables: i32[B, M], the sequences' blocks, of which the device knows already.
      context: tokens of each sequence, the new one included.
      block_size: S.
      padding_place: an entry of the device's tables that no sequence reads, see `StepInputs`.
      temperature: of each sequence; above 0 they sample, by top-p in buckets that filter.
      num_shared_blocks: with how many of the same blocks all tables begin, for buckets that share.
    """
    packed = np.zeros(step_inputs.packed_size(bucket), np.int32)
    x = step_inputs.views(packed, bucket)
    rows, last = np.arange(bucket.num_seqs), context - 1
    x.positions[:] = last
    x.slot_mapping[:] = tables[:, last // block_size] * block_size + last % block_size
    x.table_places[:] = padding_place
    x.seq_lens[:] = x.sample_positions[:] = context
    x.query_start_loc[:] = np.arange(bucket.num_seqs + 1)
    x.rows[:] = x.sample_rows[:] = x.logits_indices[:] = x.seeds[:, 1] = rows
    x.input_on_device[:] = 1
    x.temperature[:] = temperature
    x.top_p[:] = 0.95 if bucket.filters else 1.0
    if x.many is not None:
        x.many.num_steps[:] = 1
        x.many.ending_ids[:] = -1
    if x.prefix is not None:
        x.prefix.shares_prefix[:] = 1
        x.prefix.prefix_blocks[:] = num_shared_blocks
    return packed
