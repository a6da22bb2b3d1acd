"""Write of keys and values as one Mosaic GPU kernel: a thread block per token.

The cast or quantisation happens in registers, with each KV head's row in one warp, so that a row's
largest magnitude is a few shuffles away.

Another kernel also rotates keys, and the queries that belong to them: a thread block per token and
KV head. It reads the three where a model's merged projection has left them, side by side for each
KV head, so that nothing is launched in between.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.dispatch import unsupported_target
from pallas_paged.kv_cache import NULL_BLOCK, KVCache, StaticScales
from pallas_paged.ops.mosaic_gpu import Ref, layout_of_rows, load, store, unsupported_cast
from pallas_paged.ops.rotary import rotated_halves
from pallas_paged.quantisation import is_quantised, quantise, quantise_parts

_MAX_GROUP = 16
"""Query heads per KV head that are rotated at most; attention takes no more, either."""


def unsupported(k: jax.Array | jax.ShapeDtypeStruct, kv_cache: KVCache) -> str | None:
    """Returns why the kernel cannot write such keys into this cache here, or None if it can."""
    num_kv_heads, head_dim = k.shape[1:]
    is_strided = num_kv_heads * head_dim % 128 == 0 and not is_quantised(kv_cache.k.dtype)
    if head_dim % 32 and not is_strided:
        return f"head_dim={head_dim} of {kv_cache.k.dtype} is not a multiple of 32"
    reason = unsupported_target()
    return unsupported_cast(kv_cache.k.dtype) if reason is None else reason


@functools.partial(jax.jit, donate_argnames="kv_cache")
def write_kv(
    k: jax.Array,
    v: jax.Array,
    kv_cache: KVCache,
    slot_mapping: jax.Array,
    static_scales: StaticScales | None,
) -> KVCache:
    """Returns the cache with k and v written, in place. See `api.write_kv`.

    The null block is never written.
    """
    num_tokens, num_kv_heads, head_dim = k.shape
    if not num_tokens:
        return kv_cache
    block_size = kv_cache.block_size

    def write_token(k_ref: Ref, v_ref: Ref, slots: Ref, *refs: Ref) -> None:
        token = jax.lax.axis_index("token")
        block, offset = _place(slots, token, block_size)
        given, (k_cache, v_cache, *scales) = _split(refs, num_given)
        caches = (k_cache, v_cache), scales or (None, None), given

        @pl.when(block != NULL_BLOCK)
        def _() -> None:
            for x, cache, scale, static in zip((k_ref, v_ref), *caches, strict=True):
                write_one(x.at[token], cache, scale, static, block, offset)

    def write_one(
        x: Ref,
        cache: Ref,
        scale: Ref | None,
        static: Ref | None,
        block: jax.Array,
        offset: jax.Array,
    ) -> None:
        if head_dim % 32:
            _write_rows(load(x), cache.at[block, :, offset], None)
        elif num_kv_heads % 4 == 0:
            layout = layout_of_rows(num_kv_heads, head_dim)
            scales = None if scale is None else scale.at[block, :, offset]
            given = None if static is None else load(static, layout.reduce(1))
            _write_rows(load(x, layout), cache.at[block, :, offset], scales, given)
        else:

            @pl.loop(0, num_kv_heads)
            def _(head: jax.Array) -> None:
                scales = None if scale is None else scale.at[block, head, offset]
                row = load(x.at[head], layout_of_rows(1, head_dim))
                given = None if static is None else static[head]
                _write_rows(row, cache.at[block, head, offset], scales, given)

    num_given = len(static_scales or ())
    refs = jax.tree.map(jax.new_ref, kv_cache)
    kernel = plgpu.kernel(write_token, grid=(num_tokens,), grid_names=("token",))
    kernel(k, v, slot_mapping, *(static_scales or ()), *jax.tree.leaves(refs))
    return jax.tree.map(jax.freeze, refs)


def unsupported_rotation(
    q: jax.Array | jax.ShapeDtypeStruct,
    k: jax.Array | jax.ShapeDtypeStruct,
    kv_cache: KVCache,
) -> str | None:
    """Returns why the kernel cannot rotate such heads as it writes, or None if it can."""
    num_kv_heads, head_dim = k.shape[1:]
    if head_dim % 64:
        return f"head_dim={head_dim} is not a multiple of 64, whose halves fill a warp"
    if q.shape[1] > _MAX_GROUP * num_kv_heads:
        return f"{q.shape[1]} query heads for {num_kv_heads} KV heads, more than {_MAX_GROUP} each"
    return unsupported(k, kv_cache)


@functools.partial(jax.jit, donate_argnames="kv_cache")
def rotate_and_write(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    kv_cache: KVCache,
    slot_mapping: jax.Array,
    static_scales: StaticScales | None,
) -> tuple[jax.Array, KVCache]:
    """Returns the rotated queries and the cache, in place. See `api.rotate_and_write`.

    The null block is never written.
    """
    num_tokens, num_kv_heads, head_dim = k.shape
    if not num_tokens:
        return q, kv_cache
    group, half = q.shape[1] // num_kv_heads, head_dim // 2
    block_size, dtype = kv_cache.block_size, kv_cache.k.dtype
    # XLA sees through parts of one array that become whole again, and passes on that array.
    rows = jnp.concatenate([x.reshape(num_tokens, num_kv_heads, -1) for x in (q, k, v)], axis=2)
    rows = rows.reshape(num_tokens, num_kv_heads, group + 2, head_dim)
    halves = pl.ds(0, half), pl.ds(half, half)

    def rotated(x: Ref, cos: Ref, sin: Ref, num_rows: int) -> list[jax.Array]:
        """Returns both halves of rows of queries or of keys, rounded to the inputs' dtype."""
        layout = layout_of_rows(num_rows, half)
        first, second = (load(x.at[..., at], layout).astype(jnp.float32) for at in halves)
        angles = [
            load(angle, layout if num_rows == 1 else layout.reduce(0)) for angle in (cos, sin)
        ]
        if num_rows > 1:
            angles = [jax.lax.broadcast_in_dim(angle, first.shape, (1,)) for angle in angles]
        return [x.astype(q.dtype) for x in rotated_halves(first, second, *angles)]

    def store_halves(row: Ref, values: list[jax.Array]) -> None:
        for at, half_row in zip(halves, values, strict=True):
            _write_rows(half_row, row.at[..., at], None)

    def rotate_and_write_head(
        rows_ref: Ref, cos_ref: Ref, sin_ref: Ref, slots: Ref, *refs: Ref
    ) -> None:
        given, (*caches, q_out) = _split(refs, num_given)
        token, head = jax.lax.axis_index("token"), jax.lax.axis_index("head")
        cos, sin = cos_ref.at[token], sin_ref.at[token]
        x, out = rows_ref.at[token, head], q_out.at[token, head]
        for at, num_rows in _portions(group):
            store_halves(out.at[at], rotated(x.at[at], cos, sin, num_rows))
        block, offset = _place(slots, token, block_size)

        @pl.when(block != NULL_BLOCK)
        def _() -> None:
            k_cache, v_cache, *scales = (ref.at[block, head, offset] for ref in caches)
            k_scale, v_scale = scales or (None, None)
            k_given, v_given = (None if static is None else static[head] for static in given)
            keys = rotated(x.at[group], cos, sin, 1)
            if k_scale is not None:
                keys, scale = quantise_parts(keys, dtype, k_given)
                store(k_scale, scale)
            store_halves(k_cache, keys)
            value = load(x.at[group + 1], layout_of_rows(1, head_dim))
            _write_rows(value, v_cache, v_scale, v_given)

    num_given = len(static_scales or ())
    refs = jax.tree.map(jax.new_ref, kv_cache)
    kernel = plgpu.kernel(
        rotate_and_write_head,
        out_type=jax.ShapeDtypeStruct((num_tokens, num_kv_heads, group, head_dim), q.dtype),
        grid=(num_kv_heads, num_tokens),  # the last axis alone may exceed 65,535
        grid_names=("head", "token"),
    )
    out = kernel(rows, cos, sin, slot_mapping, *(static_scales or ()), *jax.tree.leaves(refs))
    return out.reshape(q.shape), jax.tree.map(jax.freeze, refs)


def _portions(num_rows: int) -> list[tuple[Any, int]]:
    """Returns indices that select all rows, one or four of them at a time, and how many each does.

    Four are one for each warp. The last four may include some of the ones before: they are written
    twice, and with the same.
    """
    if num_rows < 4:
        return [(row, 1) for row in range(num_rows)]
    starts = [*range(0, num_rows - 4, 4), num_rows - 4]
    return [(pl.ds(start, 4), 4) for start in starts]


def _split(
    refs: tuple[Ref, ...], num_given: int
) -> tuple[tuple[Ref | None, Ref | None], tuple[Ref, ...]]:
    """Returns the static scales of keys and values, None where none are given, and the rest."""
    k, v = refs[:num_given] or (None, None)
    return (k, v), refs[num_given:]


def _place(slots: Ref, token: jax.Array, block_size: int) -> tuple[jax.Array, jax.Array]:
    """Returns the block of a token's slot, and where the slot is in it."""
    return slots[token] // block_size, slots[token] % block_size


def _write_rows(
    x: jax.Array, cache: Ref, scales: Ref | None, given: jax.Array | None = None
) -> None:
    """Writes rows of numbers to where they are stored, with scales if they have any."""
    dtype = cache.dtype
    if scales is None:
        # By way of float32: not every pair of dtypes has a cast of its own.
        store(cache, x if x.dtype == dtype else x.astype(jnp.float32).astype(dtype))
    else:
        stored, scale = quantise(x, dtype, given)
        store(cache, stored)
        store(scales, scale)
