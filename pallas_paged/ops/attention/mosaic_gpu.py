"""Paged attention in Pallas Mosaic GPU: what it refuses, how it is configured, and its parts.

For sm_80, sm_86 and sm_89 one kernel computes a whole step, and for sm_100a another one; see
`ampere/kernel.py` and `blackwell/kernel.py`.

For sm_90a a step is made of parts over disjoint sequences. The decode part takes those with at most
`max_decode_tokens` query tokens; it writes their rows and the padding's. The prefill part takes the
others and writes into the decode part's result. A step that can have none of either, by the lengths
that its metadata promises, leaves that part out; without the first one, the second writes the
padding's rows too. Which sequence belongs where is read from the metadata on the device, by each
part's work list.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_paged.dispatch import (
    compute_capability,
    is_interpreting,
    kernel_family,
    target_device,
    unsupported_target,
)
from pallas_paged.kv_cache import AttentionMetadata, KVCache
from pallas_paged.ops.attention.ampere import attend as ampere
from pallas_paged.ops.attention.ampere import problem as ampere_problem
from pallas_paged.ops.attention.ampere.problem import AmpereProblem
from pallas_paged.ops.attention.blackwell import attend as blackwell
from pallas_paged.ops.attention.blackwell import problem as blackwell_problem
from pallas_paged.ops.attention.blackwell.problem import BlackwellProblem
from pallas_paged.ops.attention.config import GPU_LIMITS, DecodeConfig, DecodeKey, decode_config
from pallas_paged.ops.attention.hopper import decode_problem
from pallas_paged.ops.attention.hopper.decode import decode
from pallas_paged.ops.attention.hopper.decode_problem import DecodeProblem
from pallas_paged.ops.attention.hopper.prefill import prefill
from pallas_paged.ops.attention.hopper.prefill_config import PrefillTuning
from pallas_paged.ops.attention.hopper.prefill_plan import plan_prefill
from pallas_paged.ops.attention.hopper.prefill_tuned import prefill_key, prefill_tuning_for
from pallas_paged.ops.attention.work_list import divide, make_work_list, split_queries
from pallas_paged.quantisation import LARGEST, is_quantised

HEAD_DIMS = (64, 80, 96, 128, 192, 256)
BLOCK_SIZES = (16, 32, 64, 128)
MAX_GROUP = 16
DTYPES = ("bfloat16", "float16")
_MAX_DECODE_TOKENS = 8
# The most query columns by head_dim, padded to 64: with more, and all features, registers spill.
_MAX_COLUMNS = {64: 48, 128: 32, 192: 32, 256: 24}
_MAX_COLUMNS_QUANTISED = {64: 32, 128: 24, 192: 16, 256: 16}
_INTERPRETED_SMS = 2

Problem = AmpereProblem | BlackwellProblem | DecodeProblem
_PROBLEMS: dict[str, type[Problem]] = {
    "ampere": AmpereProblem,
    "hopper": DecodeProblem,
    "blackwell": BlackwellProblem,
}


def unsupported(
    q: jax.Array | jax.ShapeDtypeStruct,
    k_cache: jax.Array | jax.ShapeDtypeStruct,
    *,
    deterministic: bool = False,
) -> str | None:
    """Returns why the kernels cannot compute this on the target device, or None if they can.

    Args:
      q: the queries, or their shape and dtype.
      k_cache: the keys, or their shape and dtype.
      deterministic: as in `paged_attention`.
    """
    _, num_q_heads, head_dim = q.shape
    _, num_kv_heads, block_size, _ = k_cache.shape
    group = num_q_heads // num_kv_heads
    if (reason := unsupported_target()) is not None:
        return reason
    if deterministic:
        return "deterministic=True, and the work is divided by what else is in the step"
    is_known = k_cache.dtype == q.dtype or is_quantised(k_cache.dtype)
    if q.dtype.name not in DTYPES or not is_known:
        return (
            f"q is {q.dtype} and the cache {k_cache.dtype}; q must be one of {', '.join(DTYPES)}, "
            f"the cache the same or one of {', '.join(map(str, LARGEST))}"
        )
    for name, value, allowed in (
        ("head_dim", head_dim, HEAD_DIMS),
        ("block_size", block_size, BLOCK_SIZES),
    ):
        if value not in allowed:
            return f"{name}={value} must be among {', '.join(map(str, allowed))}"
    if group > MAX_GROUP:
        return f"{group} query heads per KV head are more than {MAX_GROUP}"
    return None


def max_decode_tokens(
    group: int, head_dim: int, max_query_len: int, quantised: bool = False
) -> int:
    """Returns the most query tokens of a sequence that belongs to the decode part.

    All of them in a step with few tokens per sequence (speculation), else one: the kernel computes
    as many columns for each sequence as for the largest. Conversion of quantised tiles takes
    registers, and leaves fewer for columns.
    """
    columns = -(-group * max_query_len // 8) * 8
    most = _MAX_COLUMNS_QUANTISED if quantised else _MAX_COLUMNS
    few = columns <= most[-(-head_dim // 64) * 64]
    return max_query_len if few and max_query_len <= _MAX_DECODE_TOKENS else 1


def paged_attention(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    metadata: AttentionMetadata,
    *,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    scale: float,
    sliding_window: int | None,
    logits_soft_cap: float | None,
    alibi_slopes: jax.Array | None,
    sinks: jax.Array | None,
    deterministic: bool = False,
    config: DecodeConfig | None = None,
    tuning: PrefillTuning | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns (out, lse); see `api.paged_attention`.

    `config` and `tuning` None look one up; only sm_90a has a `tuning`.
    """
    assert not deterministic, "unsupported() refuses it"
    cache = KVCache(k_cache, v_cache, k_scale, v_scale)
    _, num_q_heads, head_dim = q.shape
    _, num_kv_heads, block_size, _ = k_cache.shape
    group = num_q_heads // num_kv_heads
    problem = _PROBLEMS[kernel_family()](
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=q.dtype,
        cache_dtype=k_cache.dtype,
        max_tokens=tokens_at_a_time(group, head_dim, metadata.max_query_len, k_cache.dtype),
        scale=scale,
        sliding_window=sliding_window,
        logits_soft_cap=logits_soft_cap,
        has_alibi=alibi_slopes is not None,
        has_sinks=sinks is not None,
    )
    if config is None:
        config = config_for(problem)
    arrays = (q, cache, metadata, alibi_slopes, sinks)
    num_ctas = num_sms() * config.ctas_per_sm
    if not isinstance(problem, DecodeProblem):
        assert tuning is None, "it is for sm_90a"
        return _whole_step(*arrays, problem=problem, config=config, num_ctas=num_ctas)
    results = None
    if metadata.min_query_len <= problem.max_tokens:
        results = _decode_part(*arrays, problem=problem, config=config, num_ctas=num_ctas)
        if metadata.max_query_len <= problem.max_tokens:
            return results
    if tuning is None:
        kind = target_device().device_kind
        tuning = prefill_tuning_for(prefill_key(problem), kind, is_interpreting())
    options = {"problem": problem, "tuning": tuning, "num_sms": num_sms()}
    return _prefill_part(*arrays, results, **options)


def tokens_at_a_time(group: int, head_dim: int, max_query_len: int, cache_dtype: Any) -> int:
    """Returns the most query tokens of a sequence that a step's first kernel takes at a time."""
    if kernel_family() == "ampere":
        return ampere_problem.tokens_per_run(group, head_dim, max_query_len)
    if kernel_family() == "blackwell":
        return blackwell_problem.tokens_per_run(group, max_query_len)
    return max_decode_tokens(group, head_dim, max_query_len, is_quantised(cache_dtype))


def config_for(problem: Problem) -> DecodeConfig:
    """Returns the configuration that a kernel for `problem` takes on the target device."""
    if isinstance(problem, BlackwellProblem):
        return blackwell_problem.chosen_config(problem)
    key, kind = decode_key(problem), target_device().device_kind
    chosen = functools.partial(decode_config, key, kind, limits=GPU_LIMITS[compute_capability()])
    if isinstance(problem, AmpereProblem):
        return chosen(functools.partial(ampere_problem.scratch_types, problem))
    return chosen(functools.partial(decode_problem.scratch_types, problem))


def decode_key(problem: Problem) -> DecodeKey:
    """Returns what a measured configuration for `problem` is looked up by."""
    return DecodeKey(
        dtype=jnp.dtype(problem.cache_dtype).name,
        head_dim=problem.head_dim,
        columns=problem.columns,
        block_size=problem.block_size,
    )


def num_sms() -> int:
    """Returns the number of multiprocessors of the target device; a few while interpreting."""
    return _INTERPRETED_SMS if is_interpreting() else target_device().core_count


@functools.partial(jax.jit, static_argnames=("problem", "config", "num_ctas"))
def _whole_step(
    q: jax.Array,
    cache: KVCache,
    metadata: AttentionMetadata,
    alibi_slopes: jax.Array | None,
    sinks: jax.Array | None,
    *,
    problem: AmpereProblem | BlackwellProblem,
    config: DecodeConfig,
    num_ctas: int,
) -> tuple[jax.Array, jax.Array]:
    """Plans and computes all sequences in one kernel."""
    runs = split_queries(metadata, num_tokens=q.shape[0], size=problem.max_tokens)
    work = divide(
        runs,
        metadata.query_start_loc[-1:],
        num_kv_heads=problem.num_kv_heads,
        num_ctas=num_ctas,
        tile=config.tile,
        sliding_window=problem.sliding_window,
        min_tiles=config.min_tiles,
    )
    arrays = (q, cache, metadata, runs, work, alibi_slopes, sinks)
    if isinstance(problem, BlackwellProblem):
        return blackwell.attend(*arrays, problem=problem, config=config)
    return ampere.attend(*arrays, problem=problem, config=config)


@functools.partial(jax.jit, static_argnames=("problem", "config", "num_ctas"))
def _decode_part(
    q: jax.Array,
    cache: KVCache,
    metadata: AttentionMetadata,
    alibi_slopes: jax.Array | None,
    sinks: jax.Array | None,
    *,
    problem: DecodeProblem,
    config: DecodeConfig,
    num_ctas: int,
) -> tuple[jax.Array, jax.Array]:
    """Plans and computes the sequences with at most `problem.max_tokens` query tokens."""
    work = make_work_list(
        metadata,
        num_kv_heads=problem.num_kv_heads,
        num_ctas=num_ctas,
        tile=config.tile,
        sliding_window=problem.sliding_window,
        max_tokens=problem.max_tokens,
        min_tiles=config.min_tiles,
    )
    return decode(
        q,
        cache,
        metadata,
        work,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        problem=problem,
        config=config,
    )


@functools.partial(jax.jit, static_argnames=("problem", "tuning", "num_sms"))
def _prefill_part(
    q: jax.Array,
    cache: KVCache,
    metadata: AttentionMetadata,
    alibi_slopes: jax.Array | None,
    sinks: jax.Array | None,
    results: tuple[jax.Array, jax.Array] | None,
    *,
    problem: DecodeProblem,
    tuning: PrefillTuning,
    num_sms: int,
) -> tuple[jax.Array, jax.Array]:
    """Plans and computes the sequences that the decode part leaves; `results` are its rows.

    None if there is no such part: then it is all sequences, and the padding.
    """
    plan = plan_prefill(
        metadata,
        num_tokens=q.shape[0],
        group=problem.num_q_heads // problem.num_kv_heads,
        head_dim=problem.head_dim,
        sliding_window=problem.sliding_window,
        min_query_len=problem.max_tokens + 1,
        with_padding=results is None,
    )
    return prefill(
        q,
        cache,
        metadata.block_tables,
        plan,
        scale=problem.scale,
        sliding_window=problem.sliding_window,
        logits_soft_cap=problem.logits_soft_cap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        tuning=tuning,
        num_sms=num_sms,
        into=results,
    )
