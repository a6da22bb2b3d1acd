"""What one step computes on the device: the model, new keys and values, the rows' next tokens.

Every shape comes in variants. The plain one samples and returns tokens, or also the log-probability
of each of them (`Bucket.has_logprobs`). The full one also does what few requests ask for:
penalties, bias and masks (`row_state`), and log-probabilities of the most likely tokens and of
prompts (`logprobs`). A step runs it only if a sequence that samples in it asks, and what none of
its rows asked for is skipped when the program runs, if it `looks`. On a GPU it does not, for the
host would have to wait: there no step has a branch, or a loop whose turns depend on data, and what
the host knows that a step does not need it leaves out by choosing a bucket without it.

A plain decode bucket may have several steps: a loop, in which each step is what it is alone. The
host says how many each sequence makes; one that gets a token which ends it makes no more. The loop
ends when no sequence makes another step, if it `looks`; else after the bucket's number of steps.

A mixed bucket may have drafts: tokens that somebody guessed. It samples behind each of them, and
the host sees which were right. If it proposes, a small model guesses the next ones, behind what is
right.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_paged.engine.core.buckets import Bucket
from pallas_paged.engine.core.logprobs import packed_width
from pallas_paged.engine.core.step_inputs import DraftInputs, StepInputs
from pallas_paged.engine.device.decode_loop import run_steps
from pallas_paged.engine.device.drafted import Drafted, Last, propose
from pallas_paged.engine.device.logprobs import pack
from pallas_paged.engine.device.processed import find_logprobs
from pallas_paged.engine.device.row_state import RowState, apply_rules, count_tokens
from pallas_paged.engine.device.rows import Rows, edit_tables
from pallas_paged.engine.device.sampling import Draw, cannot_sample, sample
from pallas_paged.engine.device.step_arrays import Caches, StepArrays
from pallas_paged.engine.device.unpack import (
    attention_metadata,
    logit_inputs,
    sampling_inputs,
    tokens_in_use,
    unpack,
    wanted_tokens,
)
from pallas_paged.kv_cache import AttentionMetadata
from pallas_paged.models import CausalLM
from pallas_paged.models.attend import paged_attend
from pallas_paged.models.interface import Attend
from pallas_paged.ops.product.api import rows_in_use

NUM_PROMPT_ROWS = 64
"""Tokens whose log-probabilities one call of the program for prompts computes."""


def run_step(
    params: Any,
    kv_caches: Caches,
    rows: Rows,
    packed: jax.Array,
    row_state: RowState | None,
    *,
    graphdef: nnx.GraphDef,
    bucket: Bucket,
    logprobs_width: int,
    logprobs_mode: str,
    implementation: str | None,
    cache_implementation: str | None,
    deterministic: bool,
    looks: bool,
) -> StepArrays:
    """Computes a step's tokens, writes their keys and values, and samples.

    Args:
      params: the model's split state.
      kv_caches: one per layer; donated by `StepPrograms`.
      rows: of the allocator; donated.
      packed: i32[K], see `step_inputs`.
      row_state: of a full step, else None; its counts are donated.
      graphdef: the model's graph definition.
      bucket: the step's shape.
      logprobs_width: W, see `logprobs`.
      logprobs_mode: see `EngineConfig`.
      implementation: of paged attention.
      cache_implementation: of the writes to the caches.
      deterministic: see `EngineConfig`.
      looks: whether the program decides by its inputs what to skip; see `placement.may_look`.
    """
    draw = functools.partial(sample, looks=looks, filters=bucket.filters)
    find = functools.partial(find_logprobs, mode=logprobs_mode, looks=looks, filters=bucket.filters)
    x = unpack(packed, bucket)
    rows = edit_tables(rows, x.table_places, x.table_blocks)
    model = nnx.merge(graphdef, params)
    attend = functools.partial(
        paged_attend,
        implementation=implementation,
        write_implementation=cache_implementation,
        promise_in_bounds=True,  # the scheduler's own ids; a step has no launches to spare
        deterministic=deterministic,
    )
    metadata = attention_metadata(x, rows.block_tables, bucket)
    if x.many is not None:
        return run_steps(
            x, x.many, model, attend, draw, find, metadata, kv_caches, rows, bucket, looks
        )
    starts = x.query_start_loc[:-1]
    on_device = jnp.where(x.input_on_device == 1, starts, bucket.num_tokens)
    input_ids = x.input_ids.at[on_device].set(rows.last_tokens[x.rows], mode="drop")
    places = x.logits_indices if x.drafts is None else x.drafts.places
    # A full step's other hidden states are for log-probabilities of prompts. And a deterministic
    # one must give what a full one does.
    wanted = None if deterministic else wanted_tokens(x, metadata, bucket)
    in_use = tokens_in_use(x, wanted, bucket)
    with rows_in_use(in_use):
        hidden, kv_caches = model(input_ids, metadata, kv_caches, attend=attend, wanted=wanted)
    num_rows = len(rows.last_tokens) - 1
    num_seqs = jnp.sum(x.rows < num_rows, dtype=jnp.int32)
    with rows_in_use({} if x.drafts is not None else {bucket.num_seqs: num_seqs}):
        of_all = model.compute_logits(hidden if wanted is not None else hidden[places])
    logits, behind = of_all, None
    if x.drafts is not None:
        logits, behind = of_all[x.drafts.firsts], _sample_behind(of_all, x, x.drafts, bucket, draw)

    with_proposals = functools.partial(
        _with_proposals, x, model, input_ids, metadata, attend, draw, bucket, num_rows
    )
    wrong = cannot_sample(logits)
    if x.full is None or row_state is None:
        tokens = draw(logits, sampling_inputs(x))
        rows = rows._replace(last_tokens=rows.last_tokens.at[x.sample_rows].set(tokens))
        tokens = jnp.where(wrong, logits.shape[-1], tokens)
        found = None
        if bucket.has_logprobs:
            found = find(logits, logits, tokens, sampling_inputs(x), 0)[:, None]
        tokens = _with_drafts(tokens, behind, x)
        tokens, kv_caches = with_proposals(tokens, kv_caches)
        return StepArrays(kv_caches, rows, tokens, found, None, None)

    counts = count_tokens(row_state.counts, x.full.counted_rows, input_ids[x.logits_indices])
    ruled = apply_rules(logits, row_state._replace(counts=counts), logit_inputs(x), looks=looks)
    empty = jnp.all(ruled == -jnp.inf, axis=-1)
    tokens = draw(ruled, sampling_inputs(x))
    rows = rows._replace(last_tokens=rows.last_tokens.at[x.sample_rows].set(tokens))
    tokens = jnp.where(empty, logits.shape[-1] + 1, tokens)
    tokens = jnp.where(wrong, logits.shape[-1], tokens)
    arguments = logits, ruled, tokens, sampling_inputs(x), logprobs_width
    nothing = jnp.zeros((bucket.num_seqs, packed_width(logprobs_width)), jnp.int32)
    wants = jnp.any(x.full.wants_logprobs == 1)
    find = functools.partial(find, *arguments)
    found = jax.lax.cond(wants, find, lambda: nothing) if looks else find()
    kept = None if bucket.is_decode else hidden
    tokens, kv_caches = with_proposals(_with_drafts(tokens, behind, x), kv_caches)
    return StepArrays(kv_caches, rows, tokens, found[:, None], counts, kept)


def _sample_behind(
    logits: jax.Array,
    x: StepInputs[jax.Array],
    drafts: DraftInputs[jax.Array],
    bucket: Bucket,
    draw: Draw,
) -> jax.Array:
    """Returns i32[B, D + 1], what is drawn behind each sequence's last known token and drafts.

    Each as if the drafts before it were the sequence's tokens; see `cannot_sample` for V. 0 behind
    drafts that a sequence does not have.
    """
    places = jnp.arange(bucket.num_drafts + 1, dtype=jnp.int32)[None]
    owners, sampling = drafts.owners, sampling_inputs(x)
    behind = jnp.arange(bucket.num_logits, dtype=jnp.int32) - drafts.firsts[owners]
    of_each = jax.tree.map(lambda array: array[owners], sampling)
    drawn = draw(logits, of_each._replace(positions=of_each.positions + behind))
    drawn = jnp.where(cannot_sample(logits), logits.shape[-1], drawn)
    found = drawn[jnp.minimum(drafts.firsts[:, None] + places, bucket.num_logits - 1)]
    return jnp.where(places <= drafts.num_drafts[:, None], found, 0)


def _with_drafts(
    tokens: jax.Array, behind: jax.Array | None, x: StepInputs[jax.Array]
) -> jax.Array:
    """Returns i32[B, D + 1]: `tokens` i32[B], and `behind` where a sequence has drafts.

    Of those that have some nobody asks for rules or log-probabilities.
    """
    if behind is None or x.drafts is None:
        return tokens[:, None]
    alone = jnp.pad(tokens[:, None], ((0, 0), (0, behind.shape[1] - 1)))
    return jnp.where(x.drafts.num_drafts[:, None] > 0, behind, alone)


def _with_proposals(
    x: StepInputs[jax.Array],
    model: CausalLM,
    input_ids: jax.Array,
    metadata: AttentionMetadata,
    attend: Attend,
    draw: Draw,
    bucket: Bucket,
    num_rows: int,
    tokens: jax.Array,
    kv_caches: Caches,
) -> tuple[jax.Array, Caches]:
    """Returns i32[B, 2 D + 1], `tokens` i32[B, D + 1] and as many guesses as drafts; and caches.

    In buckets that do not propose both are as they were.
    """
    if not bucket.proposes or x.drafts is None:
        return tokens, kv_caches
    assert isinstance(model, Drafted)
    count, places = bucket.num_drafts, jnp.arange(bucket.num_drafts, dtype=jnp.int32)[None]
    behind = jnp.minimum(x.drafts.firsts[:, None] + 1 + places, bucket.num_logits - 1)
    drafts = input_ids[x.drafts.places[behind]]
    agrees = (drafts == tokens[:, :count]) & (places < x.drafts.num_drafts[:, None])
    num_right = jnp.sum(jnp.cumprod(agrees.astype(jnp.int32), axis=1), axis=1)
    last = Last(
        jnp.take_along_axis(tokens, num_right[:, None], axis=1)[:, 0],
        x.sample_positions + num_right,
        x.sample_rows < num_rows,
    )
    guesses, caches = propose(
        model, last, metadata.block_tables, kv_caches, sampling_inputs(x), attend, draw, count
    )
    return jnp.concatenate([tokens, guesses], axis=1), caches


def prompt_logprobs(
    params: Any,
    hidden: jax.Array,
    packed: jax.Array,
    *,
    graphdef: nnx.GraphDef,
    width: int,
) -> jax.Array:
    """Returns `logprobs.pack`'s i32[P, 3 + 2 W] of P tokens of prompts; P is `NUM_PROMPT_ROWS`.

    Args:
      params: the model's split state.
      hidden: `StepArrays.hidden`.
      packed: i32[3, P], the tokens in front of those P, as indices into `hidden`; the P tokens; and
        the bits of the f32 by which their logits are divided.
      graphdef: the model's graph definition.
      width: W.
    """
    logits = nnx.merge(graphdef, params).compute_logits(hidden[packed[0]])
    temperature = jax.lax.bitcast_convert_type(packed[2], jnp.float32)
    return pack(logits / temperature[:, None], packed[1], width)
