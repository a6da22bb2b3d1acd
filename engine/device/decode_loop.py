"""Several decode steps in one program: each is what it is alone, see `step`."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp

from pallas_paged.engine.core.buckets import Bucket
from pallas_paged.engine.core.logprobs import packed_width
from pallas_paged.engine.core.step_inputs import ManyInputs, StepInputs
from pallas_paged.engine.device.rows import Rows
from pallas_paged.engine.device.sampling import Draw, cannot_sample
from pallas_paged.engine.device.step_arrays import Caches, StepArrays
from pallas_paged.engine.device.unpack import sampling_inputs
from pallas_paged.kv_cache import AttentionMetadata
from pallas_paged.models import CausalLM
from pallas_paged.models.interface import Attend
from pallas_paged.ops.product.api import rows_in_use


def run_steps(
    x: StepInputs[jax.Array],
    many: ManyInputs[jax.Array],
    model: CausalLM,
    attend: Attend,
    draw: Draw,
    find: Callable[..., jax.Array],
    metadata: AttentionMetadata,
    kv_caches: Caches,
    rows: Rows,
    bucket: Bucket,
    looks: bool,
) -> StepArrays:
    """Makes decode steps one after the other; the inputs and `metadata` are those of the first.

    `draw` chooses tokens, and `find`, see `find_logprobs`, says how likely they were.
    """
    block_size = kv_caches[0].k.shape[2]
    places = jnp.arange(bucket.num_seqs, dtype=jnp.int32)
    sampling = sampling_inputs(x)

    def ends(tokens: jax.Array) -> jax.Array:
        return jnp.any(tokens[:, None] == many.ending_ids, axis=1)

    def runs(state: _Loop) -> jax.Array:
        return jnp.any(state.is_live & (state.step < many.num_steps))

    def body(state: _Loop) -> _Loop:
        step, is_live = state.step, state.is_live & (state.step < many.num_steps)
        positions = x.positions + step
        blocks = metadata.block_tables[places, positions // block_size]
        slots = blocks * block_size + positions % block_size
        here = dataclasses.replace(
            metadata,
            positions=positions,
            slot_mapping=jnp.where(is_live, slots, 0),
            seq_lens=jnp.where(is_live, x.seq_lens + step, 0),
        )
        with rows_in_use({bucket.num_seqs: jnp.max(jnp.where(is_live, places + 1, 0))}):
            hidden, caches = model(state.input_ids, here, state.kv_caches, attend=attend)
            logits = model.compute_logits(hidden)
        drawn = draw(logits, sampling._replace(positions=sampling.positions + step))
        wrong = cannot_sample(logits)
        found = jnp.where(is_live, jnp.where(wrong, logits.shape[-1], drawn), 0)
        return _Loop(
            step + 1,
            is_live & ~wrong & ~ends(drawn),
            jnp.where(is_live, drawn, state.input_ids),
            cast(Caches, caches),
            state.tokens.at[:, step].set(found),
            None
            if state.logprobs is None
            else state.logprobs.at[:, step].set(find(logits, logits, found, sampling, 0)),
        )

    on_device = x.input_on_device == 1
    input_ids = jnp.where(on_device, rows.last_tokens[x.rows], x.input_ids)
    tokens = jnp.zeros((bucket.num_seqs, bucket.num_steps), jnp.int32)
    logprobs = None
    if bucket.has_logprobs:
        logprobs = jnp.zeros((*tokens.shape, packed_width(0)), jnp.int32)
    # What the device sampled last may have ended the sequence, which the host did not know.
    is_live = ~(on_device & ends(input_ids))
    first = _Loop(jnp.int32(0), is_live, input_ids, kv_caches, tokens, logprobs)
    if looks:
        last = jax.lax.while_loop(runs, body, first)
    else:
        last = jax.lax.fori_loop(0, bucket.num_steps, lambda _, state: body(state), first)
    rows = rows._replace(last_tokens=rows.last_tokens.at[x.sample_rows].set(last.input_ids))
    return StepArrays(last.kv_caches, rows, last.tokens, last.logprobs, None, None)


class _Loop(NamedTuple):
    """Between two steps of a program: which one is next, who makes it with which tokens, i32[B]."""

    step: jax.Array
    is_live: jax.Array
    input_ids: jax.Array
    kv_caches: Caches
    tokens: jax.Array
    logprobs: jax.Array | None
