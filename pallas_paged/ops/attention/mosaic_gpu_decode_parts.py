"""What the sm_90a decode kernel and the merge of its partial results share: softmax, and output."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.ops.attention.decode_problem import DecodeProblem
from pallas_paged.ops.attention.work_list import SequenceField

LOG2E = math.log2(math.e)
_LN2 = math.log(2)
# Below any logit and finite: exp2(-inf - _LOWEST) is 0 where exp2(-inf + inf) would be NaN.
_LOWEST = -1e30
COMPILER_PARAMS = plgpu.CompilerParams(approx_math=True)

TILE_LAYOUT = plgpu.Layout.WGMMA  # [64 * m, N]: what the tensor core leaves in registers
COLUMN_LAYOUT = TILE_LAYOUT.reduce(0)  # [N]


def sequence_and_head(problem: DecodeProblem, item: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the row of `WorkList.sequences` and the KV head of an item."""
    heads = jnp.int32(problem.num_kv_heads)
    return lax.div(item, heads), lax.rem(item, heads)


def per_column(problem: DecodeProblem, per_head: Any, kv_head: jax.Array) -> jax.Array:
    """Returns f32[N]: the number of each column's query head."""
    if problem.group == 1:  # what follows would keep the compiler searching for its layouts
        return as_column(jnp.full((problem.columns,), per_head[kv_head]))
    head = lax.rem(_column_iota(problem.columns), jnp.int32(problem.group))
    numbers = as_column(jnp.zeros((problem.columns,), jnp.float32))
    for i in range(problem.group):
        numbers = jnp.where(head == i, per_head[kv_head * problem.group + i], numbers)
    return numbers


def empty(
    value_rows: int, chunk: int, columns: int
) -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array]:
    """Returns (accumulators, maximum, denominator) before the first key."""
    zeros = plgpu.layout_cast(jnp.zeros((chunk, columns), jnp.float32), TILE_LAYOUT)
    maximum = as_column(jnp.full((columns,), _LOWEST, jnp.float32))
    denominator = as_column(jnp.zeros((columns,), jnp.float32))
    return (zeros,) * (value_rows // chunk), maximum, denominator


def finish(
    problem: DecodeProblem,
    accumulators: tuple[jax.Array, ...],
    maximum: jax.Array,
    denominator: jax.Array,
    sinks_ref: Any,
    head: jax.Array,
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Returns (O^T divided by the denominator, lse to the base 2), the sink included if given.

    Without any visible key they are 0 and -inf.
    """
    factor: Any = 1.0
    if sinks_ref is not None:
        sink = per_column(problem, sinks_ref, head) * LOG2E
        new_maximum = jnp.maximum(maximum, sink)
        factor = jnp.exp2(maximum - new_maximum)
        denominator = denominator * factor + jnp.exp2(sink - new_maximum)
        maximum = new_maximum
    is_seen = denominator > 0
    factor = as_column(jnp.where(is_seen, factor / denominator, 0.0))
    lse = as_column(jnp.where(is_seen, maximum + jnp.log2(denominator), -jnp.inf))
    return tuple(a * spread(factor, a.shape) for a in accumulators), lse


def write(
    problem: DecodeProblem,
    result: tuple[tuple[jax.Array, ...], jax.Array],
    sequence: jax.Array,
    head: jax.Array,
    sequences_ref: Any,
    refs: tuple[Any, Any, Any, Any],
) -> None:
    """Writes an item's O and lse by way of shared memory; the copies may still be in flight."""
    values, lse = result
    out_ref, lse_ref, out_smem, lse_smem = refs
    first_token = sequences_ref[sequence, SequenceField.FIRST_TOKEN]
    num_tokens = sequences_ref[sequence, SequenceField.NUM_TOKENS]
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what was there before has been sent
    chunk = problem.value_rows // len(values)
    for i, value in enumerate(values):
        staged = out_smem.at[:, pl.ds(i * chunk, chunk)].transpose((1, 0))
        store(staged, plgpu.layout_cast(value.astype(problem.dtype), TILE_LAYOUT))
    store(lse_smem, as_column(lse * _LN2))
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(lse_smem, lse_ref.at[sequences_ref[sequence, problem.query_row], head])
    for token in range(problem.max_tokens):
        send = functools.partial(
            _send, problem, token, first_token + token, head, out_smem, out_ref
        )
        pl.when(token < num_tokens)(send)


def _send(
    problem: DecodeProblem, token: int, row: jax.Array, head: jax.Array, out_smem: Any, out_ref: Any
) -> None:
    """Starts the copies of the staged token number `token` to its place in the output."""
    first = token * problem.group
    out_row = row * problem.num_q_heads + head * problem.group
    if problem.value_rows == problem.head_dim:
        plgpu.copy_smem_to_gmem(
            out_smem.at[pl.ds(first, problem.group)], out_ref.at[pl.ds(out_row, problem.group)]
        )
    else:  # only whole rows of shared memory can be sent together
        for i in range(problem.group):
            plgpu.copy_smem_to_gmem(
                out_smem.at[first + i, pl.ds(0, problem.head_dim)], out_ref.at[out_row + i]
            )


def write_padding(
    problem: DecodeProblem, num_tokens: jax.Array, out_smem: Any, out_ref: Any
) -> None:
    """Writes zeros for the tokens from `num_tokens` on; the CTAs take them in turn."""
    cta, num_ctas = lax.axis_index("cta"), lax.axis_size("cta")
    first = num_tokens + cta
    all_tokens = out_ref.shape[0] // problem.num_q_heads
    turns = lax.div(jnp.maximum(all_tokens - first + num_ctas - 1, 0), num_ctas)

    @pl.when(turns > 0)
    def _() -> None:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        zeros = jnp.zeros((problem.value_rows, problem.columns), problem.dtype)
        store(out_smem.transpose((1, 0)), plgpu.layout_cast(zeros, TILE_LAYOUT))
        plgpu.commit_smem()

        @pl.loop(0, turns)
        def _(turn: jax.Array) -> None:
            @pl.loop(0, problem.num_kv_heads)
            def _(head: jax.Array) -> None:
                _send(problem, 0, first + turn * num_ctas, head, out_smem, out_ref)


def _column_iota(columns: int) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, (columns,), 0, layout=COLUMN_LAYOUT)


def as_column(vector: jax.Array) -> jax.Array:
    """Returns [N] in the layout of one number per column."""
    return plgpu.layout_cast(vector, COLUMN_LAYOUT)


def spread(vector: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns [N] as [rows, N]. Stating layouts here keeps the compiler's search for them short."""
    return plgpu.layout_cast(lax.broadcast_in_dim(vector, shape, [1]), TILE_LAYOUT)


def load(ref: Any, layout: Any) -> jax.Array:
    """Returns what lies in global memory at `ref`, whether or not it fills 128-byte lines."""
    return plgpu.load(ref, layout=layout, optimized=False)


def store(ref: Any, value: jax.Array) -> None:
    """Stores registers in an order that no 128-byte lines come out of; rare enough to be cheap."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:  # JAX 0.11 has nothing else
        ref[...] = value
