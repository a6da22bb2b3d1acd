"""What the parts of the sm_90a decode kernel share, and the merge: items, the state, output."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.kv_cache import KVCache
from pallas_paged.ops.attention.config import DecodeConfig
from pallas_paged.ops.attention.hopper.decode_problem import (
    Barriers,
    DecodeProblem,
    Results,
    Smem,
)
from pallas_paged.ops.attention.hopper.tiles import (
    COLUMN_LAYOUT,
    TILE_LAYOUT,
    as_column,
    iota,
    spread_columns,
)
from pallas_paged.ops.attention.online_softmax import LN2, LOWEST, State, finished
from pallas_paged.ops.attention.work_list import SequenceField, WorkList
from pallas_paged.ops.mosaic_gpu import store


class Inputs(NamedTuple):
    """What the kernel reads, in global memory."""

    q: Any  # [X, N, D], see `DecodeProblem.query_rows`
    cache: KVCache  # of references
    block_tables: Any  # i32[B, M]
    work: WorkList
    slopes: Any  # f32[Hq], or None
    sinks: Any  # f32[Hq], or None


class Outputs(NamedTuple):
    """What the kernel writes, in global memory."""

    out: Any  # [T * Hq, D]
    lse: Any  # f32[R, Hk, N], to the base e


class Cta(NamedTuple):
    """One CTA: what the kernel is made for, what the CTA reads and has, and its share."""

    problem: DecodeProblem
    config: DecodeConfig
    inputs: Inputs
    smem: Smem
    barriers: Barriers
    first_item: jax.Array
    num_items: jax.Array
    first_tile: jax.Array  # in the first item
    num_tiles: jax.Array

    @property
    def chunk(self) -> int:
        """Rows of O^T per product: all of them, as long as they leave registers for the rest."""
        rows = self.problem.value_rows
        return rows if rows * self.problem.columns <= 4096 else 64

    @property
    def converts_ahead(self) -> bool:
        """Whether something is converted while the tensor core multiplies."""
        return self.problem.is_quantised and self.config.converts_ahead

    def slot(self, step: jax.Array) -> jax.Array:
        """Returns where in shared memory the share's tile number `step` is."""
        return lax.rem(step, jnp.int32(self.config.num_stages))

    def q_slot(self, index: jax.Array) -> jax.Array:
        """Returns where in shared memory the queries of the share's item number `index` are."""
        return lax.rem(index, jnp.int32(self.config.num_stages + 1))


class Item(NamedTuple):
    """One sequence's attention on one KV head: a record of the work list, read."""

    head: jax.Array
    row: jax.Array  # of the block table
    num_tiles: jax.Array
    first_tile: jax.Array  # counted from the sequence's first token
    length: jax.Array
    first_token: jax.Array
    num_tokens: jax.Array
    query_row: jax.Array  # where the packed queries are

    @property
    def first_position(self) -> jax.Array:
        """The position of the first query token."""
        return self.length - self.num_tokens


def read_item(problem: DecodeProblem, sequences: Any, item: jax.Array) -> Item:
    """Returns item number `item`. What of it is not used is not read."""
    heads = jnp.int32(problem.num_kv_heads)
    index = lax.div(item, heads)
    return Item(
        head=lax.rem(item, heads),
        row=sequences[index, SequenceField.ROW],
        num_tiles=sequences[index, SequenceField.NUM_TILES],
        first_tile=sequences[index, SequenceField.FIRST_TILE],
        length=sequences[index, SequenceField.LENGTH],
        first_token=sequences[index, SequenceField.FIRST_TOKEN],
        num_tokens=sequences[index, SequenceField.NUM_TOKENS],
        query_row=sequences[index, problem.query_row],
    )


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
    item: Item,
    outputs: Outputs,
    staged: Results,
    with_lse: Any = True,
) -> None:
    """Writes an item's O and lse by way of shared memory; the copies may still be in flight.

    Args:
      problem: what the kernel is specialised for.
      result: O^T in chunks, and lse to the base 2.
      item: whose they are.
      outputs: where to; of `out` as many columns as there are, at most those of the result.
      staged: the shared memory.
      with_lse: whether lse is written, else O alone.
    """
    values, lse = result
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what was there before has been sent
    for i, value in enumerate(values):
        chunk = value.shape[0]
        place = staged.out.at[:, pl.ds(i * chunk, chunk)].transpose((1, 0))
        store(place, plgpu.layout_cast(value.astype(problem.dtype), TILE_LAYOUT))
    store(staged.lse, as_column(lse * LN2))
    plgpu.commit_smem()

    @pl.when(with_lse)
    def _() -> None:
        plgpu.copy_smem_to_gmem(staged.lse, outputs.lse.at[item.query_row, item.head])

    for token in range(problem.max_tokens):
        row = item.first_token + token
        send = functools.partial(_send, problem, token, row, item.head, staged, outputs)
        pl.when(token < item.num_tokens)(send)


def _send(
    problem: DecodeProblem,
    token: int,
    row: jax.Array,
    head: jax.Array,
    staged: Results,
    outputs: Outputs,
) -> None:
    """Starts the copies of the staged token number `token` to its place in the output."""
    first = token * problem.group + problem.first_column(head)
    out_row = row * problem.num_q_heads + head * problem.group
    width = outputs.out.shape[1]
    if staged.out.shape[1] == width:
        plgpu.copy_smem_to_gmem(
            staged.out.at[pl.ds(first, problem.group)],
            outputs.out.at[pl.ds(out_row, problem.group)],
        )
    else:  # only whole rows of shared memory can be sent together
        for i in range(problem.group):
            plgpu.copy_smem_to_gmem(
                staged.out.at[first + i, pl.ds(0, width)], outputs.out.at[out_row + i]
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
