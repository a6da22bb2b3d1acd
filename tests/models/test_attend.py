"""The attentions of models: dtypes under the tests' strict promotion, and unlike widths."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.attention_cases.arguments import AttentionSpec, build
from pallas_paged import KVCache
from pallas_paged.dispatch import interpret_kernels
from pallas_paged.models.attend import dense_attend, dense_metadata, paged_attend
from pallas_paged.ops.kv_write import api as kv_write
from pallas_paged.ops.rotary import rotate


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


def rotary_problem(head_dim: int) -> tuple[Any, ...]:
    """Returns queries, keys, values, an empty cache, metadata, and the tokens' angles."""
    arguments = build(AttentionSpec("attend", (5, 9), (5, 9)))
    num_tokens = arguments.metadata.positions.shape[0]
    q, k, v = (
        jax.random.normal(jax.random.key(i), (num_tokens, heads, head_dim), jnp.float32)
        for i, heads in enumerate((4, 2, 2))
    )
    angles = jnp.arange(num_tokens * head_dim // 2, dtype=jnp.float32).reshape(num_tokens, -1)
    cache = KVCache.zeros(8, 2, 8, head_dim, jnp.float32)
    return q, k, v, cache, arguments.metadata, (jnp.cos(angles), jnp.sin(angles))


def test_what_is_to_be_rotated_is_rotated() -> None:
    q, k, v, cache, metadata, rotary = rotary_problem(16)
    same = jax.tree.map(jnp.copy, cache)
    expected = paged_attend(rotate(q, *rotary), rotate(k, *rotary), v, cache, metadata)
    actual = paged_attend(q, k, v, same, metadata, rotary=rotary)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)

    dense = dense_metadata(2, len(q) // 2)
    out, _ = dense_attend(rotate(q, *rotary), rotate(k, *rotary), v, None, dense)
    rotated, _ = dense_attend(q, k, v, None, dense, rotary=rotary)
    np.testing.assert_array_equal(rotated, out)


@pytest.mark.parametrize(("head_dim", "at_once"), [(64, True), (32, False)])
def test_a_kernel_that_writes_also_rotates(
    head_dim: int, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for heads that it cannot rotate: XLA does so before it writes."""
    q, k, v, cache, metadata, rotary = rotary_problem(head_dim)
    same = jax.tree.map(jnp.copy, cache)
    expected = paged_attend(q, k, v, cache, metadata, rotary=rotary, implementation="xla")
    calls: list[str] = []
    for name in ("write_kv", "rotate_and_write"):
        function = getattr(kv_write, name)

        def run(*args: Any, name: str = name, function: Any = function, **kwargs: Any) -> Any:
            calls.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(kv_write, name, run)
    with interpret_kernels():
        out, cache = paged_attend(q, k, v, same, metadata, rotary=rotary, implementation="xla")
    assert calls == ["rotate_and_write" if at_once else "write_kv"]
    np.testing.assert_allclose(out, expected[0], atol=1e-5)
    np.testing.assert_allclose(cache.k[1:], expected[1].k[1:], atol=1e-5)
    np.testing.assert_array_equal(cache.v[1:], expected[1].v[1:])


def test_keys_of_another_dtype_than_the_queries_are_rotated_before_they_are_written() -> None:
    q, k, v, cache, metadata, rotary = rotary_problem(64)
    same = jax.tree.map(jnp.copy, cache)
    q = q.astype(jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):
        expected, _ = paged_attend(q, k, v, cache, metadata, rotary=rotary, implementation="xla")
        with interpret_kernels():
            out, _ = paged_attend(q, k, v, same, metadata, rotary=rotary, implementation="xla")
    np.testing.assert_array_equal(out, expected)


def test_some_tokens_queries_are_rotated_beforehand() -> None:
    q, k, v, cache, metadata, rotary = rotary_problem(16)
    with pytest.raises(ValueError, match="pass no `rotary`"):
        paged_attend(q, k, v, cache, metadata, rotary=rotary, queries=metadata)
