"""The small problem on which kernels are checked before an engine starts, see `kernel_check`."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_paged.cache_spec import CacheSpec
from pallas_paged.kv_cache import NULL_BLOCK, AttentionMetadata, KVCache, StaticScales
from pallas_paged.models import CausalLM
from pallas_paged.quantisation import LARGEST

_KEYS = 270  # of the longest sequence: some tiles of the kernels, the last one not full
NUM_QUERIES = 140


class AttentionKind(NamedTuple):
    """What the layers of a model that have the same attention have in common.

    Attributes:
      num_q_heads: Hq.
      dtype: of the queries.
      spec: of the cache.
      options: of `paged_attention`, by name; in the place of an array its shape.
      rotates: whether queries and keys are rotated while keys and values are written.
      is_scaled: whether these are quantised by static scales.
    """

    num_q_heads: int
    dtype: Any
    spec: CacheSpec
    options: tuple[tuple[str, Any], ...]
    rotates: bool = False
    is_scaled: bool = False

    def __str__(self) -> str:
        num_kv_heads, block_size, head_dim = self.spec.arrays[0].shape
        options = "".join(f", {name}={value}" for name, value in self.options)
        options += ", rotary positions" if self.rotates else ""
        options += ", static scales" if self.is_scaled else ""
        return (
            f"{self.num_q_heads} query heads on {num_kv_heads} KV heads of {head_dim}, blocks of "
            f"{block_size}, {self.dtype} queries, {self.spec.arrays[0].dtype} cache{options}"
        )


class Problem(NamedTuple):
    """A step of three sequences, their blocks shuffled, in a cache of which the rest is NaN.

    Two have one query token, as in decode steps, and the longest has many, as in prefill. They are
    NumPy's arrays until a device has them.
    """

    caches: KVCache  # poisoned, of N blocks
    k: jax.Array  # [tokens, Hk, D], of all tokens
    v: jax.Array
    slots: jax.Array  # i32[tokens]
    q: jax.Array  # [T, Hq, D], NaN where padding
    q_written: jax.Array  # [tokens, Hq, D], rotated where `k` is
    metadata: AttentionMetadata
    options: dict[str, Any]
    static_scales: StaticScales | None


def attention_kinds(
    model: CausalLM, specs: Sequence[CacheSpec], dtype: Any
) -> tuple[AttentionKind, ...]:
    """Returns each kind of attention that a model's layers ask for, in the order of the layers."""
    found: dict[AttentionKind, None] = {}
    layer = iter(specs)

    def attend(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        cache: Any,
        metadata: Any,
        *,
        rotary: Any = None,
        static_scales: Any = None,
        **options: Any,
    ) -> tuple[jax.Array, Any]:
        named = [
            (name, jax.ShapeDtypeStruct(value.shape, value.dtype))
            if hasattr(value, "shape")
            else (name, value)
            for name, value in sorted(options.items())
        ]
        kind = AttentionKind(
            q.shape[1],
            jnp.dtype(q.dtype),
            next(layer),
            tuple(named),
            rotary is not None,
            static_scales is not None,
        )
        found[kind] = None
        return jnp.zeros((*q.shape[:2], v.shape[2]), q.dtype), cache

    def run(params: Any, caches: Any) -> Any:
        ids = jnp.zeros(2, jnp.int32)
        table, lens = jnp.zeros((1, 1), jnp.int32), jnp.zeros(1, jnp.int32)
        metadata = AttentionMetadata(ids, ids, table, lens, ids, max_query_len=2)
        return nnx.merge(graphdef, params)(ids, metadata, caches, attend=attend)

    graphdef, params = nnx.split(model)
    jax.eval_shape(run, params, tuple(spec.shapes(2) for spec in specs))
    return tuple(found)


def make_problem(kind: AttentionKind) -> Problem:
    """Returns the problem, of NumPy's arrays: on a device each conversion would be a program."""
    rng = np.random.default_rng(0)
    num_kv_heads, S, head_dim = kind.spec.arrays[0].shape
    v_head_dim = kind.spec.arrays[1].shape[2]
    lens = np.array([1, S + 3, _KEYS], np.int32)
    counts = -(-lens // S)
    blocks = 1 + rng.permutation(int(counts.sum()) + 2)[: counts.sum()].astype(np.int32)
    tables = np.full((4, int(counts.max())), NULL_BLOCK, np.int32)
    for row, part in zip(tables, np.split(blocks, np.cumsum(counts)[:-1]), strict=False):
        row[: len(part)] = part
    places = [(row, position) for row, n in enumerate(lens) for position in range(n)]
    rows, positions = np.array(places, np.int32).T
    slots = tables[rows, positions // S] * S + positions % S

    def normal(*shape: int, dtype: Any = kind.dtype) -> Any:
        return rng.standard_normal(shape, np.float32).astype(dtype)

    starts = np.array([0, 1, 2, NUM_QUERIES, NUM_QUERIES], np.int32)
    q = normal(NUM_QUERIES + 5, kind.num_q_heads, head_dim)
    q[NUM_QUERIES:] = np.nan
    unread = np.zeros(len(q), np.int32)
    of_numpy: Any = AttentionMetadata
    metadata = of_numpy(unread, unread, tables, np.append(lens, np.int32(0)), starts, len(q))
    caches = kind.spec.shapes(int(counts.sum()) + 3)
    options = {
        name: normal(*value.shape, dtype=value.dtype) if hasattr(value, "shape") else value
        for name, value in kind.options
    }
    k, v = (normal(len(slots), num_kv_heads, width) for width in (head_dim, v_head_dim))
    static_scales = None
    if kind.is_scaled:  # the largest numbers do not fit
        largest = LARGEST[jnp.dtype(caches.k.dtype)]
        shares = rng.uniform(0.2, 0.4, (2, num_kv_heads)).astype(np.float32)
        amaxes = (np.abs(x.astype(np.float32)).max((0, 2)) for x in (k, v))
        static_scales = StaticScales(
            *(a / largest * b for a, b in zip(amaxes, shares, strict=True))
        )
    return Problem(
        jax.tree.map(_poison, caches),
        k,
        v,
        slots,
        q,
        normal(len(slots), kind.num_q_heads, head_dim),
        metadata,
        options,
        static_scales,
    )


def _poison(array: jax.ShapeDtypeStruct) -> np.ndarray:
    is_float = jnp.issubdtype(array.dtype, jnp.floating)
    return np.full(array.shape, np.nan if is_float else 127, array.dtype)
