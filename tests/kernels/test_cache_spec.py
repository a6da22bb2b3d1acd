"""What layers keep of the tokens: sizes, and what nothing can allocate yet."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_paged import CacheSpec, KVCache
from pallas_paged.cache_spec import BlockArray, common_window


@pytest.mark.parametrize("v_head_dim", [None, 24])
@pytest.mark.parametrize(
    ("dtype", "number_bytes", "scale_bytes"), [("bfloat16", 2, 0), ("int8", 1, 4)]
)
def test_attention(dtype, number_bytes, scale_bytes, v_head_dim):
    spec = CacheSpec.attention(3, 8, 16, dtype, v_head_dim=v_head_dim)
    width = 16 + (v_head_dim or 16)
    assert (spec.kind, spec.block_size, spec.sliding_window) == ("full_attention", 8, None)
    assert spec.block_bytes == 3 * 8 * (width * number_bytes + 2 * scale_bytes)
    zeros = KVCache.zeros(5, 3, 8, 16, dtype, v_head_dim=v_head_dim)
    assert spec.shapes(5) == jax.eval_shape(lambda: zeros)
    made = spec.zeros(5)
    assert made.v.shape == (5, 3, 8, v_head_dim or 16)
    for array, expected in zip(jax.tree.leaves(made), jax.tree.leaves(zeros), strict=True):
        np.testing.assert_array_equal(array, expected)
        assert array.dtype == expected.dtype


def test_layers_with_equal_caches_have_equal_specs():
    specs = [CacheSpec.attention(2, 8, 16, jnp.float32, sliding_window=w) for w in (4, 4, None)]
    assert [spec.kind for spec in specs] == ["sliding_window"] * 2 + ["full_attention"]
    assert len(set(specs)) == 2


LATENT = CacheSpec("latent", (BlockArray("latent", (16, 576), jnp.dtype(jnp.bfloat16)),), 16)
RECURRENT = CacheSpec("recurrent", (BlockArray("state", (8, 64), jnp.dtype(jnp.float32)),), None)


@pytest.mark.parametrize("spec", [LATENT, RECURRENT], ids=lambda spec: spec.kind)
def test_latent_and_recurrent_caches_can_be_said_and_not_made(spec):
    assert spec.arrays[0].num_bytes in (16 * 576 * 2, 8 * 64 * 4)
    for ask in (lambda: spec.shapes(5), lambda: spec.zeros(5), lambda: spec.block_bytes):
        with pytest.raises(NotImplementedError, match=f"a '{spec.kind}' cache: the pool has"):
            ask()


def test_kinds_that_do_not_fit():
    with pytest.raises(ValueError, match="block_size=8 of a 'recurrent' cache"):
        CacheSpec("recurrent", RECURRENT.arrays, 8)
    with pytest.raises(ValueError, match="block_size=None of a 'latent' cache"):
        CacheSpec("latent", LATENT.arrays, None)
    with pytest.raises(ValueError, match="sliding_window=None of a 'sliding_window' cache"):
        CacheSpec("sliding_window", LATENT.arrays, 16)
    with pytest.raises(ValueError, match="sliding_window=4 of a 'latent' cache"):
        CacheSpec("latent", LATENT.arrays, 16, sliding_window=4)


@pytest.mark.parametrize(
    ("windows", "expected"), [((4, 9, 4), 9), ((4, None), None), ((None,), None), ((), None)]
)
def test_common_window(windows, expected):
    specs = [CacheSpec.attention(1, 8, 16, jnp.float32, sliding_window=w) for w in windows]
    assert common_window(specs) == expected
