"""What tuning compares: a kernel's configurations as programs, and the steps they are timed in.

A program is several layers of attention over arrays of fixed shapes; what is in the arrays makes it
one step or another, so that a configuration is compiled once for many sequences and for few.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.attention_cases.decode import candidate_configs
from benchmarks.gpu_suite.stage import Program
from pallas_paged.kv_cache import AttentionMetadata, KVCache, to_stored
from pallas_paged.ops.attention import mosaic_gpu
from pallas_paged.ops.attention.config import DecodeConfig, DecodeKey, heuristic
from pallas_paged.ops.attention.hopper import decode_problem
from pallas_paged.ops.attention.hopper.decode_problem import DecodeProblem
from pallas_paged.ops.attention.hopper.prefill_config import PrefillTuning, prefill_tuning
from pallas_paged.ops.attention.hopper.prefill_tuned import PrefillKey, fits, prefill_key
from pallas_paged.quantisation import is_quantised

Config = DecodeConfig | PrefillTuning
Key = DecodeKey | PrefillKey
KERNELS = ("decode", "prefill")


class Step(NamedTuple):
    """`batch` sequences of `context` tokens, of which the last `queries` are new."""

    batch: int
    context: int
    queries: int = 1


class Sizes(NamedTuple):
    """How large everything is.

    Attributes:
      steps: those of each tuple share a program.
      layers: in a program, each over blocks of its own as far as there are any.
      num_kv_heads: Hk.
      pool_tokens: tokens of the pool, more than the L2 cache holds and enough for every step.
    """

    steps: tuple[tuple[Step, ...], ...]
    layers: int
    num_kv_heads: int
    pool_tokens: int


DECODE_SIZES = Sizes(
    ((Step(64, 4096), Step(64, 1024), Step(1, 32768), Step(16, 2048)),), 4, 8, 1 << 18
)
PREFILL_SIZES = Sizes(
    (
        (Step(1, 8192, 8192), Step(8, 1024, 1024)),
        (Step(1, 8192, 512), Step(4, 4096, 128)),
    ),
    2,
    8,
    1 << 16,
)


class Arrangement(NamedTuple):
    """The shapes of one program's arrays, and the steps that are put into them."""

    group: int
    steps: tuple[Step, ...]

    @property
    def num_tokens(self) -> int:
        """T."""
        return max(step.batch * step.queries for step in self.steps)

    @property
    def max_query_len(self) -> int:
        """The most new tokens of a sequence."""
        return max(step.queries for step in self.steps)

    @property
    def rows(self) -> int:
        """B."""
        return max(step.batch for step in self.steps)


class Problem(NamedTuple):
    """What one measured configuration is for; attributes as in `DecodeProblem` and `Sizes`.

    `groups` are query heads per KV head. Of decode there may be several, if their configuration is
    looked up by the same key; of prefill there is one.
    """

    kernel: str
    head_dim: int
    block_size: int
    groups: tuple[int, ...]
    cache_dtype: str = "bfloat16"
    sizes: Sizes | None = None  # None is the kernel's own
    interpreted: bool = False

    @property
    def name(self) -> str:
        """How results call it."""
        groups = ", ".join(map(str, self.groups))
        return (
            f"{self.kernel} {self.cache_dtype}, dim {self.head_dim}, block {self.block_size}, "
            f"group {groups}"
        )

    @property
    def key(self) -> Key:
        """What the package looks its configuration up by."""
        keys: list[Key] = [
            mosaic_gpu.decode_key(problem) if self.kernel == "decode" else prefill_key(problem)
            for problem in map(self.specialised, self.groups)
        ]
        assert len(set(keys)) == 1, f"{self.name}: one configuration is not for all of {keys}"
        return keys[0]

    @property
    def all_sizes(self) -> Sizes:
        """The sizes."""
        return self.sizes or (DECODE_SIZES if self.kernel == "decode" else PREFILL_SIZES)

    def specialised(self, group: int) -> DecodeProblem:
        """Returns what the kernels are specialised for, with so many query heads per KV head."""
        num_kv_heads = self.all_sizes.num_kv_heads
        return DecodeProblem(
            num_q_heads=num_kv_heads * group,
            num_kv_heads=num_kv_heads,
            head_dim=self.head_dim,
            block_size=self.block_size,
            dtype=jnp.dtype("bfloat16" if is_quantised(self.cache_dtype) else self.cache_dtype),
            cache_dtype=jnp.dtype(self.cache_dtype),
            max_tokens=1,
            scale=self.head_dim**-0.5,
        )

    def candidates(self) -> tuple[Config, ...]:
        """Returns the configurations to compare, the one by rule first."""
        return _candidates(self)

    def arrangements(self) -> list[Arrangement]:
        """Returns the shapes that each candidate is compiled for."""
        pairs = itertools.product(self.groups, self.all_sizes.steps)
        return [Arrangement(group, steps) for group, steps in pairs]

    def inputs(self) -> Program:
        """Returns what makes (cache, queries of each arrangement); arrays are random."""
        function = functools.partial(_inputs, self)
        shapes = [f"{a.group} x {a.num_tokens}" for a in self.arrangements()]
        return Program(f"tuning inputs {self._shapes}, q {', '.join(shapes)}", function, tuple)

    def compared(self, arrangement: Arrangement) -> Program:
        """Returns what finds the error of a candidate's results; see `error`."""
        q = self.queries(arrangement)
        name = f"tuning error {q.dtype} {'x'.join(map(str, q.shape))}"
        return Program(name, error, lambda: ((q, q), (q, q)))

    def attention(self, config: Config, arrangement: Arrangement) -> Program:
        """Returns layers of attention, of (queries, cache, tables, lens, starts); see `_attend`."""
        function = functools.partial(_attend, self, config, arrangement)
        name = (
            f"tuning {self.kernel} {self._shapes}, group {arrangement.group}, "
            f"{arrangement.rows} x {self._width(arrangement)} blocks, "
            f"{arrangement.num_tokens} tokens, {arrangement.max_query_len} of one: "
            f"{describe(config)}"
        )
        return Program(name, function, functools.partial(self._arguments, arrangement))

    def programs(self) -> tuple[Program, ...]:
        """Returns all that is compiled ahead: the most important first.

        Interpreted kernels are none of it: they cannot be kept.
        """
        arrangements = self.arrangements()
        programs = [self.inputs(), *map(self.compared, arrangements)]
        if not self.interpreted:
            programs += [
                self.attention(config, arrangement)
                for config in self.candidates()
                for arrangement in arrangements
            ]
        return tuple({program.name: program for program in programs}.values())

    def step_arrays(self, arrangement: Arrangement, step: Step) -> tuple[np.ndarray, ...]:
        """Returns (tables i32[layers, B, M], lens i32[B], starts i32[B + 1]) of a step.

        Every layer has blocks of its own, in random order, as long as there are any.
        """
        sizes, rows = self.all_sizes, arrangement.rows
        per_seq = math.ceil(step.context / self.block_size)
        ids = 1 + np.random.default_rng(0).permutation(self._num_blocks - 1).astype(np.int32)
        shape = sizes.layers, step.batch, per_seq
        tables = np.zeros((sizes.layers, rows, self._width(arrangement)), np.int32)
        tables[:, : step.batch, :per_seq] = ids[np.arange(math.prod(shape)) % len(ids)].reshape(
            shape
        )
        lens = np.where(np.arange(rows) < step.batch, step.context, 0).astype(np.int32)
        starts = np.minimum(np.arange(rows + 1), step.batch) * step.queries
        return tables, lens, starts.astype(np.int32)

    @property
    def _num_blocks(self) -> int:
        return 1 + self.all_sizes.pool_tokens // self.block_size

    @property
    def _shapes(self) -> str:
        sizes = self.all_sizes
        return (
            f"{self.cache_dtype} dim {self.head_dim} block {self.block_size} "
            f"{sizes.num_kv_heads} KV heads {sizes.layers} layers {self._num_blocks} blocks"
        )

    def _width(self, arrangement: Arrangement) -> int:
        return max(math.ceil(step.context / self.block_size) for step in arrangement.steps)

    def queries(self, arrangement: Arrangement) -> jax.ShapeDtypeStruct:
        """Returns shape and dtype of an arrangement's queries."""
        problem = self.specialised(arrangement.group)
        shape = arrangement.num_tokens, problem.num_q_heads, self.head_dim
        return jax.ShapeDtypeStruct(shape, problem.dtype)

    def cache(self) -> KVCache:
        """Returns shapes and dtypes of the cache."""
        sizes = self.all_sizes
        shape = self._num_blocks, sizes.num_kv_heads, self.block_size, self.head_dim
        return jax.eval_shape(lambda: KVCache.zeros(*shape, jnp.dtype(self.cache_dtype)))

    def _arguments(self, arrangement: Arrangement) -> tuple[Any, ...]:
        rows, layers = arrangement.rows, self.all_sizes.layers
        integers = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
        tables = integers((layers, rows, self._width(arrangement)))
        return (
            self.queries(arrangement),
            self.cache(),
            tables,
            integers((rows,)),
            integers((rows + 1,)),
        )


def describe(config: Config) -> str:
    """Returns a configuration in a few words."""
    fields = dataclasses.asdict(config)
    return ", ".join(f"{name} {int(value)}" for name, value in fields.items())


def prefill_candidates(key: PrefillKey, in_registers: bool = True) -> list[PrefillTuning]:
    """Returns the tunings that fit the chip: what may be chosen from.

    But none that spills registers, as found by compiling: tiles of 192 keys do for any head_dim,
    those of 256 of a quantised cache; so does `ahead` with more than 128; and of a quantised cache
    `ahead` and `persistent` with more keys than by rule or at head_dim 256, and `persistent` with
    fewer steps converted. Else all are pipelined as the one by rule is, and that one is also there
    without `ahead`, without `persistent`, and with `turns` and, of a quantised cache, the number of
    converters the other way.
    """
    quantised = is_quantised(key.dtype)
    rule = prefill_tuning(key.head_dim, not in_registers, quantised)
    tiles, converted = ((64, 128), (1, 2)) if quantised else ((64, 128, 256), (1,))
    most_ahead = rule.tile_keys if quantised else 128
    most_persistent = rule.tile_keys if quantised else 256
    tunings = [
        dataclasses.replace(
            rule,
            tile_keys=tile,
            stages=stages,
            converted=few,
            ahead=rule.ahead and tile <= most_ahead,
            persistent=rule.persistent and tile <= most_persistent and few >= rule.converted,
        )
        for tile, stages, few in itertools.product(tiles, (2, 4, 6), converted)
    ]
    tunings.append(dataclasses.replace(rule, turns=not rule.turns))
    if rule.ahead:
        tunings.append(dataclasses.replace(rule, ahead=False))
    if rule.persistent:
        tunings.append(dataclasses.replace(rule, persistent=False))
    if quantised:
        tunings.append(dataclasses.replace(rule, converters=3 - rule.converters))
    return [tuning for tuning in tunings if fits(key, tuning)]


def decode_candidates(problem: DecodeProblem, rule: DecodeConfig) -> list[DecodeConfig]:
    """Returns the configurations that fit the chip, and the one by rule with one thing changed.

    With larger shares; where there is conversion, with that before the products.
    """
    others = [dataclasses.replace(rule, min_tiles=least) for least in (2, 4)]
    if problem.is_quantised:
        others.append(dataclasses.replace(rule, converts_ahead=not rule.converts_ahead))
    return [*candidate_configs(problem), *others]


@functools.cache
def _candidates(problem: Problem) -> tuple[Config, ...]:
    specialised, rule = problem.specialised(problem.groups[-1]), by_rule(problem)
    if isinstance(rule, DecodeConfig):
        others: list[Any] = list(decode_candidates(specialised, rule))
    else:
        others = list(prefill_candidates(prefill_key(specialised), not problem.interpreted))
    configs = tuple(dict.fromkeys([rule, *others]))
    return configs[:2] if problem.interpreted else configs


def by_rule(problem: Problem) -> Config:
    """Returns the configuration that is taken where none was measured."""
    if problem.kernel == "prefill":
        quantised = is_quantised(problem.cache_dtype)
        return prefill_tuning(problem.head_dim, problem.interpreted, quantised)
    return _decode_by_rule(problem.specialised(problem.groups[-1]))


def _decode_by_rule(problem: DecodeProblem) -> DecodeConfig:
    scratch = functools.partial(decode_problem.scratch_types, problem)
    return heuristic(mosaic_gpu.decode_key(problem), scratch)


def _inputs(problem: Problem) -> tuple[Any, ...]:
    """Returns standard-normal keys, values and queries."""
    arrangements, cache = problem.arrangements(), problem.cache()
    shapes: list[Any] = [cache.k, cache.v, *map(problem.queries, arrangements)]
    dtype = problem.specialised(1).dtype
    k, v, *queries = (
        jax.random.normal(key, array.shape, dtype)
        for key, array in zip(jax.random.split(jax.random.key(0), len(shapes)), shapes, strict=True)
    )
    return to_stored(k, v, cache), *queries


def _attend(
    problem: Problem,
    config: Config,
    arrangement: Arrangement,
    q: jax.Array,
    cache: KVCache,
    tables: jax.Array,
    lens: jax.Array,
    starts: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns the first layer's result and the last one's; a layer's is the next one's queries."""
    specialised = problem.specialised(arrangement.group)
    rule = _decode_by_rule(specialised)
    unread = jnp.zeros(q.shape[0], jnp.int32)
    results = []
    for layer in range(problem.all_sizes.layers):
        metadata = AttentionMetadata(
            positions=unread,
            slot_mapping=unread,
            block_tables=tables[layer],
            seq_lens=lens,
            query_start_loc=starts,
            max_query_len=arrangement.max_query_len,
        )
        q, _ = mosaic_gpu.paged_attention(
            q,
            cache.k,
            cache.v,
            metadata,
            k_scale=cache.k_scale,
            v_scale=cache.v_scale,
            scale=specialised.scale,
            sliding_window=None,
            logits_soft_cap=None,
            alibi_slopes=None,
            sinks=None,
            config=config if isinstance(config, DecodeConfig) else rule,
            tuning=config if isinstance(config, PrefillTuning) else None,
        )
        results.append(q)
    return results[0], results[-1]


def error(actual: tuple[jax.Array, ...], expected: tuple[jax.Array, ...]) -> jax.Array:
    """Returns f32[]: the largest difference, in units of the number and of its row's root mean
    square together; infinite where something is not a number.
    """
    worst = jnp.float32(0)
    for one, other in zip(actual, expected, strict=True):
        one, other = one.astype(jnp.float32), other.astype(jnp.float32)
        size = jnp.sqrt(jnp.mean(other * other, axis=-1, keepdims=True))
        relative = jnp.abs(one - other) / jnp.maximum(size + jnp.abs(other), 1e-30)
        worst = jnp.maximum(worst, jnp.max(jnp.where(jnp.isnan(relative), jnp.inf, relative)))
    return worst
