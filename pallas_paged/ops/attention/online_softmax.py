"""Online softmax in the Mosaic GPU kernels: base 2, float32, one tile of keys after the other.

Of each row of queries a kernel keeps the largest logit so far and, relative to it, the sum of the
weights and the weighted sum of the values (FlashAttention, arXiv 2205.14135). Logits are times
log2(e), so that a weight is one `exp2`.

A matrix in registers has the queries along one axis and the keys along the other; which is which
differs between kernels, and so do the layouts.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

LOG2E = math.log2(math.e)
LN2 = math.log(2)

LOWEST = -1e30
"""Below any logit and finite: exp2(-inf - LOWEST) is 0 where exp2(-inf + inf) would be NaN."""

COMPILER_PARAMS = plgpu.CompilerParams(approx_math=True)
"""Of kernels: `exp2` and its like are what the hardware has."""


class State(NamedTuple):
    """The keys so far."""

    numerator: tuple[jax.Array, ...]  # chunks of f32[rows, D], or transposed
    maximum: jax.Array  # f32[rows]
    denominator: jax.Array  # f32[rows]


def logits_factor(scale: float, cap: float | None) -> float:
    """Returns what products of queries and keys are multiplied by: for `exp2`, or for `capped`."""
    return scale * LOG2E if cap is None else scale * 2 * LOG2E / cap


def capped(logits: jax.Array, cap: float, *, few_registers: bool = False) -> jax.Array:
    """Returns cap * tanh(x / cap) for logits x, which are given times 2 log2(e) / cap.

    By way of tanh(y) = 1 - 2 / (exp(2 y) + 1): the hardware's own tanh has 11 bits. With
    `few_registers` the reciprocal is the square of that of a root, one instruction; a division is
    some, with registers of their own.
    """
    power = jnp.exp2(logits) + 1.0
    if not few_registers:
        return cap * LOG2E - (2 * cap * LOG2E) / power
    root = lax.rsqrt(power)
    return cap * LOG2E - (2 * cap * LOG2E) * (root * root)


def raised(
    maximum: jax.Array,
    largest: jax.Array,
    settled: Callable[[jax.Array], jax.Array] = lambda vector: vector,
) -> tuple[jax.Array, jax.Array]:
    """Returns the new maximum, and what everything relative to the old one is to be multiplied by.

    `settled`: as for `finished`.
    """
    new_maximum = settled(jnp.maximum(maximum, largest))
    return new_maximum, jnp.exp2(maximum - new_maximum)


def finished(
    state: State,
    sink: jax.Array | None,
    spread: Callable[[jax.Array, tuple[int, ...]], jax.Array],
    settled: Callable[[jax.Array], jax.Array] = lambda vector: vector,
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Returns (the numerator divided by the denominator, lse to the base 2), the sink included.

    Without any visible key they are 0 and -inf.

    Args:
      state: of all keys.
      sink: f32[rows], the logit that has no value, to the base e; or None.
      spread: from [rows] to a matrix of the shape of a chunk.
      settled: states the layout of [rows], where the compiler would search long for it.
    """
    numerator, maximum, denominator = state
    factor: Any = 1.0
    if sink is not None:
        sink = sink * LOG2E
        new_maximum, factor = raised(maximum, sink)
        denominator = denominator * factor + jnp.exp2(sink - new_maximum)
        maximum = new_maximum
    is_seen = denominator > 0
    factor = settled(jnp.where(is_seen, factor / denominator, 0.0))
    lse = settled(jnp.where(is_seen, maximum + jnp.log2(denominator), -jnp.inf))
    return tuple(some * spread(factor, some.shape) for some in numerator), lse


def across(per_row: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns one number per row, [M], as [M, width]."""
    return lax.broadcast_in_dim(per_row, shape, (0,))


def along(per_column: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns one number per column, [width], as [M, width]."""
    return lax.broadcast_in_dim(per_column, shape, (1,))
