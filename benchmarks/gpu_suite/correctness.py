"""Is every kernel right on this device? Against the float32 reference, unused memory poisoned."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_suite.stage import Case, Context, Row, Stage
from pallas_paged import (
    KVCache,
    copy_blocks,
    dispatch,
    gather_blocks,
    paged_attention,
    scatter_blocks,
    write_kv,
)
from pallas_paged.kv_cache import to_stored
from pallas_paged.ops.attention import arg_specs
from pallas_paged.ops.attention.arg_specs import AttentionArguments, AttentionSpec
from pallas_paged.quantisation import dequantise, is_quantised

TOLERANCES = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}
"""By the dtype of q, absolute and relative, of standard-normal inputs."""
LSE_TOLERANCE = 1e-3
DTYPES = ("bfloat16", "float32", "float8_e4m3fn", "int8")
BLOCK_OPERATIONS = ("write_kv", "copy_blocks", "gather_blocks", "scatter_blocks")


def gpu_specs() -> list[AttentionSpec]:
    """Returns sizes that the kernels are made for; `arg_specs.SPECS` has the odd ones."""
    make = functools.partial(
        AttentionSpec, num_q_heads=32, num_kv_heads=8, head_dim=128, block_size=16, dtype="bfloat16"
    )
    specs: list[AttentionSpec] = []
    lens: tuple[int, ...]
    for size in (16, 64, 32, 128):
        lens = (0, 1, size - 1, size, size + 1, 777, 4097)
        some = tuple(-(-length // 3) for length in lens)
        mixed = tuple(length if i % 2 else min(length, 1) for i, length in enumerate(lens))
        specs += [
            make(f"decode block {size}", lens, block_size=size),
            make(f"prefill block {size}", lens, lens, block_size=size),
            make(f"chunk block {size}", lens, some, block_size=size),
            make(f"mixed block {size}", lens, mixed, block_size=size),
        ]
    lens, queries = (300, 1, 129, 64, 2000), (1, 1, 40, 64, 3)
    for group in (1, 3, 4, 5, 7, 8, 16):
        grouped = functools.partial(make, num_q_heads=2 * group, num_kv_heads=2)
        specs.append(grouped(f"decode group {group}", lens))
        specs.append(grouped(f"mixed group {group}", lens, queries))
    for head_dim in (64, 80, 96, 192, 256):
        specs.append(make(f"decode dim {head_dim}", lens, head_dim=head_dim))
        specs.append(make(f"mixed dim {head_dim}", lens, queries, head_dim=head_dim))
    options: dict[str, dict[str, Any]] = {
        "window": {"sliding_window": 100},
        "cap": {"logits_soft_cap": 5.0},
        "alibi": {"alibi": True},
        "sinks": {"sinks": True},
        "all": {"sliding_window": 77, "logits_soft_cap": 3.0, "alibi": True, "sinks": True},
    }
    for name, option in options.items():
        specs.append(make(f"decode {name}", lens, **option))
        specs.append(make(f"mixed {name}", lens, queries, **option))
    specs += [
        make("decode float16", lens, dtype="float16"),
        make("mixed float16", lens, queries, dtype="float16"),
        make("decode float8", lens, cache_dtype="float8_e4m3fn"),
        make("mixed float8", lens, queries, cache_dtype="float8_e4m3fn"),
        make("decode int8", lens, cache_dtype="int8"),
        make("mixed int8", lens, queries, cache_dtype="int8"),
    ]
    for i, (head_dim, cache_dtype) in enumerate(
        itertools.product((64, 96, 192, 256), ("float8_e4m3fn", "int8"))
    ):
        quantised = functools.partial(
            make,
            head_dim=head_dim,
            block_size=(64, 16, 128, 32)[i % 4],
            dtype=("float16", "bfloat16")[i // 2 % 2],
            cache_dtype=cache_dtype,
            **options["all"],
        )
        specs.append(quantised(f"decode {cache_dtype} dim {head_dim}", lens))
        specs.append(quantised(f"mixed {cache_dtype} dim {head_dim}", lens, queries))
    specs += [
        make("decode few tokens", (500, 64, 7, 1000), (2, 4, 3, 8)),
        make("decode one long", (32768,)),
        make("decode many", tuple(range(1, 301)), num_rows=300, num_tokens=300),
        make("decode shared", lens, num_shared_blocks=3),
    ]
    return specs


def interpreted_specs() -> list[AttentionSpec]:
    """Returns sizes small enough for interpreted kernels."""
    make = functools.partial(
        AttentionSpec, num_q_heads=4, num_kv_heads=2, head_dim=64, block_size=16, dtype="bfloat16"
    )
    lens = (17, 0, 33)
    return [
        make("decode", lens),
        make("mixed", lens, (1, 0, 20)),
        make("prefill", (20,), (20,)),
        make("float8", lens, cache_dtype="float8_e4m3fn", sinks=True),
        make("int8", lens, (1, 0, 20), cache_dtype="int8", sliding_window=9),
    ]


def check_attention(arguments: AttentionArguments, out: jax.Array, lse: jax.Array) -> Row:
    """Returns the largest errors of a result; the status is failed if one is too large."""
    q, k, v, metadata = arguments.arrays
    k, v = (x.astype(jnp.float32) if x.dtype.itemsize > 1 else x for x in (k, v))
    expected, expected_lse = paged_attention(
        q.astype(jnp.float32),
        k,
        v,
        metadata,
        **arguments.options,
        return_lse=True,
        implementation="reference",
    )
    used = int(metadata.query_start_loc[-1])
    tolerance = TOLERANCES[str(q.dtype)]
    lse_tolerance = tolerance if q.dtype == jnp.float32 else LSE_TOLERANCE
    error = _error(out[:used], expected[:used])
    lse_error = _error(lse[:used], expected_lse[:used])
    padding = bool(jnp.all(out[used:] == 0)) and bool(jnp.all(lse[used:] == -jnp.inf))
    ok = error <= tolerance and lse_error <= lse_tolerance and padding
    return {
        "status": "ok" if ok else "failed",
        "error": error,
        "tolerance": tolerance,
        "lse_error": lse_error,
        "padding": padding,
    }


def _error(actual: jax.Array, expected: jax.Array) -> float:
    """Returns the largest |actual - expected| / (1 + |expected|); infinite where not a number."""
    wide, right = (np.asarray(x, np.float64) for x in (actual, expected))
    with np.errstate(invalid="ignore"):
        error = np.abs(wide - right) / (1 + np.abs(right))
    error = np.where((wide == right) | np.isnan(right), 0.0, error)
    return float(np.max(np.where(np.isnan(error), np.inf, error), initial=0.0))


def attention_case(spec: AttentionSpec, implementation: str, context: Context) -> Row:
    """Runs one spec."""
    arguments = arg_specs.build(spec)
    with _as_on_gpu(context), jax.default_matmul_precision("highest"):
        out, lse = paged_attention(
            *arguments.arrays,
            **arguments.options,
            return_lse=True,
            implementation=implementation,
        )
        jax.block_until_ready((out, lse))
    with jax.default_matmul_precision("highest"):
        return check_attention(arguments, out, lse)


def block_case(operation: str, dtype: str, implementation: str, context: Context) -> Row:
    """Runs an operation on blocks; all but the null block must be equal bit for bit.

    But for quantising, which may round otherwise: one in a hundred numbers, by one step.
    """
    results = []
    for name in ("reference", implementation):
        on_gpu = _as_on_gpu(context) if name == "mosaic_gpu" else contextlib.nullcontext()
        with on_gpu:
            results.append(jax.block_until_ready(_run_operation(operation, dtype, name)))
    first = 0 if operation == "gather_blocks" else 1
    expected, actual = (jax.tree.map(lambda x: np.asarray(x)[first:], x) for x in results)
    if operation == "write_kv" and is_quantised(dtype):
        return check_quantised(expected, actual)
    pairs = zip(jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True)
    bits = [[np.ascontiguousarray(x).view(np.uint8) for x in pair] for pair in pairs]
    differing = sum(int(np.sum(one != other)) for one, other in bits)
    return {"status": "failed" if differing else "ok", "error": float(differing)}


def check_quantised(expected: KVCache, actual: KVCache) -> Row:
    """Returns the share of stored numbers that differ; failed if one by more than a step."""
    step = {"int8": 1.01 / 127, "float8_e4m3fn": 32.3 / 448}[str(expected.k.dtype)]
    differing, worst = 0.0, 0.0
    for name in ("k", "v"):
        one, other = (
            np.asarray(dequantise(*(getattr(cache, part) for part in (name, f"{name}_scale"))))
            for cache in (expected, actual)
        )
        largest = np.max(np.abs(one), axis=-1, keepdims=True, initial=1e-30)
        with np.errstate(invalid="ignore"):
            error = np.abs(one - other) / largest
        error = np.where((one == other) | (np.isnan(one) & np.isnan(other)), 0.0, error)
        error = np.where(np.isnan(error), np.inf, error)
        differing = max(differing, float(np.mean(error > 1e-5)))
        worst = max(worst, float(np.max(error)))
    ok = differing <= 0.01 and worst <= step
    return {"status": "ok" if ok else "failed", "error": worst, "differing_share": differing}


def _run_operation(operation: str, dtype: str, implementation: str) -> KVCache:
    """Returns the cache afterwards, or the blocks; what is not written is NaN and stays it."""
    rng = np.random.default_rng(0)
    num_blocks, heads, size, dim, count = 24, 2, 16, 64, 9
    like = KVCache.zeros(1, heads, size, dim, dtype)

    def stored(*shape: int) -> KVCache:
        k, v = (rng.standard_normal((*shape, dim), np.float32) for _ in range(2))
        return to_stored(jnp.asarray(k), jnp.asarray(v), like)

    ids = 1 + rng.permutation(num_blocks - 1)
    cache = stored(num_blocks, heads, size)
    if not is_quantised(dtype):
        cache = jax.tree.map(lambda x: x.at[ids[count:]].set(jnp.nan), cache)
    if operation == "write_kv":
        slots = size + rng.permutation((num_blocks - 1) * size)[:count]
        slots[-1] = 0  # padding
        k, v = (
            jnp.asarray(
                rng.standard_normal((count, heads, dim)),
                "bfloat16" if is_quantised(dtype) else dtype,
            )
            for _ in range(2)
        )
        mapping = jnp.asarray(slots, jnp.int32)
        return write_kv(k, v, cache, mapping, implementation=implementation)
    if operation == "copy_blocks":
        src, dst = (jnp.asarray(part, jnp.int32) for part in (ids[:count], ids[count : 2 * count]))
        src, dst = src.at[0].set(0), dst.at[0].set(0)  # padding
        return copy_blocks(cache, src, dst, implementation=implementation)
    some = jnp.asarray(ids[:count], jnp.int32)
    if operation == "gather_blocks":
        return gather_blocks(cache, some, implementation=implementation)
    some = some.at[0].set(0)
    blocks = stored(count, heads, size)
    return scatter_blocks(cache, some, blocks, implementation=implementation)


@contextlib.contextmanager
def _as_on_gpu(context: Context) -> Iterator[None]:
    """Without a GPU, kernels are interpreted."""
    if context.on_gpu:
        yield
    else:
        with dispatch.interpret_kernels():
            yield


def _cases(context: Context) -> list[Case]:
    def attention(specs: list[AttentionSpec], implementation: str) -> list[Case]:
        return [
            Case(
                f"{implementation}: {spec.name}",
                functools.partial(attention_case, spec, implementation),
            )
            for spec in specs
        ]

    def blocks(implementation: str) -> list[Case]:
        return [
            Case(
                f"{implementation}: {operation} {dtype}",
                functools.partial(block_case, operation, dtype, implementation),
            )
            for operation in BLOCK_OPERATIONS
            for dtype in DTYPES
        ]

    if not context.on_gpu:
        names = ("mosaic_gpu", "xla")
        return [case for n in names for case in attention(interpreted_specs(), n) + blocks(n)]
    specs = gpu_specs()
    odd = [dataclasses.replace(spec, name=f"spec {spec.name}") for spec in arg_specs.SPECS]
    return [
        *attention(specs, "mosaic_gpu"),
        *blocks("mosaic_gpu"),
        *attention(specs[:8], "xla"),
        *blocks("xla"),
        *attention(odd, "mosaic_gpu"),
        *attention(specs[8:], "xla"),
    ]


STAGE = Stage("correctness", 120, 60, _cases, ("error", "tolerance", "lse_error"), toy=False)
