"""Every configuration of the decode kernel that can be chosen, as named cases to compile.

Tests compile a covering few; `make kernels-full` compiles all of them.
"""

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_paged.kv_cache import AttentionMetadata, KVCache
from pallas_paged.ops.attention import mosaic_gpu
from pallas_paged.ops.attention.config import SM90, DecodeConfig, fits, heuristic
from pallas_paged.ops.attention.hopper.decode_problem import DecodeProblem, scratch_types
from pallas_paged.quantisation import LARGEST

_GROUPS = (1, 3, 4, 5, 7, 8, 16)
_MAX_LOGITS = 128 * 32
_FEATURES: tuple[dict[str, Any], ...] = (
    {},
    {"sliding_window": 300, "has_sinks": True},
    {"logits_soft_cap": 30.0, "has_alibi": True},
    {"sliding_window": 300, "logits_soft_cap": 30.0, "has_alibi": True, "has_sinks": True},
)


class DecodeCase(NamedTuple):
    """One program of the kernel: what it is specialised for."""

    problem: DecodeProblem
    config: DecodeConfig

    @property
    def name(self) -> str:
        """What tables call it; every field that can differ between cases is in it."""
        p, c = self.problem, self.config
        options = {
            "window": p.sliding_window,
            "cap": p.logits_soft_cap,
            "alibi": p.has_alibi,
            "sinks": p.has_sinks,
        }
        dtypes = [jnp.dtype(p.dtype).name]
        if p.is_quantised:
            dtypes.append(jnp.dtype(p.cache_dtype).name)
        parts = [
            f"decode-{'-'.join(dtypes)}-heads{p.num_q_heads}-{p.num_kv_heads}",
            f"dim{p.head_dim}-block{p.block_size}-tokens{p.max_tokens}",
            *(name for name, value in options.items() if value),
            f"tile{c.tile}-stages{c.num_stages}-ctas{c.ctas_per_sm}",
            *(["behind"] if p.is_quantised and not c.converts_ahead else []),
        ]
        return "-".join(parts)

    def function(self, *arrays: Any) -> tuple[jax.Array, jax.Array]:
        """The kernels and their planning, of arrays like `arguments`."""
        q, cache, *_, slopes, sinks = arrays
        p = self.problem
        return mosaic_gpu.paged_attention(
            q,
            cache.k,
            cache.v,
            self.metadata(*arrays),
            k_scale=cache.k_scale,
            v_scale=cache.v_scale,
            scale=p.scale,
            sliding_window=p.sliding_window,
            logits_soft_cap=p.logits_soft_cap,
            alibi_slopes=slopes if p.has_alibi else None,
            sinks=sinks if p.has_sinks else None,
            config=self.config,
        )

    def metadata(self, *arrays: Any) -> AttentionMetadata:
        """The metadata that is among such arrays."""
        q, _, block_tables, seq_lens, query_start_loc, *_ = arrays
        unread = jnp.zeros(q.shape[0], jnp.int32)
        return AttentionMetadata(
            positions=unread,
            slot_mapping=unread,
            block_tables=block_tables,
            seq_lens=seq_lens,
            query_start_loc=query_start_loc,
            max_query_len=self.problem.max_tokens,
        )

    def arguments(
        self, num_sequences: int = 64, num_blocks: int = 1024, max_blocks: int = 64
    ) -> tuple[Any, ...]:
        """Shapes and dtypes of what `function` takes."""
        p = self.problem
        num_tokens = num_sequences * p.max_tokens
        cache = jax.eval_shape(
            lambda: KVCache.zeros(
                num_blocks, p.num_kv_heads, p.block_size, p.head_dim, p.cache_dtype
            )
        )
        heads = jax.ShapeDtypeStruct((p.num_q_heads,), jnp.float32)
        return (
            jax.ShapeDtypeStruct((num_tokens, p.num_q_heads, p.head_dim), p.dtype),
            cache,
            jax.ShapeDtypeStruct((num_sequences, max_blocks), jnp.int32),
            jax.ShapeDtypeStruct((num_sequences,), jnp.int32),
            jax.ShapeDtypeStruct((num_sequences + 1,), jnp.int32),
            heads,
            heads,
        )


def make_case(
    group: int,
    head_dim: int,
    block_size: int,
    max_tokens: int = 1,
    dtype: str = "bfloat16",
    cache_dtype: str | None = None,
    config: DecodeConfig | None = None,
    **features: Any,
) -> DecodeCase:
    """Returns a case of 8 KV heads; without a `config`, with what the rule chooses on sm_90a.

    The cache is of `dtype` if it has no other.
    """
    problem = DecodeProblem(
        num_q_heads=8 * group,
        num_kv_heads=8,
        head_dim=head_dim,
        block_size=block_size,
        dtype=jnp.dtype(dtype),
        cache_dtype=jnp.dtype(cache_dtype or dtype),
        max_tokens=max_tokens,
        scale=head_dim**-0.5,
        **features,
    )
    scratch = functools.partial(scratch_types, problem)
    return DecodeCase(problem, config or heuristic(mosaic_gpu.decode_key(problem), scratch))


def candidate_configs(problem: DecodeProblem) -> list[DecodeConfig]:
    """Returns the configurations that fit the chip: what tuning may choose from.

    Logits of more columns than these would not fit into registers.
    """
    most = _MAX_LOGITS // 2 if problem.is_quantised else _MAX_LOGITS
    tiles = [tile for tile in (64, 128) if tile == 64 or tile * problem.columns <= most]
    candidates = itertools.product(tiles, (2, 3, 4, 6), (1, 2, 3))
    configs = [DecodeConfig(*values) for values in candidates]
    return [config for config in configs if fits(config, scratch_types(problem, config), SM90)]


def decode_cases() -> list[DecodeCase]:
    """Returns what is chosen by rule for every shape, and every other configuration.

    What is chosen: head_dim x dtype x block size. The configurations: tiles x stages x head_dim (80
    and 96 are like 128). Query tokens, groups, options and the rest go round with periods of
    their own.
    """
    groups = itertools.cycle(_GROUPS)
    cases = []
    for index, (head_dim, dtype, block_size) in enumerate(
        itertools.product(mosaic_gpu.HEAD_DIMS, mosaic_gpu.DTYPES, mosaic_gpu.BLOCK_SIZES)
    ):
        group, tokens = next(groups), (1, 8)[(index + index // 4) % 2]
        features = _FEATURES[(index + index // 4 + index // 8) % len(_FEATURES)]
        max_tokens = mosaic_gpu.max_decode_tokens(group, head_dim, tokens)
        cases.append(make_case(group, head_dim, block_size, max_tokens, dtype, **features))
    for index, head_dim in enumerate((64, 128, 192, 256)):
        for turn, block_size in enumerate(mosaic_gpu.BLOCK_SIZES):
            group, features = next(groups), _FEATURES[(index + turn) % len(_FEATURES)]
            dtype = mosaic_gpu.DTYPES[(index + turn) % 2]
            problem = make_case(group, head_dim, block_size, 1, dtype, **features).problem
            stages = {(c.tile, c.num_stages): c for c in candidate_configs(problem)}
            configs = list(stages.values())[turn :: len(mosaic_gpu.BLOCK_SIZES)]
            cases += [DecodeCase(problem, config) for config in configs]
    cases += quantised_cases() + shared_prefix_cases()
    return list({case.name: case for case in cases}.values())


def quantised_cases() -> list[DecodeCase]:
    """Returns head_dim x dtype of the cache x few or many tokens, the latter in tiles of two sizes.

    Dtypes of queries, groups, block sizes and features go round. Some are there with conversion
    before the products too.
    """
    cases = []
    groups = itertools.cycle(_GROUPS)
    for i, (head_dim, tokens, cache_dtype) in enumerate(
        itertools.product(mosaic_gpu.HEAD_DIMS, (1, 8), map(str, LARGEST))
    ):
        group, turn = next(groups), i // 4
        max_tokens = mosaic_gpu.max_decode_tokens(group, head_dim, tokens, quantised=True)
        chosen = make_case(
            group,
            head_dim,
            mosaic_gpu.BLOCK_SIZES[(i + turn) % 4],
            max_tokens,
            mosaic_gpu.DTYPES[(i + i // 2 + turn) % 2],
            cache_dtype,
            **_FEATURES[(i + 3 * turn // 2) % 4],
        )
        cases.append(chosen)
        large = [c for c in candidate_configs(chosen.problem) if c.tile == 128 and (i + i // 2) % 2]
        cases += [DecodeCase(chosen.problem, config) for config in large[:1]]
        if turn % 2:
            cases += [_behind(case) for case in cases[-1 - len(large[:1]) :]]
    return cases


def shared_prefix_cases() -> list[DecodeCase]:
    """Returns tokens of several sequences as more heads of one, as many as registers hold.

    Such a prefix is never read with a window.
    """
    features = _FEATURES[2] | {"has_sinks": True}
    columns = ((64, 48, None), (128, 32, None), (256, 24, None), (128, 24, "float8_e4m3fn"))
    return [
        make_case(group, head_dim, 16, 1, "bfloat16", cache_dtype, **features)
        for head_dim, group, cache_dtype in columns
    ]


def _behind(case: DecodeCase) -> DecodeCase:
    """Returns a case of a quantised cache whose tiles are converted before each product."""
    return case._replace(config=dataclasses.replace(case.config, converts_ahead=False))
