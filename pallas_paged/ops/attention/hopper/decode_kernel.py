"""The sm_90a decode kernel: one to eight query tokens per sequence, keys in blocks.

The tensor cores multiply tiles of 64 rows, and a decode step has a few query rows per KV head. So
the operands change sides: keys and values give the rows, which fill 64 anyway, and queries the
columns. With N query columns (the heads of the group, token after token, padded to 8), a tile of T
keys and head_dim D:

    S^T[T, N] = K[T, D] Q^T[D, N]        one product per tile
    P^T[T, N] = softmax over T, online, float32 and base 2
    O^T[D, N] = O^T * correction + V^T[D, T] P^T[T, N]

One warpgroup is a CTA, and a few CTAs share an SM: while one waits for its reduction another one
multiplies. Each CTA walks along its share of the work list (`work_list.py`); a ring of
`num_stages` tiles is loaded ahead of it by TMA, one copy per block of the paged cache and across
the borders of items, so that short sequences stream like long ones (`decode_load.py`). What is
computed of a tile is in `decode_tile.py`. A result is written where it belongs if the CTA has seen
all of the item's keys, else as a partial result that another kernel combines (`decode_merge.py`).

A quantised cache is in flight as it is stored, and converted into one more tile of keys and one of
values (`quantised.py`). The tensor core works by itself once a product is begun, so that values are
converted during the product with keys, and the keys of the next tile during the one with values:
neither is what that product reads.

What the interpreter cannot see (it takes a warpgroup for one thread, and products for done at once)
is noted where it matters: `commit_smem` between writes to shared memory and the tensor core or TMA
that reads them, and the barriers of the warpgroup before a tile that all four warps have read is
loaded anew. A warp waits for its own rows of a product alone; that the others are done with what it
writes next follows from Mosaic GPU's barriers of the warpgroup around each write to shared memory.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.ops.attention.config import DecodeConfig
from pallas_paged.ops.attention.hopper.decode_load import Place, load_first, load_tile
from pallas_paged.ops.attention.hopper.decode_parts import (
    Cta,
    Inputs,
    Outputs,
    empty,
    finish,
    per_column,
    read_item,
    write,
    write_padding,
)
from pallas_paged.ops.attention.hopper.decode_problem import Barriers, DecodeProblem, Smem
from pallas_paged.ops.attention.hopper.decode_tile import add_tile, convert_keys, tile_of
from pallas_paged.ops.attention.online_softmax import State
from pallas_paged.ops.attention.work_list import CtaField, Parts
from pallas_paged.ops.mosaic_gpu import store


def decode_kernel(
    problem: DecodeProblem,
    config: DecodeConfig,
    inputs: Inputs,
    outputs: Outputs,
    parts: Parts,
    *,
    smem: Smem,
    barriers: Barriers,
) -> None:
    """One CTA: its share of the line of tiles, item after item."""
    ctas, number = inputs.work.ctas, lax.axis_index("cta")
    cta = Cta(
        problem,
        config,
        inputs,
        smem,
        barriers,
        first_item=ctas[number, CtaField.FIRST_ITEM],
        num_items=ctas[number, CtaField.NUM_ITEMS],
        first_tile=ctas[number, CtaField.FIRST_TILE],
        num_tiles=ctas[number, CtaField.NUM_TILES],
    )
    place = load_first(cta)
    if cta.converts_ahead:
        pl.when(cta.num_tiles > 0)(lambda: convert_keys(cta, jnp.int32(0)))

    def one_item(index: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        return _attend_item(cta, outputs, parts, index, *carry)

    lax.fori_loop(0, cta.num_items, one_item, (jnp.int32(0), place))
    write_padding(problem, ctas[number, CtaField.STEP_TOKENS], smem.results, outputs)
    plgpu.wait_smem_to_gmem(0)


def _attend_item(
    cta: Cta, outputs: Outputs, parts: Parts, index: jax.Array, step: jax.Array, place: Place
) -> tuple[jax.Array, Place]:
    """Computes what the share has of its item number `index`, and writes it.

    Args:
      cta: the CTA.
      outputs: written if all of the item is in this share.
      parts: written otherwise.
      index: of the item, from 0.
      step: how many tiles of the share are done.
      place: the next tile to load.

    Returns:
      `step` and `place` after the item.
    """
    problem, inputs = cta.problem, cta.inputs
    item = read_item(problem, inputs.work.sequences, cta.first_item + index)
    begin = jnp.where(index == 0, cta.first_tile, 0)
    end = jnp.minimum(item.num_tiles, begin + cta.num_tiles - step)
    slopes = None
    if inputs.slopes is not None:
        slopes = per_column(problem, inputs.slopes, item.head)
    q_slot = cta.q_slot(index)
    plgpu.barrier_wait(cta.barriers.q.at[q_slot])
    queries = cta.smem.q.at[q_slot]

    def one_tile(tile: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        state, step, place = carry
        state = add_tile(cta, item, tile_of(cta, item, tile, step), queries, slopes, state)
        later = step + cta.config.num_stages
        place = lax.cond(later < cta.num_tiles, lambda: load_tile(cta, later, place), lambda: place)
        return state, step + 1, place

    state = empty(problem.value_rows, cta.chunk, problem.columns)
    state, step, place = lax.fori_loop(begin, end, one_tile, (state, step, place))
    is_whole = (begin == 0) & (end == item.num_tiles)

    @pl.when(is_whole)
    def _() -> None:
        # Read again: what only the end needs would take registers in the loop.
        again = read_item(problem, inputs.work.sequences, cta.first_item + index)
        result = finish(problem, state, inputs.sinks, item.head)
        write(problem, result, again, outputs, cta.smem.results)

    @pl.when(jnp.logical_not(is_whole))
    def _() -> None:
        _write_part(cta, state, item.head, begin == 0, parts)

    return step, place


def _write_part(cta: Cta, state: State, head: jax.Array, is_begin: jax.Array, parts: Parts) -> None:
    """Writes a partial result; where, depends on whether it has the item's first tile."""
    part = lax.axis_index("cta") + jnp.where(is_begin, lax.axis_size("cta"), 0)
    values, lse = finish(cta.problem, state, None, head)
    for i, value in enumerate(values):
        store(parts.values.at[part, pl.ds(i * cta.chunk, cta.chunk)], value)
    store(parts.lse.at[part], lse)
