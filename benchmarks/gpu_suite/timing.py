"""Times a piece of device work by running it many times inside one program.

The work's result is its next input, so that nothing can be left out or moved out of the loop, and
the loop's length is a constant, so that the host is not asked between its turns.
"""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

L2_BYTES = 60 * 2**20
"""The largest cache of the GPUs aimed at; what is rotated is twice as large."""


def num_copies(num_bytes: int, limit: int) -> int:
    """Returns how many copies of data of `num_bytes` bytes must take turns to miss the cache."""
    return max(1, min(limit, math.ceil(2 * L2_BYTES / num_bytes)))


def num_turns(estimate_s: float, target_s: float = 0.02) -> int:
    """Returns how many turns make a loop of about `target_s`, for work that takes `estimate_s`."""
    return max(2, min(1000, round(target_s / estimate_s)))


def seconds_per_turn(
    work: Callable[..., Any], state: Any, *operands: Any, turns: int, repeats: int = 5
) -> float:
    """Returns the median seconds of one turn of `state = work(turn, state, *operands)`.

    Args:
      work: the work; `turn` is an i32 scalar.
      state: arrays; a program's result, never donated.
      *operands: arrays that it reads.
      turns: turns of a loop.
      repeats: how often the loop is timed, after it ran once.
    """

    @jax.jit
    def loop(state: Any, *operands: Any) -> Any:
        return jax.lax.fori_loop(
            0,
            turns,
            lambda turn, state: work(jnp.asarray(turn, jnp.int32), state, *operands),
            state,
        )

    compiled = loop.lower(state, *operands).compile()
    jax.block_until_ready(compiled(state, *operands))
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(compiled(state, *operands))
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds) / turns


def random(seed: int, shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> jax.Array:
    """Returns standard-normal numbers, made on the device."""
    make = jax.jit(lambda key: jax.random.normal(key, shape, dtype))
    return make(jax.random.key(seed))
