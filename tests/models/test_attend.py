"""Attention without a cache: the dtypes that it takes under the tests' strict promotion."""

import jax
import jax.numpy as jnp
import pytest

from pallas_paged.models.attend import dense_attend, dense_metadata


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_dense_attention_runs_in_every_dtype(dtype: jnp.dtype, x64: bool) -> None:
    q, k = (jnp.ones((8, heads, 16), dtype) for heads in (4, 2))
    with jax.enable_x64(x64):
        out, _ = dense_attend(q, k, k, None, dense_metadata(2, 4), sliding_window=3)
    assert out.dtype == dtype
    assert bool(jnp.all(out == 1))
