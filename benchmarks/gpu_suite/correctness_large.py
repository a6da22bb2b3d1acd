"""The end of a cache whose keys alone, and whose values alone, are larger than 2^32 bytes.

All but a few blocks are poison. The few that are used are the last ones of the cache; those where
an offset of 32 bits would lead instead are poison. What a write changed is looked at in these
blocks, and numbers that are not poison are counted in all others.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.attention_cases.arguments import AttentionSpec, build
from benchmarks.gpu_suite import correctness_attention, correctness_moves, programs
from benchmarks.gpu_suite.correctness_cases import WRITES
from benchmarks.gpu_suite.correctness_moves import Sizes
from benchmarks.gpu_suite.repeated import Arrays, Results, keep, kept, same_bits, verdict
from benchmarks.gpu_suite.stage import Context, Program, Row
from pallas_paged import KVCache

NUM_BYTES = 9 * 2**29
"""4.5 GiB, of the keys and of the values each."""
FEW = 8
"""Blocks that are filled or looked at."""
_MOVED = Sizes(FEW, 8, 16, 128, num_moved=3)


class Large(NamedTuple):
    """One operation on the last blocks of a large cache.

    Attributes:
      name: of the file with the arrays.
      fill: makes the cache, of a few blocks and their ids.
      program: the operation; it takes the cache among its arguments.
      look: returns a few blocks of a cache, and how many numbers are not poison; None for what does
        not write.
      where: where the leaves of the cache begin among the leaves of `program`'s arguments.
      make: returns as arguments a few blocks, their ids and all other arguments of `program`; and
        by name what `judge` needs.
      judge: takes that and what `look` returns, or the result; as in `Problem`.
      repeats: how often the operation runs.
    """

    name: str
    fill: Program
    program: Program
    look: Program | None
    where: int
    make: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]
    judge: Callable[[Arrays, Results], Row]
    repeats: int

    @property
    def programs(self) -> tuple[Program, ...]:
        """All of them."""
        return tuple(p for p in (self.fill, self.program, self.look) if p is not None)


def attention(
    spec: AttentionSpec, implementation: str, repeats: int, num_bytes: int = NUM_BYTES
) -> Large:
    """Returns attention over the last blocks; `spec` must need at most `FEW`."""
    _, few, _, _, arrays = correctness_attention.shapes(spec)
    assert few.shape[0] == FEW, few.shape
    scale = arrays.get("k_scale")
    blocks = KVCache(few, few, scale, scale)
    num_blocks = _num_blocks(blocks, num_bytes)
    return Large(
        name=f"correctness: large {num_blocks}, {spec.name}",
        fill=_fill_program(blocks, num_blocks),
        program=_over_cache(correctness_attention.program(spec, implementation, num_blocks)),
        look=None,
        where=0,
        make=functools.partial(_make_attention, spec, num_blocks),
        judge=functools.partial(correctness_attention.judge, spec.dtype),
        repeats=repeats,
    )


def move(operation: str, implementation: str, repeats: int, num_bytes: int = NUM_BYTES) -> Large:
    """Returns an operation of `correctness_moves`, in bfloat16, on the last blocks."""
    dtype = "bfloat16"
    shapes = correctness_moves.shapes(operation, dtype, _MOVED)
    is_cache = [isinstance(shape, KVCache) for shape in shapes]
    where = is_cache.index(True)
    num_blocks = _num_blocks(shapes[where], num_bytes)
    writes = operation != "gather_blocks"
    sizes = _MOVED._replace(num_blocks=num_blocks)
    return Large(
        name=f"correctness: large {num_blocks}, {operation}",
        fill=_fill_program(shapes[where], num_blocks),
        program=correctness_moves.program(operation, dtype, implementation, sizes, donate=writes),
        look=_look_program(shapes[where], num_blocks) if writes else None,
        where=where,
        make=functools.partial(_make_move, operation, dtype, num_blocks, where),
        judge=_judge_look
        if writes
        else functools.partial(correctness_moves.judge, operation, dtype),
        repeats=repeats,
    )


def prepare(large: Large, context: Context) -> None:
    """Writes the arrays, unless they are there."""
    keep(large.name, large.make, context)


def run(large: Large, context: Context) -> Row:
    """Fills a cache and runs the operation on it, in place if it writes."""
    fill, operation, look = (
        None if program is None else programs.load(program, context)
        for program in (large.fill, large.program, large.look)
    )
    assert fill is not None
    assert operation is not None
    arguments, expected = kept(large.name, context)
    count = len(jax.tree.leaves(large.fill.arguments())) - 1
    blocks, ids, others = arguments[:count], arguments[count], arguments[count + 1 :]
    rest = [jax.device_put(argument) for argument in others]
    at = large.where
    cache = fill(*blocks, ids)
    first: Results = []
    differing = 0
    for _ in range(large.repeats):
        results = operation(*rest[:at], *cache, *rest[at:])
        if look is not None:
            cache = results[: len(cache)]
            results = look(*cache, ids)
        host = [np.asarray(leaf) for leaf in results]
        first = first or host
        differing += not same_bits(first, host)
    row = verdict(large.judge(expected, first), large.repeats, differing)
    return row | {"program": operation.source}


def far_ids(used: np.ndarray, num_blocks: int) -> np.ndarray:
    """Returns i32[FEW]: the ids, in a large cache, of blocks 0 to `FEW` - 1 of a small one.

    The null block stays; those that are used become the last ones, and the others those where
    offsets without their highest bit would lead.
    """
    last = num_blocks - 1 - np.arange(FEW)
    wrapped = last - num_blocks * 8 // 9  # 2^32 bytes of 4.5 GiB
    assert wrapped[-1] > 0, num_blocks
    is_used = np.zeros(FEW, bool)
    is_used[used] = True
    is_used[0] = False
    ids = np.zeros(FEW, np.int32)
    ids[is_used] = last[: is_used.sum()]
    others = ~is_used
    others[0] = False
    ids[others] = wrapped[: others.sum()]
    return ids


def _num_blocks(blocks: KVCache, num_bytes: int) -> int:
    return num_bytes // (int(np.prod(blocks.k.shape[1:])) * blocks.k.dtype.itemsize)


def _fill_program(blocks: KVCache, num_blocks: int) -> Program:
    ids = jax.ShapeDtypeStruct((FEW,), jnp.int32)
    return Program(
        name=f"large cache, {num_blocks} of {blocks.k.dtype}{list(blocks.k.shape[1:])}",
        function=functools.partial(_fill, num_blocks),
        arguments=lambda: (blocks, ids),
    )


def _fill(num_blocks: int, blocks: KVCache, ids: jax.Array) -> KVCache:
    """Returns a cache with a few blocks; others are NaN, and zero where the scale is NaN."""

    def fill(values: jax.Array) -> jax.Array:
        poison = jnp.nan if jnp.issubdtype(values.dtype, jnp.floating) else 0
        return jnp.full((num_blocks, *values.shape[1:]), poison, values.dtype).at[ids].set(values)

    return jax.tree.map(fill, blocks)


def _look_program(blocks: KVCache, num_blocks: int) -> Program:
    ids = jax.ShapeDtypeStruct((FEW,), jnp.int32)

    def whole(few: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((num_blocks, *few.shape[1:]), few.dtype)

    cache = jax.tree.map(whole, blocks)
    return Program(
        name=f"look at {num_blocks} of {blocks.k.dtype}{list(blocks.k.shape[1:])}",
        function=_look,
        arguments=lambda: (cache, ids),
    )


def _look(cache: KVCache, ids: jax.Array) -> list[jax.Array]:
    """Returns of each array a few blocks, then of each how many numbers are not NaN."""
    leaves = jax.tree.leaves(cache)
    return [
        *(leaf[ids] for leaf in leaves),
        *(jnp.sum(~jnp.isnan(leaf[1:]), dtype=jnp.int32) for leaf in leaves),
    ]


def _judge_look(arrays: Arrays, results: Results) -> Row:
    """Compares the few blocks without the null block, and the counts."""
    half = len(results) // 2
    blocks, counts = [leaf[1:] for leaf in results[:half]], results[half:]
    row = correctness_moves.judge("copy_blocks", "bfloat16", arrays, blocks)  # caches alone
    right = [np.asarray(arrays[f"expected {i}"], np.float32) for i in range(half)]
    stray = sum(
        int(count) - int(np.sum(~np.isnan(leaf))) for count, leaf in zip(counts, right, strict=True)
    )
    wrong = [f"{stray} numbers more than expected are not NaN in all"] if stray else []
    return row | {"wrong": [*row["wrong"], *wrong], "stray": stray}


def _over_cache(program: Program) -> Program:
    """Returns attention that takes the cache first, in one."""
    q, k, v, step, arrays = program.arguments()
    scales = (arrays.get("k_scale"), arrays.get("v_scale"))
    others = {name: array for name, array in arrays.items() if not name.endswith("_scale")}
    return program._replace(
        name=f"{program.name}, cache first",
        function=functools.partial(_attend, program.function),
        arguments=lambda: (KVCache(k, v, *scales), q, step, others),
    )


def _attend(
    attend: Callable[..., Any], cache: KVCache, q: Any, step: Any, arrays: dict[str, Any]
) -> Any:
    scales = {"k_scale": cache.k_scale, "v_scale": cache.v_scale}
    given = {name: scale for name, scale in scales.items() if scale is not None}
    return attend(q, cache.k, cache.v, step, arrays | given)


def _make_attention(spec: AttentionSpec, num_blocks: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    built = build(spec)
    q, k, v, step, arrays = correctness_attention.arguments_of(built)
    scales = [arrays.pop(name, None) for name in ("k_scale", "v_scale")]
    tables = np.asarray(step.block_tables)
    ids = far_ids(np.unique(tables), num_blocks)
    far = step._replace(block_tables=ids[tables])
    arguments = KVCache(k, v, *scales), ids, q, far, arrays
    return arguments, correctness_attention.expected(built)


def _make_move(
    operation: str, dtype: str, num_blocks: int, where: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    arguments, expected = correctness_moves.make(operation, dtype, _MOVED, padding=False)
    cache, others = arguments[where], [*arguments[:where], *arguments[where + 1 :]]
    used = [np.asarray(x) for x in others if getattr(x, "dtype", None) == jnp.int32]
    size = _MOVED.block_size if operation in WRITES else 1
    ids = far_ids(np.unique([array // size for array in used]), num_blocks)
    return (cache, ids, *(_moved(x, ids, size) for x in others)), expected


def _moved(argument: Any, ids: np.ndarray, size: int) -> Any:
    """Returns ids of blocks, or slots, in the large cache; whatever else as it is."""
    if getattr(argument, "dtype", None) != jnp.int32:
        return argument
    block, offset = np.divmod(np.asarray(argument), size)
    return (ids[block] * size + offset).astype(np.int32)
