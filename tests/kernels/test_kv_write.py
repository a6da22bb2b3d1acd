"""Write of keys and values: XLA against the reference, in place, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_paged import KVCache, write_kv
from tests.kernels.in_place import assert_donated, assert_updates_in_place

NUM_BLOCKS, KV_HEADS, SIZE, DIM = 300, 2, 8, 16


def arguments(dtype, cache_dtype, num_tokens=13, num_padded=3):
    """Tokens for shuffled slots; padding tokens are NaN and go to the null block."""
    rng = np.random.default_rng(0)
    shape = (num_tokens + num_padded, KV_HEADS, DIM)
    k, v = (rng.standard_normal(shape, np.float32) for _ in range(2))
    k[num_tokens:] = v[num_tokens:] = np.nan
    slots = rng.permutation(np.arange(SIZE, 5 * SIZE))[:num_tokens]
    slots = np.append(slots, np.arange(num_padded) % 2).astype(np.int32)
    shape = (NUM_BLOCKS, KV_HEADS, SIZE, DIM)
    cache = KVCache(*(jnp.asarray(rng.standard_normal(shape), cache_dtype) for _ in range(2)))
    return jnp.asarray(k, dtype), jnp.asarray(v, dtype), cache, jnp.asarray(slots)


@pytest.mark.parametrize(
    ("dtype", "cache_dtype"),
    [("float32", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16")],
)
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_each_token_lands_in_its_slot(implementation, dtype, cache_dtype):
    k, v, cache, slots = arguments(dtype, cache_dtype)
    expected = [np.array(array) for array in jax.tree.leaves(cache)]
    for token in range(13):
        block, offset = divmod(int(slots[token]), SIZE)
        expected[0][block, :, offset] = np.asarray(k[token].astype(cache_dtype))
        expected[1][block, :, offset] = np.asarray(v[token].astype(cache_dtype))
    written = write_kv(k, v, cache, slots, implementation=implementation)
    for array, expected_array in zip(jax.tree.leaves(written), expected, strict=True):
        assert array.dtype == cache_dtype
        np.testing.assert_array_equal(array[1:], expected_array[1:])  # all but the null block


@pytest.mark.parametrize("cache_dtype", ["float32", "int8"])
@pytest.mark.parametrize("width", [8, 24])
def test_values_of_another_width_than_the_keys(width, cache_dtype):
    k, v, _, slots = arguments("float32", "float32")
    v = jnp.concatenate([v, v], axis=2)[:, :, :width]

    def write(implementation):
        cache = KVCache.zeros(NUM_BLOCKS, KV_HEADS, SIZE, DIM, cache_dtype, v_head_dim=width)
        return write_kv(k, v, cache, slots, implementation=implementation)

    written, expected = write("xla"), write("reference")
    assert written.v.shape == (NUM_BLOCKS, KV_HEADS, SIZE, width)
    for array, other in zip(jax.tree.leaves(written), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(array[1:], other[1:])
    with pytest.raises(
        NotImplementedError, match=f"head_dim=16 of the keys is not the values' {width}"
    ):
        write("mosaic_gpu")


@pytest.mark.parametrize("cache_dtype", ["float32", "bfloat16", "float16"])
def test_cache_is_updated_in_place(cache_dtype):
    k, v, cache, slots = arguments("float32", cache_dtype)
    assert_updates_in_place(
        lambda cache, *args: write_kv(*args[:2], cache, args[2]), cache, k, v, slots
    )
    assert_donated(cache, write_kv(k, v, cache, slots))


def test_scan_carries_the_cache_in_place():
    k, v, cache, slots = arguments("float32", "float32")

    def write_all(cache, k, v, slots):
        def one(cache, token):
            return write_kv(*(array[None] for array in token[:2]), cache, token[2][None]), None

        return jax.lax.scan(one, cache, (k, v, slots))[0]

    assert_updates_in_place(write_all, cache, k, v, slots)
    written = jax.jit(write_all, donate_argnums=0)(cache, k, v, slots)
    expected = write_kv(*arguments("float32", "float32"), implementation="reference")
    np.testing.assert_array_equal(written.k[1:], expected.k[1:])


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, jnp.ones((16, 3, DIM)), r"k.shape=\(16, 3, 16\) must be \(16, 2, 16\)"),
        (1, jnp.ones((15, KV_HEADS, DIM)), r"v.shape=\(15, 2, 16\)"),
        (1, jnp.ones((16, KV_HEADS, 8)), r"v.shape=\(16, 2, 8\).*kv_cache.v.shape=\(300, 2, 8, 16"),
        (2, KVCache(jnp.ones((4, 2, 8)), jnp.ones((4, 2, 8))), r"kv_cache.k.shape=\(4, 2, 8\)"),
        (3, jnp.ones(16, jnp.float32), "slot_mapping.dtype=float32 must be int32"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_wrong_arguments(position, value, message):
    values = list(arguments("float32", "float32"))
    values[position] = value
    with pytest.raises(ValueError, match=message):
        write_kv(*values)
    with pytest.raises(NotImplementedError, match="write_kv: 'mosaic_gpu' cannot do this: head_di"):
        write_kv(*arguments("float32", "float32"), implementation="mosaic_gpu")
