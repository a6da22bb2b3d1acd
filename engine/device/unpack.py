"""A step's packed inputs on the device: its fields, as attention, rules and sampling take them."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_paged.engine.core.buckets import Bucket
from pallas_paged.engine.core.step_inputs import StepInputs, layout, step_inputs
from pallas_paged.engine.device.row_state import LogitInputs
from pallas_paged.engine.device.sampling import SamplingInputs
from pallas_paged.kv_cache import AttentionMetadata, SharedPrefix
from pallas_paged.models.interface import Wanted


def unpack(packed: jax.Array, bucket: Bucket) -> StepInputs[jax.Array]:
    """Returns the fields of a packed step on the device, inside a trace."""
    arrays, offset = {}, 0
    for name, (shape, dtype) in layout(bucket).items():
        size = math.prod(shape)
        bits = jax.lax.slice_in_dim(packed, offset, offset + size).reshape(shape)
        arrays[name] = bits if dtype == np.int32 else jax.lax.bitcast_convert_type(bits, dtype)
        offset += size
    return step_inputs(arrays)


def attention_metadata(
    x: StepInputs[jax.Array], block_tables: jax.Array, bucket: Bucket
) -> AttentionMetadata:
    """Returns what the model's attention needs of a step's inputs and of `Rows.block_tables`."""
    prefix = None
    if x.prefix is not None:
        table = block_tables[x.prefix.prefix_row[0], : bucket.table_width]
        prefix = SharedPrefix(table, x.prefix.prefix_blocks[0], x.prefix.shares_prefix == 1)
    return AttentionMetadata(
        positions=x.positions,
        slot_mapping=x.slot_mapping,
        block_tables=block_tables[x.rows, : bucket.table_width],
        seq_lens=x.seq_lens,
        query_start_loc=x.query_start_loc,
        max_query_len=1 if bucket.is_decode else bucket.num_tokens,
        min_query_len=1 if bucket.has_decodes else 2,
        shared_prefix=prefix,
    )


def wanted_tokens(
    x: StepInputs[jax.Array], metadata: AttentionMetadata, bucket: Bucket
) -> Wanted | None:
    """Returns whose hidden states a plain step needs of those in `metadata`; None for all."""
    if bucket.is_full or bucket.num_logits == bucket.num_tokens:
        return None
    if x.drafts is not None:
        return Wanted(x.drafts.places)
    places, pasts = x.logits_indices, x.query_start_loc[1:]
    # A fork without tokens of its own goes on behind one of another sequence.
    owners = jnp.sum(pasts[None] <= places[:, None], axis=1, dtype=jnp.int32)
    is_there = places == pasts[owners] - 1  # else it is padding, behind all others
    alone = AttentionMetadata(
        positions=metadata.positions[places],
        slot_mapping=metadata.slot_mapping[places],
        block_tables=metadata.block_tables[owners],
        seq_lens=jnp.where(is_there, metadata.seq_lens[owners], 0),
        query_start_loc=jnp.minimum(
            jnp.arange(len(places) + 1, dtype=jnp.int32), jnp.sum(is_there, dtype=jnp.int32)
        ),
        max_query_len=1,
    )
    return Wanted(places, alone)


def tokens_in_use(
    x: StepInputs[jax.Array], wanted: Wanted | None, bucket: Bucket
) -> dict[int, jax.Array]:
    """Returns `rows_in_use` of a model: its tokens, and of those whose hidden states are wanted."""
    counts = {bucket.num_tokens: x.query_start_loc[-1]}
    if wanted is not None and wanted.metadata is not None:
        counts[len(wanted.places)] = wanted.metadata.query_start_loc[-1]
    return counts


def logit_inputs(x: StepInputs[jax.Array]) -> LogitInputs:
    """Returns what the rules of a full step need of its inputs."""
    assert x.full is not None, "not a full step"
    return LogitInputs(
        rows=x.rows,
        uses_bias=x.full.uses_bias,
        uses_penalties=x.full.uses_penalties,
        uses_mask=x.full.uses_mask,
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
