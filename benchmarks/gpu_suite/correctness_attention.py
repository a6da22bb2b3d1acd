"""Attention held against the float32 reference, unused memory poisoned.

The reference computes each query alone over a whole row of the block table. Of long prompts it
computes the first and the last query of every sequence and others at random; all others must be
finite, and padding as it is promised.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.attention_cases.arguments import AttentionArguments, AttentionSpec, build
from benchmarks.gpu_suite.correctness_cases import PrefixSpec
from benchmarks.gpu_suite.repeated import Arrays, Problem, Results
from benchmarks.gpu_suite.stage import Program, Row
from pallas_paged import AttentionMetadata, SharedPrefix, paged_attention
from pallas_paged.quantisation import is_quantised

TOLERANCES = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}
"""By the dtype of q, absolute and relative, of standard-normal inputs."""
LSE_TOLERANCE = 1e-3
MAX_CHECKED = 256
"""Queries of a step that the reference computes, but for each sequence's first and last one."""
_NOT_MEASURED = (("xla_gpu_autotune_level", "0"),)
"""Of XLA's products: these programs are compiled while others are timed."""
_MAX_NUMBERS = 0.5e9
"""Products of a query's and a key's numbers that it may take: seconds on one core."""


class Step(NamedTuple):
    """What attention reads of its metadata; of these, shapes serve as well as arrays."""

    block_tables: Any
    seq_lens: Any
    query_start_loc: Any


def problem(
    spec: AttentionSpec, implementation: str, repeats: int, *, empty: bool, interpreted: bool
) -> Problem:
    """Returns one spec as a problem; `empty` takes all sequences away and leaves padding."""
    return Problem(
        name=f"correctness: attention, {spec.name}",
        program=program(spec, implementation),
        make=functools.partial(make, spec, empty),
        judge=functools.partial(judge, spec.dtype),
        repeats=repeats,
        interpreted=interpreted,
    )


def program(spec: AttentionSpec, implementation: str, num_blocks: int | None = None) -> Program:
    """Returns attention of a spec's shapes, over a cache of `num_blocks` if that is given."""
    arguments = shapes(spec, num_blocks)
    q, k_cache, _, step, _ = arguments
    most = _max_query_len(spec, q.shape[0])
    fixed = {
        "scale": spec.scale,
        "sliding_window": spec.sliding_window,
        "logits_soft_cap": spec.logits_soft_cap,
    }
    options = [f"{name} {value}" for name, value in fixed.items() if value is not None]
    options += [name for name in ("alibi", "sinks") if getattr(spec, name)]
    num_shared = spec.num_shared_blocks if isinstance(spec, PrefixSpec) else 0
    options += [f"{num_shared} blocks for several sequences at a time"] if num_shared else []
    return Program(
        name=f"{implementation} attention, {q.dtype}{list(q.shape)} over "
        f"{k_cache.dtype}{list(k_cache.shape)}, tables {list(step.block_tables.shape)}, at most "
        f"{most} queries" + "".join(f", {option}" for option in options),
        function=functools.partial(_attend, implementation, fixed, most, num_shared),
        arguments=lambda: arguments,
        options=_NOT_MEASURED if implementation == "xla" else (),
    )


def _attend(
    implementation: str,
    fixed: Mapping[str, Any],
    max_query_len: int,
    num_shared: int,
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    step: Step,
    arrays: dict[str, Any],
) -> tuple[jax.Array, jax.Array]:
    unread = jnp.zeros(q.shape[0], jnp.int32)
    metadata = AttentionMetadata(unread, unread, *step, max_query_len)
    if num_shared:
        num_known = step.seq_lens - jnp.diff(step.query_start_loc)
        prefix = SharedPrefix(
            step.block_tables[0],
            jnp.int32(num_shared),
            num_known >= num_shared * k_cache.shape[2],
        )
        metadata = dataclasses.replace(metadata, shared_prefix=prefix)
    with jax.default_matmul_precision("highest"):
        return paged_attention(
            q,
            k_cache,
            v_cache,
            metadata,
            **fixed,
            **arrays,
            return_lse=True,
            implementation=implementation,
        )


def shapes(spec: AttentionSpec, num_blocks: int | None = None) -> tuple[Any, ...]:
    """Returns what `arguments_of(build(spec))` would, as shapes and without a device."""

    def bucket(needed: int, chosen: int | None = None) -> int:
        return 1 << (needed - 1).bit_length() if chosen is None else chosen

    counts = [-(-length // spec.block_size) for length in spec.seq_lens]
    rows = bucket(len(spec.seq_lens), spec.num_rows)
    tokens = bucket(sum(spec.lens_of_queries), spec.num_tokens)
    int32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    float32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    step = Step(
        block_tables=int32((rows, bucket(max(counts), spec.max_blocks))),
        seq_lens=int32((rows,)),
        query_start_loc=int32((rows + 1,)),
    )
    num_blocks = num_blocks or bucket(sum(counts) + 3)
    stored = (num_blocks, spec.num_kv_heads, spec.block_size)
    cache_dtype = jnp.dtype(spec.cache_dtype or spec.dtype)
    cache = jax.ShapeDtypeStruct((*stored, spec.head_dim), cache_dtype)
    arrays = {}
    if spec.alibi:
        arrays["alibi_slopes"] = float32((spec.num_q_heads,))
    if spec.sinks:
        arrays["sinks"] = float32((spec.num_q_heads,))
    if is_quantised(cache_dtype):
        arrays |= {name: float32(stored) for name in ("k_scale", "v_scale")}
    q = jax.ShapeDtypeStruct((tokens, spec.num_q_heads, spec.head_dim), jnp.dtype(spec.dtype))
    return q, cache, cache, step, arrays


def _max_query_len(spec: AttentionSpec, num_tokens: int) -> int:
    is_decode = max(spec.lens_of_queries) <= 1
    return spec.max_query_len or (1 if is_decode else num_tokens)


def arguments_of(arguments: AttentionArguments) -> tuple[Any, ...]:
    """Returns the arrays among a spec's arguments, in the order of `shapes`."""
    arrays = {k: v for k, v in arguments.options.items() if isinstance(v, jax.Array)}
    *qkv, metadata = arguments.arrays
    step = Step(metadata.block_tables, metadata.seq_lens, metadata.query_start_loc)
    return *qkv, step, arrays


def make(spec: AttentionSpec, empty: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments of a spec, and what is expected."""
    arguments = build(spec)
    if empty:
        arguments = _emptied(arguments)
    return arguments_of(arguments), expected(arguments)


def _emptied(arguments: AttentionArguments) -> AttentionArguments:
    """Returns the same shapes with padding only, and nothing but NaN that could be read."""
    zeros = jax.tree.map(jnp.zeros_like, arguments.metadata)
    poisoned = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), arguments.arrays[:3])
    q, k, v = poisoned
    return AttentionArguments(q, k, v, zeros, arguments.options)


def expected(arguments: AttentionArguments) -> dict[str, np.ndarray]:
    """Returns the reference's results.

    They are "used", i32[1], the number of queries; "rows", i32[R], those that were computed; "out"
    and "lse" of these, float32 `[R, Hq, D]` and `[R, Hq]`.
    """
    q, k, v, metadata = arguments.arrays
    starts = np.asarray(metadata.query_start_loc)
    width = metadata.block_tables.shape[1] * k.shape[2]
    most = min(MAX_CHECKED, int(_MAX_NUMBERS / (width * q.shape[1] * q.shape[2])))
    rows = checked_rows(starts, most)
    if not len(rows):
        heads = q.shape[1:]
        empty = {
            "out": np.zeros((0, *heads), np.float32),
            "lse": np.zeros((0, heads[0]), np.float32),
        }
        return {"used": starts[-1:], "rows": rows} | empty
    sequences = np.searchsorted(starts[1:], rows, side="right")
    lens = np.asarray(metadata.seq_lens)[sequences] - starts[sequences + 1] + rows + 1
    # Each of them as a sequence of its own that ends with it: a decode step.
    alone = AttentionMetadata.for_decode(
        metadata.block_tables[sequences], jnp.asarray(lens), k.shape[2]
    )
    k, v = (x.astype(jnp.float32) if x.dtype.itemsize > 1 else x for x in (k, v))
    out, lse = paged_attention(
        q[rows].astype(jnp.float32),
        k,
        v,
        alone,
        **arguments.options,
        return_lse=True,
        implementation="reference",
    )
    return {
        "used": starts[-1:],
        "rows": rows,
        "out": np.asarray(out, np.float32),
        "lse": np.asarray(lse, np.float32),
    }


def checked_rows(starts: np.ndarray, most: int) -> np.ndarray:
    """Returns the queries to compute: each sequence's first and last, and others, about `most`."""
    firsts, ends = starts[:-1], starts[1:]
    has_any = ends > firsts
    must = np.unique([firsts[has_any], ends[has_any] - 1]).astype(np.int32)
    others = np.setdiff1d(np.arange(starts[-1], dtype=np.int32), must)
    count = min(max(most - len(must), 0), len(others))
    chosen = np.random.default_rng(0).choice(others, count, replace=False)
    return np.sort(np.concatenate([must, chosen]))


def judge(dtype: str, arrays: Arrays, results: Results) -> Row:
    """Returns the largest errors of a result, and what is wrong; see `expected`."""
    out, lse = (np.asarray(result, np.float32) for result in results)
    used, rows = int(arrays["used"][0]), arrays["rows"]
    tolerance = TOLERANCES[dtype]
    lse_tolerance = tolerance if dtype == "float32" else LSE_TOLERANCE
    error = error_of(out[rows], arrays["out"])
    lse_error = error_of(lse[rows], arrays["lse"])
    finite = bool(np.all(np.isfinite(out[:used])) and np.all(np.isfinite(lse[:used])))
    padding = bool(np.all(out[used:] == 0) and np.all(lse[used:] == -np.inf))
    verdicts = {
        f"error {error:.3g} > {tolerance}": error <= tolerance,
        f"lse error {lse_error:.3g} > {lse_tolerance}": lse_error <= lse_tolerance,
        "a result is not finite": finite,
        "padding is not 0 and -inf": padding,
    }
    return {
        "wrong": [what for what, is_right in verdicts.items() if not is_right],
        "error": error,
        "tolerance": tolerance,
        "lse_error": lse_error,
        "finite": finite,
        "padding": padding,
        "checked": len(rows),
    }


def error_of(actual: np.ndarray, expected: np.ndarray) -> float:
    """Returns the largest |actual - expected| / (1 + |expected|); infinite where not a number."""
    wide, right = (np.asarray(x, np.float64) for x in (actual, expected))
    with np.errstate(invalid="ignore"):
        error = np.abs(wide - right) / (1 + np.abs(right))
    error = np.where((wide == right) | np.isnan(right), 0.0, error)
    return float(np.max(np.where(np.isnan(error), np.inf, error), initial=0.0))
