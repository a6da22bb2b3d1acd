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
    as_column,
    spread_columns,
)
from pallas_paged.ops.attention.online_softmax import COMPILER_PARAMS, State, raised
from pallas_paged.ops.attention.work_list import CtaField, Parts, WorkList
from pallas_paged.ops.mosaic_gpu import load

_CHUNK = 64
"""Rows of O^T that one CTA merges, the fewest that results are written by."""

_LOADS = 128
"""Parts that are loaded at a time, times columns: 64 registers of a thread for their values."""

_FEW = 4
"""Parts that are loaded at a time where there are no more: with many sequences there are two."""


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
    """Returns the results, written in place where an item was divided.

    With few sequences an item has many parts, and how long they take is the step's latency: the
    items are divided once more, over head_dim, and many parts are loaded at a time.
    """
    refs = jax.tree.map(jax.new_ref, outputs)
    plgpu.kernel(
        functools.partial(_merge_kernel, problem),
        out_type=(),
        scratch_types={"staged": results_scratch(problem, _CHUNK)},
        grid=(problem.value_rows // _CHUNK, work.ctas.shape[0]),
        grid_names=("chunk", "cta"),
        compiler_params=COMPILER_PARAMS,
        kernel_name="paged_decode_merge",
    )(Inputs(parts, work.sequences, work.ctas, sinks), refs)
    return Outputs(refs.out[...], refs.lse[...])


def _merge_kernel(
    problem: DecodeProblem, inputs: Inputs, outputs: Outputs, *, staged: Results
) -> None:
    """One CTA: some columns of the item that the decode kernel's CTA began and did not finish."""
    parts, ctas = inputs.parts, inputs.ctas
    cta, num_ctas = lax.axis_index("cta"), lax.axis_size("cta")
    chunk = lax.axis_index("chunk")
    last_part = ctas[cta, CtaField.LAST_PART]
    many = min(16, _LOADS // problem.columns)
    few = min(_FEW, many)

    @pl.when(last_part >= 0)
    def _() -> None:
        number = ctas[cta, CtaField.FIRST_ITEM] + ctas[cta, CtaField.NUM_ITEMS] - 1
        item = read_item(problem, inputs.sequences, number)
        num_parts = last_part - cta + 1

        def some_parts(first: jax.Array, count: int, state: State) -> State:
            # Loads that do not wait for each other; what is too much is the last part, weightless.
            values, lses = [], []
            for i in range(count):
                index = first + i
                part = jnp.where(index == 0, num_ctas + cta, jnp.minimum(cta + index, last_part))
                rows = parts.values.at[part, pl.ds(chunk * _CHUNK, _CHUNK)]
                values.append(load(rows, TILE_LAYOUT))  # [_CHUNK, N]
                lse = load(parts.lse.at[part], COLUMN_LAYOUT)  # [N]
                lses.append(lse + jnp.where(index < num_parts, 0.0, -jnp.inf))
            largest = functools.reduce(jnp.maximum, lses)
            maximum, correction = raised(state.maximum, largest, as_column)
            (numerator,), denominator = state.numerator, state.denominator * correction
            numerator = numerator * spread_columns(correction, numerator.shape)
            for some, lse in zip(values, lses, strict=True):
                weight = jnp.exp2(lse - maximum)
                denominator = denominator + weight
                numerator = numerator + some * spread_columns(weight, some.shape)
            return State((numerator,), maximum, denominator)

        # In turns of many, until few or none are left.
        turns = lax.div(num_parts - few + (many - 1), jnp.int32(many))
        rest = turns * many < num_parts
        state = empty(_CHUNK, _CHUNK, problem.columns)
        state = lax.fori_loop(0, turns, lambda i, state: some_parts(i * many, many, state), state)
        state = lax.cond(rest, lambda: some_parts(turns * many, few, state), lambda: state)
        result = finish(problem, state, inputs.sinks, item.head)
        for columns, is_here in _columns(problem, chunk):
            out = outputs._replace(out=outputs.out.at[:, columns])
            pl.when(is_here)(
                functools.partial(write, problem, result, item, out, staged, chunk == 0)
            )
        plgpu.wait_smem_to_gmem(0)


def _columns(problem: DecodeProblem, chunk: jax.Array) -> list[tuple[Any, Any]]:
    """Returns the columns of the output that a chunk may be, each with whether it is."""
    whole, rest = divmod(problem.head_dim, _CHUNK)
    columns: list[tuple[Any, Any]] = [(pl.ds(chunk * _CHUNK, _CHUNK), chunk < whole)]
    if rest:
        columns.append((pl.ds(whole * _CHUNK, rest), chunk == whole))
    return columns
