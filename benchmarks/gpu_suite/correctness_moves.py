"""Writes, copies and swaps of blocks, equal bit for bit to the references', poison included.

But for quantising, which may round otherwise: one in a hundred numbers, by one step.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_suite.repeated import Arrays, Problem, Results, differing_bytes
from benchmarks.gpu_suite.stage import Program, Row
from pallas_paged import (
    KVCache,
    StaticScales,
    copy_blocks,
    gather_blocks,
    rotate_and_write,
    scatter_blocks,
    write_kv,
)
from pallas_paged.kv_cache import to_stored
from pallas_paged.ops.rotary import rotate
from pallas_paged.quantisation import LARGEST, is_quantised


def _cache_first(*arguments: Any, **options: Any) -> tuple[KVCache, jax.Array]:
    q, cache = rotate_and_write(*arguments, **options)
    return cache, q


FUNCTIONS: dict[str, Any] = {
    "write_kv": write_kv,
    "rotate_and_write": _cache_first,
    "copy_blocks": copy_blocks,
    "gather_blocks": gather_blocks,
    "scatter_blocks": scatter_blocks,
}


class Sizes(NamedTuple):
    """Of a cache, N, Hk, S and D, and how many blocks or tokens are moved."""

    num_blocks: int
    num_kv_heads: int
    block_size: int
    head_dim: int
    num_moved: int


FEW = Sizes(24, 2, 16, 64, num_moved=9)
MANY_BLOCKS = Sizes(140_001, 1, 2, 64, num_moved=70_000)
"""More blocks than an axis of a grid may have thread blocks: 65,535 on two of the three axes."""
MANY_TOKENS = Sizes(4_500, 2, 16, 64, num_moved=70_000)
GROUP = 4
"""Query heads per KV head, where there are queries."""
_MAX_ONE_BY_ONE = 100
"""Moves that the references make, for they make them one by one; more are made by index."""


def problem(
    operation: str,
    dtype: str,
    implementation: str,
    repeats: int,
    *,
    sizes: Sizes = FEW,
    padding: bool = False,
    is_static: bool = False,
    interpreted: bool = False,
) -> Problem:
    """Returns an operation as a problem.

    Args:
      operation: of `FUNCTIONS`.
      dtype: of the cache.
      implementation: of the operation.
      repeats: how often it runs.
      sizes: of the cache.
      padding: of `write_kv`: all slots are 0, and the cache must stay as it is.
      is_static: of writes: a quantised cache's scales are given.
      interpreted: whether it is interpreted.
    """
    kind = ", padding" * padding + ", static scales" * is_static
    return Problem(
        name=f"correctness: {operation}, {dtype}, {list(sizes)}{kind}",
        program=program(operation, dtype, implementation, sizes, is_static=is_static),
        make=functools.partial(make, operation, dtype, sizes, padding, is_static),
        judge=functools.partial(judge, operation, dtype),
        repeats=repeats,
        ignored=null_blocks(operation),
        interpreted=interpreted,
    )


def null_blocks(operation: str) -> int:
    """Returns how many leading blocks of a result may hold anything."""
    return 0 if operation == "gather_blocks" else 1


def program(
    operation: str,
    dtype: str,
    implementation: str,
    sizes: Sizes,
    donate: bool = False,
    *,
    is_static: bool = False,
) -> Program:
    """Returns an operation; the cache is donated only if `donate` says so."""
    arguments = shapes(operation, dtype, sizes)
    if is_static:
        arguments += jax.eval_shape(lambda: static_scales(dtype, sizes))
    which = [isinstance(argument, KVCache) for argument in arguments].index(True)
    return Program(
        name=f"{implementation} {operation}, {dtype}, {list(sizes)}"
        + ", in place" * donate
        + ", static scales" * is_static,
        function=functools.partial(
            function(operation, is_static=is_static), implementation=implementation
        ),
        arguments=lambda: arguments,
        donate=(which,) if donate else (),
    )


def function(operation: str, *, is_static: bool) -> Any:
    """Returns what runs; with static scales, of these two arrays as last arguments."""
    if not is_static:
        return FUNCTIONS[operation]

    def run(*arguments: Any, implementation: str) -> Any:
        *others, k, v = arguments
        return FUNCTIONS[operation](
            *others, implementation=implementation, static_scales=StaticScales(k, v)
        )

    return run


def static_scales(dtype: str, sizes: Sizes) -> tuple[jax.Array, jax.Array]:
    """Returns scales of keys and of values by which the largest numbers of most rows do not fit."""
    shares = jnp.linspace(0.5, 1.5, sizes.num_kv_heads, dtype=jnp.float32)
    k = shares / LARGEST[jnp.dtype(dtype)]
    return k, k[::-1]


def written_dtype(dtype: str) -> str:
    """Returns the dtype of keys that are written into a cache of `dtype`."""
    return "bfloat16" if is_quantised(dtype) else dtype


def shapes(operation: str, dtype: str, sizes: Sizes) -> tuple[Any, ...]:
    """Returns what `make` does as arguments, as shapes."""
    num_blocks, heads, size, dim, count = sizes
    ids = jax.ShapeDtypeStruct((count,), jnp.int32)

    def blocks(number: int) -> KVCache:
        kv: Any = jax.ShapeDtypeStruct((number, heads, size, dim), jnp.dtype(dtype))
        scale: Any = jax.ShapeDtypeStruct((number, heads, size), jnp.float32)
        return KVCache(kv, kv, scale, scale) if is_quantised(dtype) else KVCache(kv, kv)

    token = jax.ShapeDtypeStruct((count, heads, dim), jnp.dtype(written_dtype(dtype)))
    if operation == "write_kv":
        return token, token, blocks(num_blocks), ids
    if operation == "rotate_and_write":
        q = jax.ShapeDtypeStruct((count, GROUP * heads, dim), token.dtype)
        angle = jax.ShapeDtypeStruct((count, dim // 2), jnp.float32)
        return q, token, token, angle, angle, blocks(num_blocks), ids
    if operation == "copy_blocks":
        return blocks(num_blocks), ids, ids
    if operation == "gather_blocks":
        return blocks(num_blocks), ids
    return blocks(num_blocks), ids, blocks(count)


def make(
    operation: str, dtype: str, sizes: Sizes, padding: bool, is_static: bool = False
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments, and the cache afterwards or the blocks without null blocks."""
    arguments = arguments_of(operation, dtype, sizes)
    if is_static:
        arguments += static_scales(dtype, sizes)
    if padding:
        k, v, cache, slots = arguments
        arguments = k, v, cache, jnp.zeros_like(slots)
        right = cache
    elif sizes.num_moved <= _MAX_ONE_BY_ONE:
        run = function(operation, is_static=is_static)
        right = run(*arguments, implementation="reference")
    else:
        right = by_index(operation, *arguments)
    first = null_blocks(operation)
    leaves = [np.asarray(leaf)[first:] for leaf in jax.tree.leaves(right)]
    return arguments, {f"expected {i}": leaf for i, leaf in enumerate(leaves)}


def arguments_of(operation: str, dtype: str, sizes: Sizes) -> tuple[Any, ...]:
    """Returns random arguments; what is not written is NaN and stays it.

    Numbers that are rotated, cosines and sines are such that nothing is rounded before it is cast.
    """
    rng = np.random.default_rng(0)
    num_blocks, heads, size, dim, count = sizes
    like = KVCache.zeros(1, heads, size, dim, dtype)

    def stored(*shape: int) -> KVCache:
        k, v = (rng.standard_normal((*shape, dim), np.float32) for _ in range(2))
        return to_stored(jnp.asarray(k), jnp.asarray(v), like)

    ids = 1 + rng.permutation(num_blocks - 1).astype(np.int32)
    cache = stored(num_blocks, heads, size)
    if not is_quantised(dtype):
        cache = jax.tree.map(lambda x: x.at[ids[count:]].set(jnp.nan), cache)
    if operation in ("write_kv", "rotate_and_write"):
        slots = size + rng.permutation((num_blocks - 1) * size)[:count].astype(np.int32)
        slots[-1] = 0  # padding
        k, v = (
            jnp.asarray(rng.standard_normal((count, heads, dim), np.float32), written_dtype(dtype))
            for _ in range(2)
        )
        if operation == "write_kv":
            return k, v, cache, jnp.asarray(slots)
        q, k = (
            jnp.asarray(rng.integers(-8, 9, (count, number, dim)), k.dtype)
            for number in (GROUP * heads, heads)
        )
        cos, sin = (
            jnp.asarray(rng.integers(-4, 5, (count, dim // 2)) / 4, jnp.float32) for _ in range(2)
        )
        return q, k, v, cos, sin, cache, jnp.asarray(slots)
    some = ids[:count].copy()
    if operation == "gather_blocks":
        return cache, jnp.asarray(some)
    others = ids[count : 2 * count].copy()
    some[0] = others[0] = 0  # padding
    if operation == "copy_blocks":
        return cache, jnp.asarray(some), jnp.asarray(others)
    return cache, jnp.asarray(some), stored(count, heads, size)


def by_index(operation: str, *arguments: Any) -> Any:
    """Returns what the reference would, of caches that are not quantised, by NumPy's indices."""
    if operation == "rotate_and_write":
        q, k, v, cos, sin, *rest = arguments
        return by_index("write_kv", rotate(k, cos, sin), v, *rest), rotate(q, cos, sin)
    if operation == "write_kv":
        *tokens, cache, slots = arguments
        block, offset = np.divmod(np.asarray(slots), cache.block_size)
        written = jax.tree.map(np.array, cache)
        for leaf, values in zip(jax.tree.leaves(written), tokens, strict=True):
            leaf[block, :, offset] = np.asarray(values)
        return written
    cache, ids, *rest = jax.tree.map(np.array, arguments)
    if operation == "gather_blocks":
        return jax.tree.map(lambda leaf: leaf[ids], cache)
    blocks = rest[0]
    if operation == "copy_blocks":
        ids, blocks = rest[0], jax.tree.map(lambda leaf: leaf[ids], cache)
    for leaf, values in zip(*map(jax.tree.leaves, (cache, blocks)), strict=True):
        leaf[ids] = values
    return cache


def judge(operation: str, dtype: str, arrays: Arrays, results: Results) -> Row:
    """Returns the bytes that differ, or the largest error of what was quantised."""
    right = [arrays[f"expected {i}"] for i in range(len(results))]
    if operation in ("write_kv", "rotate_and_write") and is_quantised(dtype):
        like: Any = KVCache
        row = judge_quantised(like(*right[:4]), like(*results[:4]))
        others = zip(right[4:], results[4:], strict=True)
        if differing := sum(differing_bytes(*pair) for pair in others):
            row["wrong"].append(f"{differing} bytes of the queries differ")
        return row
    differing = sum(differing_bytes(*pair) for pair in zip(right, results, strict=True))
    wrong = [f"{differing} bytes differ"] if differing else []
    return {"wrong": wrong, "error": float(differing), "tolerance": 0.0}


def judge_quantised(expected: KVCache, actual: KVCache) -> Row:
    """Returns the share of stored numbers that differ; wrong if one does by more than a step."""
    step = {"int8": 1.01 / 127, "float8_e4m3fn": 32.3 / 448}[str(expected.k.dtype)]
    differing, worst = 0.0, 0.0
    for name in ("k", "v"):
        one, other = (
            np.asarray(getattr(cache, name), np.float32)
            * np.asarray(getattr(cache, f"{name}_scale"))[..., None]
            for cache in (expected, actual)
        )
        largest = np.max(np.abs(one), axis=-1, keepdims=True, initial=1e-30)
        with np.errstate(invalid="ignore"):
            error = np.abs(one - other) / largest
        error = np.where((one == other) | (np.isnan(one) & np.isnan(other)), 0.0, error)
        error = np.where(np.isnan(error), np.inf, error)
        differing = max(differing, float(np.mean(error > 1e-5)))
        worst = max(worst, float(np.max(error)))
    verdicts = {
        f"{differing:.3%} of the numbers differ": differing <= 0.01,
        f"a number differs by {worst:.3g} of its row's largest, more than a step": worst <= step,
    }
    return {
        "wrong": [what for what, is_right in verdicts.items() if not is_right],
        "error": worst,
        "tolerance": step,
        "differing_share": differing,
    }
