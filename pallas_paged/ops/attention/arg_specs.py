"""Named arguments of paged attention, shared by tests and benchmarks.

Whatever a call may not read is NaN: free blocks, the null block, the tails of last blocks and the
padding rows of q; of quantised caches, the scales there, and what is stored if its dtype has NaN.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_paged.kv_cache import NULL_BLOCK, AttentionMetadata, KVCache, to_stored
from pallas_paged.quantisation import is_quantised


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """One set of arguments; `build` makes the arrays.

    Attributes:
      name: how test ids and tables call it.
      seq_lens: tokens of each sequence, the queries included.
      query_lens: query tokens of each sequence; None is a decode step, one each. A sequence may
        have none; one of length 0 must.
      num_q_heads, num_kv_heads, head_dim, block_size: sizes of the heads and of the cache.
      dtype: of q; `cache_dtype` None is the same. Quantised dtypes bring scales among the options.
      num_rows, num_tokens, max_blocks: B, T and M; None rounds what is needed up to a power of
        two, so that there is padding, as in an engine, and that programs are shared.
      max_query_len: of the metadata; None is 1 in a decode step, else T.
      num_shared_blocks: leading blocks that all sequences long enough have in common.
      scale, sliding_window, logits_soft_cap, alibi, sinks: options; the last two switch on
        random slopes and sinks.
    """

    name: str
    seq_lens: tuple[int, ...]
    query_lens: tuple[int, ...] | None = None
    num_q_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    block_size: int = 8
    dtype: str = "float32"
    cache_dtype: str | None = None
    num_rows: int | None = None
    num_tokens: int | None = None
    max_blocks: int | None = None
    max_query_len: int | None = None
    num_shared_blocks: int = 0
    scale: float | None = None
    sliding_window: int | None = None
    logits_soft_cap: float | None = None
    alibi: bool = False
    sinks: bool = False

    @property
    def lens_of_queries(self) -> tuple[int, ...]:
        """The query tokens of each sequence."""
        if self.query_lens is None:
            return tuple(min(length, 1) for length in self.seq_lens)
        return self.query_lens


class AttentionArguments(NamedTuple):
    """Arguments of `paged_attention`: `paged_attention(*arguments.arrays, **arguments.options)`."""

    q: Array
    k_cache: Array
    v_cache: Array
    metadata: AttentionMetadata
    options: dict[str, Any]

    @property
    def arrays(self) -> tuple[Array, Array, Array, AttentionMetadata]:
        """The positional arguments."""
        return self.q, self.k_cache, self.v_cache, self.metadata


def build(spec: AttentionSpec, seed: int = 0) -> AttentionArguments:
    """Returns standard-normal arguments for `spec`; the same seed gives the same numbers."""
    rng = np.random.default_rng(seed)
    metadata, num_blocks = _metadata(spec, rng)
    num_tokens = sum(spec.lens_of_queries)
    q = rng.standard_normal(
        (metadata.positions.shape[0], spec.num_q_heads, spec.head_dim), np.float32
    )
    q[num_tokens:] = np.nan
    shape = (num_blocks, spec.num_kv_heads, spec.block_size, spec.head_dim)
    is_used = _used_slots(spec, np.asarray(metadata.block_tables), num_blocks)
    k, v = (
        np.where(is_used[:, None, :, None], rng.standard_normal(shape, np.float32), np.nan)
        for _ in range(2)
    )
    options: dict[str, Any] = {
        "scale": spec.scale,
        "sliding_window": spec.sliding_window,
        "logits_soft_cap": spec.logits_soft_cap,
    }
    if spec.alibi:
        options["alibi_slopes"] = jnp.asarray(rng.uniform(0.05, 0.5, spec.num_q_heads), jnp.float32)
    if spec.sinks:
        options["sinks"] = jnp.asarray(rng.standard_normal(spec.num_q_heads), jnp.float32)
    cache_dtype = spec.cache_dtype or spec.dtype
    cache = to_stored(jnp.asarray(k), jnp.asarray(v), KVCache.zeros(*shape, dtype=cache_dtype))
    if is_quantised(cache_dtype):
        for name in ("k_scale", "v_scale"):
            # Rows of NaN have an infinite scale.
            options[name] = jnp.where(is_used[:, None], getattr(cache, name), jnp.nan)
    return AttentionArguments(jnp.asarray(q, spec.dtype), cache.k, cache.v, metadata, options)


def _bucket(needed: int, chosen: int | None) -> int:
    return 1 << (needed - 1).bit_length() if chosen is None else chosen


def _metadata(spec: AttentionSpec, rng: np.random.Generator) -> tuple[AttentionMetadata, int]:
    """Returns the metadata and the number of blocks, some of which no sequence uses."""
    num_rows = _bucket(len(spec.seq_lens), spec.num_rows)
    padded_rows = (0,) * (num_rows - len(spec.seq_lens))
    lens = np.array(spec.seq_lens + padded_rows, np.int32)
    query_lens = np.array(spec.lens_of_queries + padded_rows, np.int32)
    num_tokens = _bucket(int(query_lens.sum()), spec.num_tokens)
    counts = -(-lens // spec.block_size)
    tables = np.full((num_rows, _bucket(int(counts.max()), spec.max_blocks)), NULL_BLOCK, np.int32)
    num_blocks = _bucket(int(counts.sum()) + 3, None)
    free = list(rng.permutation(np.arange(NULL_BLOCK + 1, num_blocks)))
    shared = [free.pop() for _ in range(spec.num_shared_blocks)]
    for row, count in enumerate(counts):
        common = shared if lens[row] >= len(shared) * spec.block_size else []
        tables[row, :count] = common + [free.pop() for _ in range(count - len(common))]
    tokens = [
        (row, position)
        for row, (length, queries) in enumerate(zip(lens, query_lens, strict=True))
        for position in range(length - queries, length)
    ]
    rows, positions = (np.array(column, np.int32) for column in zip(*tokens, strict=True))
    slots = tables[rows, positions // spec.block_size] * spec.block_size
    padding = (0, num_tokens - len(tokens))
    max_query_len = 1 if query_lens.max() <= 1 else num_tokens
    metadata = AttentionMetadata(
        positions=jnp.asarray(np.pad(positions, padding)),
        slot_mapping=jnp.asarray(np.pad(slots + positions % spec.block_size, padding)),
        block_tables=jnp.asarray(tables),
        seq_lens=jnp.asarray(lens),
        query_start_loc=jnp.asarray(np.append(0, np.cumsum(query_lens)), jnp.int32),
        max_query_len=spec.max_query_len or max_query_len,
    )
    return metadata, num_blocks


def _used_slots(spec: AttentionSpec, tables: np.ndarray, num_blocks: int) -> np.ndarray:
    """Returns bool[N, S]: the slots that hold a token of some sequence."""
    is_used = np.zeros((num_blocks, spec.block_size), bool)
    for table, length in zip(tables, spec.seq_lens, strict=False):
        position = np.arange(length)
        is_used[table[position // spec.block_size], position % spec.block_size] = True
    return is_used


def _head_specs() -> list[AttentionSpec]:
    """Every ratio of heads and every head_dim, in a mixed step."""
    ratios = ((1, 3), (3, 2), (4, 2), (5, 1), (7, 1), (8, 1))
    head_dims = (64, 80, 96, 128, 16, 32)
    return [
        AttentionSpec(
            f"heads{ratio * kv_heads}-{kv_heads}-dim{head_dim}",
            (17, 5, 40),
            (1, 5, 11),
            num_q_heads=ratio * kv_heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
        )
        for (ratio, kv_heads), head_dim in zip(ratios, head_dims, strict=True)
    ]


def _length_specs() -> list[AttentionSpec]:
    """Every block size with lengths around it, as decode, prefill, chunked prefill and mixed."""
    specs = []
    for size in (1, 8, 16, 32):
        lens = (0, 1, max(size - 1, 1), size, size + 1, 3 * size + 2, 201)
        chunked = tuple(-(-length // 2) for length in lens)
        mixed = tuple(length if i % 2 else min(length, 1) for i, length in enumerate(lens))
        specs.append(AttentionSpec(f"decode-block{size}", lens, block_size=size, num_rows=7))
        for name, queries in (("prefill", lens), ("chunked", chunked), ("mixed", mixed)):
            specs.append(
                AttentionSpec(
                    f"{name}-block{size}",
                    lens,
                    queries,
                    block_size=size,
                    num_rows=7,
                    num_tokens=512,
                )
            )
    return specs


def _feature_specs() -> list[AttentionSpec]:
    """Options in a mixed step: every two of them together, apart, and each without the other."""
    options: dict[str, Any] = {
        "scale": 0.7,
        "sliding_window": 9,
        "logits_soft_cap": 1.5,
        "alibi": True,
        "sinks": True,
    }
    combinations = (
        ("scale", "logits_soft_cap", "alibi"),
        ("scale", "logits_soft_cap", "sinks"),
        ("scale", "sliding_window", "alibi", "sinks"),
        ("sliding_window", "logits_soft_cap", "sinks"),
        ("sliding_window", "alibi"),
    )
    return [
        AttentionSpec(
            "-".join(names),
            (23, 1, 40, 9, 0, 64),
            (1, 1, 13, 9, 0, 3),
            num_q_heads=6,
            **{name: options[name] for name in names},
        )
        for names in combinations
    ]


def _layout_specs() -> list[AttentionSpec]:
    """Sharing, windows, wide tables, sequences without queries, exact buckets, many rows."""
    lens, queries = (33, 1, 70, 16, 200), (1, 1, 64, 16, 1)
    window: dict[str, Any] = {"sliding_window": 24, "sinks": True}
    return [
        AttentionSpec("mixed-shared", lens, queries, num_shared_blocks=2, block_size=16),
        AttentionSpec("mixed-wide", lens, queries, max_blocks=1000),
        AttentionSpec("decode-long-window", (700, 90, 3), **window),
        AttentionSpec("prefill-long-window", (700, 90, 3), (300, 90, 3), **window),
        AttentionSpec("window-of-one", lens, queries, sliding_window=1),
        AttentionSpec("decode-no-queries", (5, 40, 17), (0, 1, 1)),
        AttentionSpec("mixed-no-queries", (5, 40, 17), (0, 7, 1), num_rows=3, num_tokens=8),
        AttentionSpec("decode-one", (77,)),
        AttentionSpec("prefill-one", (77,), (77,), num_tokens=77, max_blocks=10),
        AttentionSpec("decode-many", tuple(range(1, 38)), num_rows=37, num_tokens=37),
        AttentionSpec("prefill-long", (513, 130), (513, 129), num_tokens=650),
    ]


def _dtype_specs() -> list[AttentionSpec]:
    """Dtypes of q and of the cache."""
    dtypes = (
        ("bfloat16", "bfloat16"),
        ("float16", "float16"),
        ("float32", "bfloat16"),
        ("bfloat16", "float32"),
        ("float32", "float8_e4m3fn"),
        ("bfloat16", "int8"),
    )
    return [
        AttentionSpec(
            f"{dtype}-cache-{cache}",
            (33, 1, 70, 16, 200),
            (1, 1, 64, 16, 1),
            dtype=dtype,
            cache_dtype=cache,
        )
        for dtype, cache in dtypes
    ]


SPECS: tuple[AttentionSpec, ...] = (
    *_head_specs(),
    *_length_specs(),
    *_feature_specs(),
    *_layout_specs(),
    *_dtype_specs(),
)
"""What every implementation is held against the reference on."""


def _decode_kernel_specs() -> list[AttentionSpec]:
    """For the Mosaic GPU decode kernel: each head_dim, block size, kind of group and option once.

    Small, because they run interpreted.
    """
    shapes: list[dict[str, Any]] = [
        {"head_dim": 64, "block_size": 16, "num_q_heads": 4},
        {"head_dim": 128, "block_size": 32, "num_q_heads": 8, "dtype": "float16"},
        {"head_dim": 80, "block_size": 16, "num_q_heads": 6},
        {"head_dim": 96, "block_size": 64, "num_q_heads": 10},
        {"head_dim": 256, "block_size": 128, "num_q_heads": 7, "num_kv_heads": 1},
        {"head_dim": 192, "block_size": 16, "num_q_heads": 2},
        {"head_dim": 64, "block_size": 32, "num_q_heads": 16, "num_kv_heads": 1},
        {"head_dim": 64, "block_size": 16, "num_q_heads": 3, "num_kv_heads": 3},
    ]
    lens = (0, 1, 15, 16, 17, 150)
    cases: list[tuple[str, dict[str, Any]]] = [
        ("decode", {"seq_lens": lens, "num_tokens": 8}),
        ("window-sinks", {"seq_lens": (150, 33), "sliding_window": 20, "sinks": True}),
        ("cap-alibi", {"seq_lens": (131, 1, 64), "logits_soft_cap": 1.5, "alibi": True}),
        (
            "tokens-window-alibi",
            {
                "seq_lens": (140, 3, 64),
                "query_lens": (3, 2, 1),
                "max_query_len": 3,
                "sliding_window": 70,
                "alibi": True,
            },
        ),
        ("long-cap-sinks", {"seq_lens": (300,), "logits_soft_cap": 2.0, "sinks": True}),
        ("shared", {"seq_lens": (70, 65, 129), "num_shared_blocks": 2, "scale": 0.2}),
        ("no-queries", {"seq_lens": (40, 130, 5), "query_lens": (0, 1, 1), "num_tokens": 2}),
        (
            "tokens-sinks",
            {
                "seq_lens": (9, 130, 70),
                "query_lens": (8, 1, 5),
                "max_query_len": 8,
                "sinks": True,
            },
        ),
    ]
    return [
        AttentionSpec(
            f"{name}-dim{shape['head_dim']}-block{shape['block_size']}",
            **{"dtype": "bfloat16", **shape, **case},
        )
        for shape, (name, case) in zip(shapes, cases, strict=True)
    ]


DECODE_KERNEL_SPECS: tuple[AttentionSpec, ...] = tuple(_decode_kernel_specs())
"""What the Mosaic GPU decode kernel is held against the reference on."""


def _quantised_kernel_specs() -> list[AttentionSpec]:
    """For the same kernel over quantised caches: both dtypes of cache with both of q, and options.

    Blocks whose scales lie apart in shared memory and others, in tiles of 64 and of 128 keys.
    """
    fp8, int8 = "float8_e4m3fn", "int8"
    return [
        AttentionSpec(
            "fp8-window-sinks-dim64-block16",
            (150, 33, 0),
            head_dim=64,
            block_size=16,
            dtype="bfloat16",
            cache_dtype=fp8,
            sliding_window=70,
            sinks=True,
        ),
        AttentionSpec(
            "int8-tokens-alibi-dim80-block32",
            (97, 3, 64),
            (3, 2, 1),
            max_query_len=3,
            num_q_heads=6,
            head_dim=80,
            block_size=32,
            dtype="float16",
            cache_dtype=int8,
            alibi=True,
        ),
        AttentionSpec(
            "int8-shared-dim128-block16",
            (200, 129, 1),
            num_shared_blocks=2,
            head_dim=128,
            block_size=16,
            dtype="bfloat16",
            cache_dtype=int8,
        ),
        AttentionSpec(
            "fp8-cap-dim96-block128",
            (140, 17),
            num_q_heads=1,
            num_kv_heads=1,
            head_dim=96,
            block_size=128,
            dtype="float16",
            cache_dtype=fp8,
            logits_soft_cap=1.5,
        ),
    ]


QUANTISED_KERNEL_SPECS: tuple[AttentionSpec, ...] = tuple(_quantised_kernel_specs())
"""What it is held against the reference on, over quantised caches."""
