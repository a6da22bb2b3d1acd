"""Times a piece of device work by running it many times inside one program.

The work's result is its next input, so that nothing can be left out or moved out of the loop, and
the loop's length is a constant, so that the host is not asked between its turns.
"""

import concurrent.futures
import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

L2_BYTES = 60 * 2**20
"""The largest cache of the GPUs aimed at; what is rotated is twice as large."""


class Loop(NamedTuple):
    """Work to be timed.

    Attributes:
      work: `state = work(turn, state, *operands)`; `turn` is an i32 scalar.
      make: returns `(state, *operands)`, arrays; called when the work is timed, not before.
      turns: turns of the loop.
      repeats: how often the loop is timed, after it ran once.
      calls: how many pieces of work a turn is; figures are per piece.
    """

    work: Callable[..., Any]
    make: Callable[[], tuple[Any, ...]]
    turns: int
    repeats: int = 5
    calls: int = 1

    def lower(self) -> jax.stages.Lowered:
        """Traces the loop; makes no arrays."""

        def loop(state: Any, *operands: Any) -> Any:
            def turn(i: jax.Array, state: Any) -> Any:
                return self.work(jnp.asarray(i, jnp.int32), state, *operands)

            return jax.lax.fori_loop(0, self.turns, turn, state)

        return jax.jit(loop).lower(*jax.eval_shape(self.make))

    def seconds(self, compiled: Callable[..., Any]) -> float:
        """Returns the median seconds of one piece of work in the compiled loop."""
        arrays = self.make()
        jax.block_until_ready(compiled(*arrays))
        seconds = []
        for _ in range(self.repeats):
            begin = time.perf_counter()
            jax.block_until_ready(compiled(*arrays))
            seconds.append(time.perf_counter() - begin)
        return statistics.median(seconds) / self.turns / self.calls


def microseconds(
    loops: Mapping[str, Callable[[], Loop]], same_program: Mapping[str, str] | None = None
) -> dict[str, float | Exception]:
    """Returns each loop's microseconds per piece of work, or what it raised instead.

    All are compiled side by side, then timed one after the other, alone in the device's memory.

    Args:
      loops: functions that return them, by name.
      same_program: names of loops to the names of those that they differ from in their arrays only.
    """
    made: dict[str, Any] = {name: _tried(make) for name, make in loops.items()}
    program_of = {name: (same_program or {}).get(name, name) for name in loops}
    lowered = {
        name: _tried(made[name].lower)
        for name in set(program_of.values())
        if isinstance(made[name], Loop)
    }
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        compiling = {
            name: pool.submit(_tried, program.compile)
            for name, program in lowered.items()
            if not isinstance(program, Exception)
        }
        programs = {name: future.result() for name, future in compiling.items()}
    programs = made | lowered | programs
    results: dict[str, float | Exception] = {}
    for name, loop in made.items():
        failed = [x for x in (loop, programs[program_of[name]]) if isinstance(x, Exception)]
        if failed:
            results[name] = failed[0]
            continue
        seconds = _tried(functools.partial(loop.seconds, programs[program_of[name]]))
        results[name] = seconds if isinstance(seconds, Exception) else 1e6 * seconds
    return results


def _tried(function: Callable[[], Any]) -> Any:
    """Returns what the function returns, or the exception that it raises."""
    try:
        return function()
    except Exception as error:
        return error


def num_copies(num_bytes: int, limit: int) -> int:
    """Returns how many copies of data of `num_bytes` bytes must take turns to miss the cache."""
    return max(1, min(limit, math.ceil(2 * L2_BYTES / num_bytes)))


def num_turns(estimate_s: float, target_s: float = 0.02) -> int:
    """Returns how many turns make a loop of about `target_s`, for work that takes `estimate_s`."""
    return max(2, min(1000, round(target_s / estimate_s)))


def random(seed: int, shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> jax.Array:
    """Returns standard-normal numbers, made on the device."""
    return _normal(jax.random.key(seed), shape, jnp.dtype(dtype))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    return jax.random.normal(key, shape, dtype)
