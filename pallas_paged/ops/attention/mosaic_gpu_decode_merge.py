"""The merge of what several thread blocks of the sm_90a decode kernel computed of one item."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.ops.attention.decode_problem import DecodeProblem, output_scratch
from pallas_paged.ops.attention.mosaic_gpu_decode_parts import (
    COLUMN_LAYOUT,
    COMPILER_PARAMS,
    TILE_LAYOUT,
    empty,
    finish,
    load,
    sequence_and_head,
    spread,
    write,
)
from pallas_paged.ops.attention.work_list import CtaField, WorkList

_UNROLL = 4


def merge(
    out: jax.Array,
    lse: jax.Array,
    parts: jax.Array,
    part_lses: jax.Array,
    work: WorkList,
    sinks: jax.Array | None,
    problem: DecodeProblem,
) -> tuple[jax.Array, jax.Array]:
    """Returns (out, lse), written in place where an item was divided."""
    out_ref, lse_ref = jax.new_ref(out), jax.new_ref(lse)
    plgpu.kernel(
        functools.partial(_merge_kernel, problem),
        out_type=(),
        scratch_types=output_scratch(problem),
        grid=(work.ctas.shape[0],),
        grid_names=("cta",),
        compiler_params=COMPILER_PARAMS,
        kernel_name="paged_decode_merge",
    )(
        parts,
        part_lses,
        work.sequences,
        work.ctas,
        *([] if sinks is None else [sinks]),
        out_ref,
        lse_ref,
    )
    return out_ref[...], lse_ref[...]


def _merge_kernel(problem: DecodeProblem, *refs: Any, **scratch: Any) -> None:
    """One CTA: the item that the decode kernel's CTA of that number began and did not finish."""
    parts_ref, part_lses_ref, sequences_ref, ctas_ref, *refs_left = refs
    sinks_ref = refs_left.pop(0) if problem.has_sinks else None
    out_ref, lse_ref = refs_left
    cta, num_ctas = lax.axis_index("cta"), lax.axis_size("cta")
    last_part = ctas_ref[cta, CtaField.LAST_PART]

    @pl.when(last_part >= 0)
    def _() -> None:
        item = ctas_ref[cta, CtaField.FIRST_ITEM] + ctas_ref[cta, CtaField.NUM_ITEMS] - 1
        sequence, head = sequence_and_head(problem, item)
        num_parts = last_part - cta + 1

        def some_parts(turn: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            (accumulator,), maximum, denominator = carry
            # Loads that do not wait for each other; what is too much is the last part, weightless.
            for i in range(_UNROLL):
                index = turn * _UNROLL + i
                part = jnp.where(index == 0, num_ctas + cta, jnp.minimum(cta + index, last_part))
                values = load(parts_ref.at[part], TILE_LAYOUT)  # [D, N]
                lse = load(part_lses_ref.at[part], COLUMN_LAYOUT)  # [N]
                lse += jnp.where(index < num_parts, 0.0, -jnp.inf)
                new_maximum = jnp.maximum(maximum, lse)
                correction = jnp.exp2(maximum - new_maximum)
                weight = jnp.exp2(lse - new_maximum)
                denominator = denominator * correction + weight
                accumulator = accumulator * spread(correction, values.shape)
                accumulator += values * spread(weight, values.shape)
                maximum = new_maximum
            return (accumulator,), maximum, denominator

        turns = lax.div(num_parts + (_UNROLL - 1), jnp.int32(_UNROLL))
        state = empty(problem.value_rows, problem.value_rows, problem.columns)
        accumulators, maximum, denominator = lax.fori_loop(0, turns, some_parts, state)
        write(
            problem,
            finish(problem, accumulators, maximum, denominator, sinks_ref, head),
            sequence,
            head,
            sequences_ref,
            (out_ref, lse_ref, scratch["out_smem"], scratch["lse_smem"]),
        )
        plgpu.wait_smem_to_gmem(0)
