"""Times a piece of device work by running it many times inside one program.

The work's result is part of its next input, so that nothing can be left out or moved out of the
loop, and the loop's length is a constant, so that the host is not asked between its turns.

What the loops read is described first (`Normal`, `Host`) and made when a case runs: by programs
that are compiled ahead like the loops themselves, a few shapes in all.
"""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_suite import programs
from benchmarks.gpu_suite.programs import Loaded
from benchmarks.gpu_suite.stage import Context, Program, Row
from pallas_paged import KVCache

L2_BYTES = 60 * 2**20
"""The largest cache of the GPUs aimed at; what is rotated is twice as large."""
REPEATS = 5
"""How often a loop is timed, after it ran once."""


@dataclasses.dataclass(frozen=True)
class Normal:
    """An array of normal numbers, drawn on the device.

    Attributes:
      seed: of the numbers; arrays of one shape and dtype are drawn by the same program.
      shape: of the array.
      scale: their standard deviation.
      dtype: of the array.
    """

    seed: int
    shape: tuple[int, ...]
    scale: float = 1.0
    dtype: str = "bfloat16"

    @property
    def program(self) -> Program:
        """Draws them from a seed, u32[], and the standard deviation, f32[]."""
        shape, dtype = self.shape, jnp.dtype(self.dtype)

        def draw(seed: jax.Array, scale: jax.Array) -> jax.Array:
            return (scale * normal_numbers(seed, math.prod(shape))).reshape(shape).astype(dtype)

        def scalars() -> tuple[jax.ShapeDtypeStruct, ...]:
            return jax.ShapeDtypeStruct((), jnp.uint32), jax.ShapeDtypeStruct((), jnp.float32)

        return Program(f"normal {self.dtype} {' x '.join(map(str, shape))}", draw, scalars)


@dataclasses.dataclass(frozen=True)
class Host:
    """An array that the host makes.

    Attributes:
      make: returns it, of this shape and dtype.
      shape: of the array.
      dtype: of the array.
    """

    make: Callable[[], np.ndarray]
    shape: tuple[int, ...]
    dtype: str = "int32"


def normal_numbers(seed: jax.Array, count: int) -> jax.Array:
    """Returns f32[count], for which Box and Muller's formula turns a hash of the index.

    `jax.random.normal` takes a compiler ten times as long.
    """
    index = jax.lax.iota(jnp.uint32, count)
    bits = _mixed(index ^ _mixed(seed + jnp.uint32(0x9E3779B9)))
    radius = jnp.sqrt(-2 * jnp.log(((bits >> 16).astype(jnp.float32) + 0.5) / 65536))
    return radius * jnp.cos((bits & 0xFFFF).astype(jnp.float32) * jnp.float32(2 * math.pi / 65536))


def _mixed(x: jax.Array) -> jax.Array:
    """Returns the integer hash `lowbias32` of u32 (Wellons, hash-prospector)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


def abstract(description: Any) -> Any:
    """Returns the shapes and dtypes of a pytree of `Normal` and `Host`."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(x.dtype)), description)


def drawn_by(description: Any) -> tuple[Program, ...]:
    """Returns the programs that draw what is described."""
    leaves = [x for x in jax.tree.leaves(description) if isinstance(x, Normal)]
    return unique(x.program for x in leaves)


def make(description: Any, context: Context) -> Any:
    """Returns what is described, on the device."""
    loaded: dict[str, Loaded] = {}

    def one(leaf: Normal | Host) -> jax.Array:
        if isinstance(leaf, Host):
            made = np.asarray(leaf.make(), jnp.dtype(leaf.dtype))
            assert made.shape == leaf.shape, f"{made.shape} made, {leaf.shape} said"
            return jax.device_put(made)
        program = leaf.program
        if program.name not in loaded:
            loaded[program.name] = programs.load(program, context)
        (array,) = loaded[program.name](np.uint32(leaf.seed), np.float32(leaf.scale))
        return array

    return jax.tree.map(one, description)


def unique(some: Any) -> tuple[Program, ...]:
    """Returns the programs, each name once."""
    return tuple({program.name: program for program in some}.values())


class Loop(NamedTuple):
    """Work to be timed.

    Attributes:
      name: determines the work and the shapes that it is called with.
      work: `state = work(turn, state, *operands)`; `turn` is an i32 scalar that counts down to 0,
        so that the last turn is the same one however many there are.
      operands: describes `(state, *operands)`, see `make`.
      turns: turns of the loop.
      in_place: whether the state is donated, and what a call returns is the next one's.
    """

    name: str
    work: Callable[..., Any]
    operands: tuple[Any, ...]
    turns: int
    in_place: bool = False

    @property
    def program(self) -> Program:
        """The loop, of the state and the operands to the state."""
        return Program(
            f"{self.name}, {self.turns} turns",
            self._run,
            lambda: abstract(self.operands),
            donate=(0,) if self.in_place else (),
        )

    def _run(self, state: Any, *operands: Any) -> Any:
        def turn(i: jax.Array, state: Any) -> Any:
            return self.work(jnp.asarray(self.turns - 1 - i, jnp.int32), state, *operands)

        return jax.lax.fori_loop(0, self.turns, turn, state)


class Timed(NamedTuple):
    """What came of loops.

    Attributes:
      seconds: of each loop, of each of its repeats, per turn.
      results: of each loop, the leaves of the state after the first call and after the last one, on
        the host.
    """

    seconds: list[list[float]]
    results: list[tuple[list[np.ndarray], list[np.ndarray]]]


def run(
    loops: Sequence[Loop], arrays: tuple[Any, ...], context: Context, repeats: int = REPEATS
) -> Timed:
    """Times loops over the same arrays in turn, so that what drifts meets all of them.

    Args:
      loops: whose programs are loaded.
      arrays: what their `operands` describe.
      context: of the run.
      repeats: how often each is timed.

    Raises:
      ValueError: a result is not finite, or nothing but one number.
    """
    assert len(loops) == 1 or not any(loop.in_place for loop in loops), "each needs its own state"
    loaded = [programs.load(loop.program, context) for loop in loops]
    state, operands = arrays[0], arrays[1:]
    first, last = [], []
    for loop, program in zip(loops, loaded, strict=True):
        result = jax.block_until_ready(program(state, *operands))
        first.append(checked(result))
        state = result if loop.in_place else state
    seconds: list[list[float]] = [[] for _ in loops]
    for repeat in range(repeats):
        for i, (loop, program) in enumerate(zip(loops, loaded, strict=True)):
            begin = time.perf_counter()
            result = jax.block_until_ready(program(state, *operands))
            seconds[i].append((time.perf_counter() - begin) / loop.turns)
            state = result if loop.in_place else state
            if repeat == repeats - 1:
                last.append(checked(result))
    return Timed(seconds, list(zip(first, last, strict=True)))


def checked(leaves: Sequence[jax.Array]) -> list[np.ndarray]:
    """Returns a result on the host; raises `ValueError` for one that cannot be right."""
    arrays = [np.array(leaf) for leaf in leaves]  # copied, for a CPU's would be views
    for array in arrays:
        wide = array if array.dtype.kind in "iu" else array.astype(np.float32)
        if not np.all(np.isfinite(wide)):
            raise ValueError(f"{np.sum(~np.isfinite(wide))} of {wide.size} numbers are not finite")
        if wide.size > 1 and np.all(wide == wide.flat[0]):
            raise ValueError(f"the whole result is {wide.flat[0]}")
    return arrays


def differing(some: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> int:
    """Returns how many bytes of two results differ."""
    bits = [
        [np.ascontiguousarray(x).view(np.uint8) for x in pair]
        for pair in zip(some, other, strict=True)
    ]
    return sum(int(np.sum(one != two)) for one, two in bits)


def spread(figures: Sequence[float]) -> float:
    """Returns how far repeats lie apart, the largest and the smallest of five or more left out."""
    ordered = sorted(figures)
    out = 1 if len(ordered) >= 5 else 0
    return ordered[len(ordered) - 1 - out] - ordered[out]


def figures(seconds: Sequence[float]) -> Row:
    """Returns the median microseconds of repeats, and their spread as a share of it."""
    us = 1e6 * statistics.median(seconds)
    return {"us": us, "noise": 1e6 * spread(seconds) / us}


def per_layer(few: Sequence[float], many: Sequence[float], layers: tuple[int, int]) -> Row:
    """Returns what one layer takes, and what a turn takes beside its layers.

    A turn of n layers takes `t(n) = plan + n * us`. A figure that is lost in the spread of the
    repeats is None, and `us_reason`, or `plan_us_reason`, has the numbers.

    Args:
      few: seconds per turn of `layers[0]` layers, one per repeat.
      many: likewise, of `layers[1]`; repeat i ran right after `few`'s.
      layers: how many.

    Returns:
      `us`, `plan_us`, `t{n}_us` of both, and `noise`, the spread of the repeats' differences as a
      share of the difference.
    """
    added = layers[1] - layers[0]
    low, high = (1e6 * statistics.median(seconds) for seconds in (few, many))
    us = (high - low) / added
    each = [1e6 * (b - a) / added for a, b in zip(few, many, strict=True)]
    plan = low - layers[0] * us
    plans = [1e6 * a - layers[0] * b for a, b in zip(few, each, strict=True)]
    row: Row = {
        "us": us,
        "plan_us": plan,
        "noise": spread(each) / abs(us) if us else None,
        f"t{layers[0]}_us": low,
        f"t{layers[1]}_us": high,
    }
    for name, figure, some in (("us", us, each), ("plan_us", plan, plans)):
        if row["us"] is None or figure <= spread(some):
            row[name] = None
            row[f"{name}_reason"] = f"{figure:.2f} us, and repeats spread {spread(some):.2f} us"
    return row


def num_copies(num_bytes: int, limit: int) -> int:
    """Returns how many copies of data of `num_bytes` bytes must take turns to miss the cache."""
    return max(1, min(limit, math.ceil(2 * L2_BYTES / num_bytes)))


def num_turns(estimate_s: float, target_s: float = 0.015) -> int:
    """Returns how many turns make a loop of about `target_s`, for work that takes `estimate_s`."""
    return max(1, min(500, round(target_s / estimate_s)))


def next_input(fresh: jax.Array, previous: jax.Array) -> jax.Array:
    """Returns `fresh`, of which XLA cannot know that the result before it changes nothing."""
    return fresh + previous * jnp.asarray(2.0**-20, fresh.dtype)


def zeros(shape: tuple[int, ...], dtype: str = "bfloat16") -> Host:
    """Describes zeros."""
    return Host(functools.partial(np.zeros, shape, jnp.dtype(dtype)), shape, dtype)


def normal_cache(seed: int, shape: tuple[int, ...], value_scale: float = 1.0) -> KVCache:
    """Describes keys and values."""
    k, v = Normal(seed, shape), Normal(seed + 1, shape, value_scale)
    return KVCache(k, v)  # type: ignore[arg-type]


def block_tables(
    shape: tuple[int, int, int], distinct: int, first: int, shuffled: bool = True
) -> Host:
    """Describes block tables [turns, B, M] over blocks `first` to `first + distinct * B * M`.

    After `distinct` turns the same blocks are read again.
    """
    return Host(functools.partial(_block_tables, shape, distinct, first, shuffled), shape)


def _block_tables(
    shape: tuple[int, int, int], distinct: int, first: int, shuffled: bool
) -> np.ndarray:
    ids = np.arange(first, first + distinct * shape[1] * shape[2], dtype=np.int32)
    if shuffled:
        np.random.default_rng(0).shuffle(ids)
    return np.resize(ids.reshape(distinct, *shape[1:]), shape)
