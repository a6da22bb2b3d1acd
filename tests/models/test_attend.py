"""The attentions of models: dtypes under the tests' strict promotion, and unlike widths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.attention_cases.arguments import AttentionSpec, build
from pallas_paged import KVCache
from pallas_paged.models.attend import dense_attend, dense_metadata, paged_attend


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_dense_attention_runs_in_every_dtype(dtype: jnp.dtype, x64: bool) -> None:
    q, k = (jnp.ones((8, heads, 16), dtype) for heads in (4, 2))
    with jax.enable_x64(x64):
        out, _ = dense_attend(q, k, k, None, dense_metadata(2, 4), sliding_window=3)
    assert out.dtype == dtype
    assert bool(jnp.all(out == 1))


def test_values_of_another_width_than_the_keys() -> None:
    """Written and attended to as they are: the first columns give the output of those alone."""
    arguments = build(AttentionSpec("attend", (5, 9), (5, 9)))
    metadata = arguments.metadata
    num_tokens = metadata.positions.shape[0]
    k, v = jax.random.normal(jax.random.key(0), (2, num_tokens, 2, 24), jnp.float32)
    q, k = jnp.nan_to_num(arguments.q), k[..., :16]

    def attend(v: jax.Array) -> jax.Array:
        cache = KVCache.zeros(8, 2, 8, 16, jnp.float32, v_head_dim=v.shape[2])
        out, cache = paged_attend(q, k, v, cache, metadata)
        assert cache.v.shape == (8, 2, 8, v.shape[2])
        return out

    out = attend(v)
    assert out.shape == (num_tokens, 4, 24)
    np.testing.assert_allclose(out[..., :16], attend(v[..., :16]), rtol=1e-6, atol=1e-6)
