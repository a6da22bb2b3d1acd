"""The merge of what several thread blocks of the sm_100a kernel computed of one item."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.ops.attention.ampere.parts import read_item
from pallas_paged.ops.attention.blackwell.parts import copy_rows, empty, finished_rows
from pallas_paged.ops.attention.blackwell.problem import (
    LANES,
    LAYOUT,
    ROW_LAYOUT,
    BlackwellProblem,
)
from pallas_paged.ops.attention.online_softmax import LN2, across, raised
from pallas_paged.ops.attention.work_list import CtaField, Parts
from pallas_paged.ops.mosaic_gpu import load, store


def merge_kernel(
    problem: BlackwellProblem,
    parts: Parts,
    sequences: Any,
    ctas: Any,
    sinks: Any,
    out: Any,
    lse: Any,
    *,
    rows: Any,
) -> None:
    """One CTA: the item that the other kernel's CTA of that number began and did not finish."""
    cta, num_ctas = lax.axis_index("cta"), lax.axis_size("cta")
    last_part = ctas[cta, CtaField.LAST_PART]

    @pl.when(last_part >= 0)
    def _() -> None:
        index = ctas[cta, CtaField.FIRST_ITEM] + ctas[cta, CtaField.NUM_ITEMS] - 1
        item = read_item(problem, sequences, index)

        def load_lse(part: jax.Array) -> tuple[jax.Array, jax.Array]:
            place = jnp.where(part == cta, num_ctas + cta, part)
            return place, load(parts.lse.at[place], ROW_LAYOUT)

        def add_lse(part: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
            maximum, denominator = carry
            _, part_lse = load_lse(part)
            maximum, correction = raised(maximum, part_lse)
            return maximum, denominator * correction + jnp.exp2(part_lse - maximum)

        maximum, denominator = lax.fori_loop(cta, last_part + 1, add_lse, empty())
        sink = None if sinks is None else load(sinks.at[item.head], ROW_LAYOUT)
        factor, item_lse = finished_rows(maximum, denominator, sink)
        store(lse.at[item.run, item.head], item_lse * LN2)
        results, _ = rows
        for chunk in problem.chunks:

            def add_values(part: jax.Array, total: jax.Array, chunk: Any = chunk) -> jax.Array:
                place, part_lse = load_lse(part)
                # Behind the part's own rows are those of others, or nobody's.
                at = pl.ds(place * problem.rows, LANES), chunk
                values = load(parts.values.at[at], LAYOUT)
                return total + values * across(jnp.exp2(part_lse - maximum), values.shape)

            zeros = plgpu.layout_cast(jnp.zeros((LANES, chunk.size), jnp.float32), LAYOUT)
            total = lax.fori_loop(cta, last_part + 1, add_values, zeros)
            results[:, chunk] = (total * across(factor, total.shape)).astype(problem.dtype)
        copy_rows(problem, results, out.at[item.run, item.head])
