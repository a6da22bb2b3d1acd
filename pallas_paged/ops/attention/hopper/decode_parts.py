"""What the sm_90a decode kernel and the merge of its parts share: the state, and output."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.ops.attention.hopper.decode_problem import DecodeProblem, Results
from pallas_paged.ops.attention.hopper.tiles import (
    COLUMN_LAYOUT,
    TILE_LAYOUT,
    as_column,
    iota,
    spread_columns,
)
from pallas_paged.ops.attention.online_softmax import LN2, LOWEST, State, finished
from pallas_paged.ops.attention.work_list import SequenceField
from pallas_paged.ops.mosaic_gpu import store


class Outputs(NamedTuple):
    """What the kernel writes, in global memory."""

    out: Any  # [T * Hq, D]
    lse: Any  # f32[R, Hk, N], to the base e


def sequence_and_head(problem: DecodeProblem, item: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the row of `WorkList.sequences` and the KV head of an item."""
    heads = jnp.int32(problem.num_kv_heads)
    return lax.div(item, heads), lax.rem(item, heads)


def per_column(problem: DecodeProblem, per_head: Any, kv_head: jax.Array) -> jax.Array:
    """Returns f32[N]: the number of each column's query head."""
    if problem.group == 1:  # what follows would keep the compiler searching for its layouts
        return as_column(jnp.full((problem.columns,), per_head[kv_head]))
    head = lax.rem(iota((problem.columns,), 0, COLUMN_LAYOUT), jnp.int32(problem.group))
    numbers = as_column(jnp.zeros((problem.columns,), jnp.float32))
    for i in range(problem.group):
        numbers = jnp.where(head == i, per_head[kv_head * problem.group + i], numbers)
    return numbers


def empty(value_rows: int, chunk: int, columns: int) -> State:
    """Returns the state before the first key, O^T in chunks of some rows."""
    zeros = plgpu.layout_cast(jnp.zeros((chunk, columns), jnp.float32), TILE_LAYOUT)
    maximum = as_column(jnp.full((columns,), LOWEST, jnp.float32))
    denominator = as_column(jnp.zeros((columns,), jnp.float32))
    return State((zeros,) * (value_rows // chunk), maximum, denominator)


def finish(
    problem: DecodeProblem, state: State, sinks: Any, head: jax.Array
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Returns (O^T divided by the denominator, lse to the base 2), the sink included if given."""
    sink = None if sinks is None else per_column(problem, sinks, head)
    return finished(state, sink, spread_columns, as_column)


def write(
    problem: DecodeProblem,
    result: tuple[tuple[jax.Array, ...], jax.Array],
    sequence: jax.Array,
    head: jax.Array,
    sequences: Any,
    outputs: Outputs,
    staged: Results,
) -> None:
    """Writes an item's O and lse by way of shared memory; the copies may still be in flight."""
    values, lse = result
    first_token = sequences[sequence, SequenceField.FIRST_TOKEN]
    num_tokens = sequences[sequence, SequenceField.NUM_TOKENS]
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what was there before has been sent
    chunk = problem.value_rows // len(values)
    for i, value in enumerate(values):
        place = staged.out.at[:, pl.ds(i * chunk, chunk)].transpose((1, 0))
        store(place, plgpu.layout_cast(value.astype(problem.dtype), TILE_LAYOUT))
    store(staged.lse, as_column(lse * LN2))
    plgpu.commit_smem()
    query_row = sequences[sequence, problem.query_row]
    plgpu.copy_smem_to_gmem(staged.lse, outputs.lse.at[query_row, head])
    for token in range(problem.max_tokens):
        send = functools.partial(_send, problem, token, first_token + token, head, staged, outputs)
        pl.when(token < num_tokens)(send)


def _send(
    problem: DecodeProblem,
    token: int,
    row: jax.Array,
    head: jax.Array,
    staged: Results,
    outputs: Outputs,
) -> None:
    """Starts the copies of the staged token number `token` to its place in the output."""
    first = token * problem.group
    out_row = row * problem.num_q_heads + head * problem.group
    if problem.value_rows == problem.head_dim:
        plgpu.copy_smem_to_gmem(
            staged.out.at[pl.ds(first, problem.group)],
            outputs.out.at[pl.ds(out_row, problem.group)],
        )
    else:  # only whole rows of shared memory can be sent together
        for i in range(problem.group):
            plgpu.copy_smem_to_gmem(
                staged.out.at[first + i, pl.ds(0, problem.head_dim)], outputs.out.at[out_row + i]
            )


def write_padding(
    problem: DecodeProblem, num_tokens: jax.Array, staged: Results, outputs: Outputs
) -> None:
    """Writes zeros for the tokens from `num_tokens` on; the CTAs take them in turn."""
    cta, num_ctas = lax.axis_index("cta"), lax.axis_size("cta")
    first = num_tokens + cta
    all_tokens = outputs.out.shape[0] // problem.num_q_heads
    turns = lax.div(jnp.maximum(all_tokens - first + num_ctas - 1, 0), num_ctas)

    @pl.when(turns > 0)
    def _() -> None:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        zeros = jnp.zeros((problem.value_rows, problem.columns), problem.dtype)
        store(staged.out.transpose((1, 0)), plgpu.layout_cast(zeros, TILE_LAYOUT))
        plgpu.commit_smem()

        @pl.loop(0, turns)
        def _(turn: jax.Array) -> None:
            @pl.loop(0, problem.num_kv_heads)
            def _(head: jax.Array) -> None:
                _send(problem, 0, first + turn * num_ctas, head, staged, outputs)
