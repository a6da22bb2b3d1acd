"""Named programs of the attention kernels that compute whole steps, compiled without a GPU.

Those for sm_80, sm_86 and sm_89, and those for sm_100a.
"""

import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_paged.deviceless import target_device
from pallas_paged.kv_cache import AttentionMetadata, KVCache
from pallas_paged.ops.attention import mosaic_gpu
from pallas_paged.ops.attention.ampere.problem import AmpereProblem, scratch_types, tokens_per_run
from pallas_paged.ops.attention.blackwell import problem as blackwell_problem
from pallas_paged.ops.attention.blackwell.problem import BlackwellProblem
from pallas_paged.ops.attention.config import SM80, DecodeConfig, fits
from pallas_paged.quantisation import LARGEST

NUM_KV_HEADS = 2
SMALL_TARGETS = ("a10", "l4")
"""Of compute capability 8.6 and of 8.9."""

BLACKWELL_TARGET = "b200"

FEATURES: tuple[dict[str, Any], ...] = (
    {},
    {"sliding_window": 300, "sinks": True},
    {"logits_soft_cap": 30.0, "alibi": True},
    {"sliding_window": 300, "logits_soft_cap": 30.0, "alibi": True, "sinks": True},
)


class CompileCase(NamedTuple):
    """A program: `max_query_len` 1 is a decode step, few speculation, many a mixed step.

    Without a `config`, it has the one that is chosen for `target`.
    """

    group: int
    head_dim: int
    block_size: int
    max_query_len: int
    dtype: str = "bfloat16"
    cache_dtype: str | None = None
    sliding_window: int | None = None
    logits_soft_cap: float | None = None
    alibi: bool = False
    sinks: bool = False
    config: DecodeConfig | None = None
    target: str = "a100-40gb"

    @property
    def name(self) -> str:
        """What tables call it; every field that can differ between cases of a target is in it."""
        options = ("sliding_window", "logits_soft_cap", "alibi", "sinks")
        chosen = self.config
        return "-".join(
            [
                f"dim{self.head_dim}-group{self.group}-block{self.block_size}-{self.dtype}",
                f"queries{self.max_query_len}",
                *([f"cache-{self.cache_dtype}"] if self.cache_dtype else []),
                *(option for option in options if getattr(self, option)),
                *([f"tile{chosen.tile}-stages{chosen.num_stages}"] if chosen else []),
            ]
        )

    @property
    def problem(self) -> AmpereProblem | BlackwellProblem:
        """What the kernel is specialised for."""
        is_ampere = self.target != BLACKWELL_TARGET
        return (AmpereProblem if is_ampere else BlackwellProblem)(
            num_q_heads=NUM_KV_HEADS * self.group,
            num_kv_heads=NUM_KV_HEADS,
            head_dim=self.head_dim,
            block_size=self.block_size,
            dtype=jnp.dtype(self.dtype),
            cache_dtype=jnp.dtype(self.cache_dtype or self.dtype),
            max_tokens=tokens_per_run(self.group, self.head_dim, self.max_query_len)
            if is_ampere
            else blackwell_problem.tokens_per_run(self.group, self.max_query_len),
            scale=self.head_dim**-0.5,
            sliding_window=self.sliding_window,
            logits_soft_cap=self.logits_soft_cap,
            has_alibi=self.alibi,
            has_sinks=self.sinks,
        )

    @property
    def chosen_config(self) -> DecodeConfig:
        """The configuration given, or the one that is chosen."""
        with jax.default_device(target_device(self.target)):
            return self.config or mosaic_gpu.config_for(self.problem)

    def function(self, *arrays: Any) -> tuple[jax.Array, jax.Array]:
        """The kernels and their planning, of arrays like `arguments`."""
        q, cache, block_tables, seq_lens, query_start_loc, slopes, sinks = arrays
        unread = jnp.zeros(q.shape[0], jnp.int32)
        metadata = AttentionMetadata(
            unread, unread, block_tables, seq_lens, query_start_loc, self.max_query_len
        )
        return mosaic_gpu.paged_attention(
            q,
            cache.k,
            cache.v,
            metadata,
            k_scale=cache.k_scale,
            v_scale=cache.v_scale,
            scale=self.problem.scale,
            sliding_window=self.sliding_window,
            logits_soft_cap=self.logits_soft_cap,
            alibi_slopes=slopes if self.alibi else None,
            sinks=sinks if self.sinks else None,
            config=self.chosen_config,
        )

    def arguments(
        self, num_tokens: int = 256, num_sequences: int = 16, num_blocks: int = 500
    ) -> tuple[Any, ...]:
        """Shapes and dtypes of what `function` takes."""
        shape = jax.ShapeDtypeStruct
        num_q_heads = NUM_KV_HEADS * self.group
        cache_dtype = self.cache_dtype or self.dtype
        cache = KVCache.zeros(2, NUM_KV_HEADS, self.block_size, self.head_dim, cache_dtype)
        return (
            shape((num_tokens, num_q_heads, self.head_dim), jnp.dtype(self.dtype)),
            jax.tree.map(lambda x: shape((num_blocks, *x.shape[1:]), x.dtype), cache),
            shape((num_sequences, 64), jnp.int32),
            shape((num_sequences,), jnp.int32),
            shape((num_sequences + 1,), jnp.int32),
            shape((num_q_heads,), jnp.float32),
            shape((num_q_heads,), jnp.float32),
        )


def candidate_configs(problem: AmpereProblem) -> list[DecodeConfig]:
    """Returns the configurations that fit an A100: tiles and stages.

    With more logits in registers than this, some spill; scales take some too.
    """
    most = 64 * (32 if problem.is_quantised and problem.head_dim > 128 else 64)
    tiles = [tile for tile in (64, 128) if tile * problem.rows <= most]
    configs = [DecodeConfig(tile, stages, 1) for tile in tiles for stages in (2, 3, 4)]
    scratch = functools.partial(scratch_types, problem)
    return [config for config in configs if fits(config, scratch(config), SM80)]


def compile_cases() -> list[CompileCase]:
    """Returns what is chosen for shapes of steps and caches, and every other configuration.

    Groups and options go round, so that each value of one meets each value of the others.
    """
    groups = itertools.cycle((4, 1, 7, 8, 3, 16, 5))
    cases = []
    for index, (head_dim, block_size, max_query_len) in enumerate(
        itertools.product(mosaic_gpu.HEAD_DIMS, mosaic_gpu.BLOCK_SIZES, (1, 3, 256))
    ):
        if max_query_len == 3 and index // 3 % 5:
            continue  # speculation is like a mixed step of fewer rows
        dtype = mosaic_gpu.DTYPES[(index // 3) % 2]
        features = FEATURES[(index + index // 3) % len(FEATURES)]
        case = CompileCase(next(groups), head_dim, block_size, max_query_len, dtype, **features)
        cases.append(case)
    for index, head_dim in enumerate(mosaic_gpu.HEAD_DIMS):
        max_query_len = (1, 256)[index % 2]
        case = CompileCase(next(groups), head_dim, 16, max_query_len, **FEATURES[3])
        cases += [case._replace(config=c) for c in candidate_configs(case.problem)]
    small = (case._replace(target=t) for case in every_kind_of_cache() for t in SMALL_TARGETS)
    shared = CompileCase(64, 128, 16, 1, **FEATURES[2])  # tokens of several sequences, as heads
    return [*cases, shared, *_quantised_cases(groups), *small]


def blackwell_cases() -> list[CompileCase]:
    """Returns what is chosen on sm_100a for every kind of cache, and for every block size."""
    cases = every_kind_of_cache()
    for index, (head_dim, block_size) in enumerate(
        itertools.product(mosaic_gpu.HEAD_DIMS, mosaic_gpu.BLOCK_SIZES)
    ):
        group, queries = (4, 1, 7, 16)[index % 4], (1, 256, 3)[index % 3]
        cases.append(CompileCase(group, head_dim, block_size, queries, **FEATURES[index % 3]))
    cases.append(CompileCase(128, 128, 16, 1, **FEATURES[2]))  # of a shared prefix
    return [case._replace(target=BLACKWELL_TARGET) for case in cases]


def every_kind_of_cache() -> list[CompileCase]:
    """Returns cases of every head_dim and kind of cache, whatever the target.

    With all options, which take the most registers. What else differs goes round.
    """
    groups = itertools.cycle((4, 1, 7, 8, 3, 16, 5))
    kinds = itertools.product(mosaic_gpu.HEAD_DIMS, (None, *map(str, LARGEST)), (1, 256))
    cases = []
    for index, (head_dim, cache_dtype, max_query_len) in enumerate(kinds):
        block_size = mosaic_gpu.BLOCK_SIZES[(index // 2 + index // 8) % 4]
        dtype = mosaic_gpu.DTYPES[(index // 2 + index // 4) % 2]
        case = CompileCase(
            next(groups), head_dim, block_size, max_query_len, dtype, cache_dtype, **FEATURES[3]
        )
        cases.append(case)
    return cases


def _quantised_cases(groups: Iterator[int]) -> list[CompileCase]:
    """Every head_dim with both quantised dtypes; and tiles of 128, which take the most registers.

    What else differs goes round.
    """
    cases = []
    for index, (head_dim, cache_dtype, max_query_len) in enumerate(
        itertools.product(mosaic_gpu.HEAD_DIMS, map(str, LARGEST), (1, 256))
    ):
        block_size = mosaic_gpu.BLOCK_SIZES[(index // 2 + index // 8) % 4]
        dtype = mosaic_gpu.DTYPES[(index // 2 + index // 4) % 2]
        features = FEATURES[(index + index // 4) % len(FEATURES)]
        case = CompileCase(
            next(groups), head_dim, block_size, max_query_len, dtype, cache_dtype, **features
        )
        cases.append(case)
    for index, head_dim in enumerate((80, 128, 192)):
        cache_dtype, dtype = list(LARGEST)[index % 2].name, mosaic_gpu.DTYPES[index % 2]
        case = CompileCase(next(groups), head_dim, 16, 256, dtype, cache_dtype, **FEATURES[3])
        cases.append(case)
        decode = case._replace(max_query_len=1)
        configs = candidate_configs(decode.problem)
        cases += [decode._replace(config=c) for c in configs if (c.tile, c.num_stages) == (128, 2)]
    return cases
