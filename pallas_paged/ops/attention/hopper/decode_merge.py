"""The merge of what several thread blocks of the sm_90a decode kernel computed of one item."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.ops.attention.hopper.decode_parts import (
    Outputs,
    empty,
    finish,
    read_item,
    write,
)
from pallas_paged.ops.attention.hopper.decode_problem import (
    DecodeProblem,
    Results,
    results_scratch,
)
from pallas_paged.ops.attention.hopper.tiles import (
    COLUMN_LAYOUT,
    TILE_LAYOUT,
    spread_columns,
)
from pallas_paged.ops.attention.online_softmax import COMPILER_PARAMS, State, raised
from pallas_paged.ops.attention.work_list import CtaField, Parts, WorkList
from pallas_paged.ops.mosaic_gpu import load

_UNROLL = 4


class Inputs(NamedTuple):
    """What the kernel reads, in global memory."""

    parts: Parts
    sequences: Any  # of the work list
    ctas: Any  # of the work list
    sinks: Any  # f32[Hq], or None


def merge(
    outputs: Outputs,
    parts: Parts,
    work: WorkList,
    sinks: jax.Array | None,
    problem: DecodeProblem,
) -> Outputs:
    """Returns the results, written in place where an item was divided."""
    refs = jax.tree.map(jax.new_ref, outputs)
    plgpu.kernel(
        functools.partial(_merge_kernel, problem),
        out_type=(),
        scratch_types={"staged": results_scratch(problem)},
        grid=(work.ctas.shape[0],),
        grid_names=("cta",),
        compiler_params=COMPILER_PARAMS,
        kernel_name="paged_decode_merge",
    )(Inputs(parts, work.sequences, work.ctas, sinks), refs)
    return Outputs(refs.out[...], refs.lse[...])


def _merge_kernel(
    problem: DecodeProblem, inputs: Inputs, outputs: Outputs, *, staged: Results
) -> None:
    """One CTA: the item that the decode kernel's CTA of that number began and did not finish."""
    parts, ctas = inputs.parts, inputs.ctas
    cta, num_ctas = lax.axis_index("cta"), lax.axis_size("cta")
    last_part = ctas[cta, CtaField.LAST_PART]

    @pl.when(last_part >= 0)
    def _() -> None:
        number = ctas[cta, CtaField.FIRST_ITEM] + ctas[cta, CtaField.NUM_ITEMS] - 1
        item = read_item(problem, inputs.sequences, number)
        num_parts = last_part - cta + 1

        def some_parts(turn: jax.Array, state: State) -> State:
            (numerator,), maximum, denominator = state
            # Loads that do not wait for each other; what is too much is the last part, weightless.
            for i in range(_UNROLL):
                index = turn * _UNROLL + i
                part = jnp.where(index == 0, num_ctas + cta, jnp.minimum(cta + index, last_part))
                values = load(parts.values.at[part], TILE_LAYOUT)  # [D, N]
                lse = load(parts.lse.at[part], COLUMN_LAYOUT)  # [N]
                lse += jnp.where(index < num_parts, 0.0, -jnp.inf)
                maximum, correction = raised(maximum, lse)
                weight = jnp.exp2(lse - maximum)
                denominator = denominator * correction + weight
                numerator = numerator * spread_columns(correction, values.shape)
                numerator += values * spread_columns(weight, values.shape)
            return State((numerator,), maximum, denominator)

        turns = lax.div(num_parts + (_UNROLL - 1), jnp.int32(_UNROLL))
        state = empty(problem.value_rows, problem.value_rows, problem.columns)
        state = lax.fori_loop(0, turns, some_parts, state)
        result = finish(problem, state, inputs.sinks, item.head)
        write(problem, result, item, outputs, staged)
        plgpu.wait_smem_to_gmem(0)
