"""What the Mosaic GPU kernels on the cache have in common: moves of rows and blocks.

None of them computes more than a rounding, so each is bound by memory: data goes through registers
in contiguous vectors of up to 16 bytes per thread, many small thread blocks hide the latency, and
nothing is staged in shared memory. The same code compiles for every family of kernels.

`load` and `store` are the attention kernels' too.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.dispatch import compute_capability, unsupported_target
from pallas_paged.kv_cache import KVCache

Ref = Any
"""A reference to an array inside a kernel, or to a part of one."""

_THREADS = 128
_WARP = 32
_PIECE_BYTES = 8192
_MAX_PIECES = 8


def layout_of_rows(num_rows: int, row: int) -> Any:
    """Returns a layout of [num_rows, row] numbers, each row in one warp and every 4th in the same.

    Where `num_rows` is 1, it is one of [row] numbers, of which every warp has a copy. `row` must be
    a multiple of 32. A maximum over a row is a few shuffles, and an access a contiguous segment.
    """
    vector = next(v for v in (4, 2, 1) if row % (v * _WARP) == 0)
    if num_rows == 1:
        tiling = plgpu.Tiling(((_WARP * vector,), (vector,)))
        return plgpu.Layout.TILED(tiling, (plgpu.Replicated(4),), (-2,), -1)
    assert num_rows % 4 == 0, num_rows
    tiling = plgpu.Tiling(((4, _WARP * vector), (vector,)))
    return plgpu.Layout.TILED(tiling, (-3,), (-2,), -1)


def load(source: Ref, layout: Any = None) -> jax.Array:
    """Returns what lies in global memory at `source`, whether or not it fills 128-byte lines."""
    return plgpu.load(source, layout=layout, optimized=False)


def store(destination: Ref, value: jax.Array) -> None:
    """Writes to global memory, whether or not `value` fills 128-byte lines."""
    if hasattr(plgpu, "store"):  # since jax 0.12, which by default refuses what does not fill them
        plgpu.store(destination, value, optimized=False)
    else:
        destination[...] = value


def unsupported_cache(kv_cache: KVCache) -> str | None:
    """Returns why these kernels cannot move blocks of this cache here, or None if they can."""
    numbers = kv_cache.k.size // kv_cache.k.shape[0]
    if numbers % _THREADS:
        return f"a block holds {numbers} numbers per array, not a multiple of {_THREADS}"
    return unsupported_target()


def unsupported_cast(dtype: Any) -> str | None:
    """Returns why kernels cannot round to `dtype` on the target device, or None if they can.

    Of a device for which `unsupported_target` has no reason.
    """
    capability = compute_capability()
    if dtype != jnp.float8_e4m3fn or capability >= (8, 9):
        return None
    major, minor = capability
    return f"compute capability {major}.{minor} has no instruction that rounds to {dtype}"


def flat(kv_cache: KVCache) -> list[jax.Array]:
    """Returns the arrays of a cache as [N, numbers of a block]."""
    return [array.reshape(array.shape[0], -1) for array in jax.tree.leaves(kv_cache)]


def unflat(arrays: list[jax.Array], like: KVCache) -> KVCache:
    """Returns such arrays in the shapes of `like`'s, with as many blocks as they have."""
    leaves, tree = jax.tree.flatten(like)
    shaped = [a.reshape(-1, *leaf.shape[1:]) for a, leaf in zip(arrays, leaves, strict=True)]
    return jax.tree.unflatten(tree, shaped)


def num_pieces(blocks: jax.Array) -> int:
    """Returns among how many thread blocks one block of [N, numbers of a block] is divided."""
    block_bytes = blocks.shape[1] * blocks.dtype.itemsize
    return max(1, min(_MAX_PIECES, block_bytes // _PIECE_BYTES))


def move_block(
    source: Ref, source_block: jax.Array, destination: Ref, destination_block: jax.Array
) -> None:
    """Copies one block between arrays [N, numbers of a block]; in a kernel with an axis "piece".

    The thread blocks along that axis share the work.
    """
    numbers = source.shape[1]
    layout, piece = None, 1
    if numbers % _THREADS == 0:
        most = _PIECE_BYTES // source.dtype.itemsize // _THREADS
        piece = _THREADS * next(m for m in range(most, 0, -1) if numbers % (m * _THREADS) == 0)
    elif numbers % _WARP == 0:
        layout, piece = layout_of_rows(1, _WARP), _WARP

    first, step = jax.lax.axis_index("piece"), jax.lax.axis_size("piece")

    @pl.loop(first, numbers // piece, step=step)
    def _(i: jax.Array) -> None:
        if piece == 1:  # scales of few KV heads and tokens
            destination[destination_block, i] = source[source_block, i]
        else:
            at = pl.ds(i * piece, piece)
            store(destination.at[destination_block, at], load(source.at[source_block, at], layout))
