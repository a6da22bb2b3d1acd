"""The named sets of arguments that every implementation of attention is held against."""

from typing import Any

from benchmarks.attention_cases.arguments import AttentionSpec


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
