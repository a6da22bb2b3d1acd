"""Block copy, gather and scatter: XLA against the reference, in place, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_paged import KVCache, copy_blocks, gather_blocks, scatter_blocks
from tests.kernels.in_place import assert_donated, assert_updates_in_place

IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["reference", "xla"])


def make_cache(num_blocks=200, dtype="float32", v_head_dim=None):
    rng = np.random.default_rng(0)
    empty = jax.eval_shape(
        lambda: KVCache.zeros(num_blocks, 2, 8, 16, dtype, v_head_dim=v_head_dim)
    )
    return jax.tree.map(
        lambda array: jnp.asarray(8 * rng.standard_normal(array.shape), array.dtype), empty
    )


def ints(*values):
    return jnp.array(values, jnp.int32)


def assert_equal(actual, expected):
    for array, other in zip(jax.tree.leaves(actual), expected, strict=True):
        np.testing.assert_array_equal(array, other)


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize(
    ("src", "dst"),
    [
        ((3, 3, 9), (5, 6, 7)),
        (tuple(range(1, 40)), tuple(range(41, 80))),
        ((4, 0, 0), (8, 0, 0)),
    ],
    ids=["one-source-twice", "many", "padded"],
)
def test_copy_makes_destinations_equal_to_sources(implementation, dtype, src, dst):
    cache = make_cache(dtype=dtype)
    expected = [np.array(array) for array in jax.tree.leaves(cache)]
    for array in expected:
        array[list(dst)] = array[list(src)]
    copied = copy_blocks(cache, ints(*src), ints(*dst), implementation=implementation)
    assert_equal(copied, expected)


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", ["float32", "float8_e4m3fn"])
def test_gather_takes_copies_in_order(implementation, dtype):
    cache = make_cache(dtype=dtype)
    ids = (9, 2, 2, 0)
    blocks = gather_blocks(cache, ints(*ids), implementation=implementation)
    assert_equal(blocks, (np.asarray(array)[list(ids)] for array in jax.tree.leaves(cache)))
    assert not cache.k.is_deleted()


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_scatter_puts_gathered_blocks_elsewhere(implementation, dtype):
    cache = make_cache(dtype=dtype)
    expected = [np.array(array) for array in jax.tree.leaves(cache)]
    for array in expected:
        array[[20, 3]] = array[[9, 2]]
    blocks = gather_blocks(cache, ints(9, 2, 0, 0), implementation=implementation)
    restored = scatter_blocks(cache, ints(20, 3, 0, 0), blocks, implementation=implementation)
    assert_equal(restored, expected)


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_values_of_another_width_than_the_keys(implementation, dtype):
    cache = make_cache(dtype=dtype, v_head_dim=24)
    expected = [np.array(array) for array in jax.tree.leaves(cache)]
    for array in expected:
        array[[5, 6]] = array[[3, 9]]
    cache = copy_blocks(cache, ints(3, 0), ints(5, 0), implementation=implementation)
    blocks = gather_blocks(cache, ints(9, 0), implementation=implementation)
    cache = scatter_blocks(cache, ints(6, 0), blocks, implementation=implementation)
    assert cache.v.shape == (200, 2, 8, 24)
    assert_equal(cache, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
def test_caches_are_updated_in_place(dtype):
    cache = make_cache(dtype=dtype)
    src, dst = ints(1, 2, 3, 0), ints(4, 5, 6, 0)
    assert_updates_in_place(copy_blocks, cache, src, dst)
    copied = copy_blocks(cache, src, dst)
    assert_donated(cache, copied)
    blocks = gather_blocks(copied, src)
    assert_updates_in_place(scatter_blocks, copied, dst, blocks)
    assert_donated(copied, scatter_blocks(copied, dst, blocks))


@pytest.mark.usefixtures("unchecked_types")
def test_wrong_arguments():
    cache = make_cache()
    blocks = gather_blocks(cache, ints(1, 2))
    with pytest.raises(ValueError, match=r"dst is int32\[1\]; src and dst must be int32\[P\]"):
        copy_blocks(cache, ints(1, 2), ints(1))
    with pytest.raises(ValueError, match=r"src is float32\[2\]"):
        copy_blocks(cache, jnp.ones(2, jnp.float32), ints(1, 2))
    with pytest.raises(ValueError, match=r"block_ids is int32\[1, 2\], must be int32\[P\]"):
        gather_blocks(cache, ints(1, 2)[None])
    with pytest.raises(ValueError, match=r"blocks.k is float32\[2, 2, 8, 16\], must be float32\[3"):
        scatter_blocks(cache, ints(1, 2, 3), blocks)
    with pytest.raises(ValueError, match=r"blocks.v is bfloat16.* for 2 blocks of this cache"):
        scatter_blocks(cache, ints(1, 2), KVCache(blocks.k, blocks.v.astype(jnp.bfloat16)))
    quantised = make_cache(dtype="int8")
    with pytest.raises(ValueError, match=r"blocks.k_scale must be given if, and only if"):
        scatter_blocks(quantised, ints(1, 2), KVCache(quantised.k[:2], quantised.v[:2]))
