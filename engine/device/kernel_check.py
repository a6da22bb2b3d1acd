"""Whether the GPU kernels that an engine will run compute on this very device what XLA does.

Compilers and drivers differ from machine to machine, and a kernel that is wrong answers nonsense
without a word. So before an engine on a GPU takes requests, each kernel runs on a small problem of
the model's own heads, blocks and dtypes, beside XLA's program for the same. Whatever may not be
read is NaN there: free blocks, the null block, the tails of last blocks, padding.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_paged.cache_spec import CacheSpec
from pallas_paged.dispatch import target_device
from pallas_paged.kv_cache import NULL_BLOCK, AttentionMetadata, KVCache, SharedPrefix
from pallas_paged.models import CausalLM
from pallas_paged.ops.attention.api import paged_attention
from pallas_paged.ops.block_copy.api import copy_blocks
from pallas_paged.ops.block_transfer.api import gather_blocks, scatter_blocks
from pallas_paged.ops.kv_write.api import write_kv
from pallas_paged.quantisation import is_quantised

logger = logging.getLogger(__name__)

TOLERANCES = {"bfloat16": 2e-2, "float16": 3e-3, "float32": 1e-4}
"""Of attention to standard-normal queries, keys and values, by the queries' dtype."""
_KEYS = 270  # of the longest sequence: some tiles of the kernels, the last one not full
_NUM_QUERIES = 140


class KernelCheckError(RuntimeError):
    """A kernel computes something else than XLA, or cannot be run; the message says which."""


class AttentionKind(NamedTuple):
    """What the layers of a model that have the same attention have in common.

    Attributes:
      num_q_heads: Hq.
      dtype: of the queries.
      spec: of the cache.
      options: of `paged_attention`, by name; in the place of an array its shape.
    """

    num_q_heads: int
    dtype: Any
    spec: CacheSpec
    options: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        num_kv_heads, block_size, head_dim = self.spec.arrays[0].shape
        options = "".join(f", {name}={value}" for name, value in self.options)
        return (
            f"{self.num_q_heads} query heads on {num_kv_heads} KV heads of {head_dim}, blocks of "
            f"{block_size}, {self.dtype} queries, {self.spec.arrays[0].dtype} cache{options}"
        )


class _Problem(NamedTuple):
    """A step of three sequences in a cache that else holds NaN, their blocks shuffled.

    Two have one query token, as in decode steps, and the longest has many, as in prefill.
    """

    caches: KVCache  # poisoned, of N blocks
    k: jax.Array  # [tokens, Hk, D], of all tokens
    v: jax.Array
    slots: jax.Array  # i32[tokens]
    q: jax.Array  # [T, Hq, D], NaN where padding
    metadata: AttentionMetadata
    options: dict[str, Any]


def check_kernels(
    model: CausalLM,
    specs: Sequence[CacheSpec],
    dtype: Any,
    *,
    attention: str,
    cache_implementation: str | None,
    shares_prefix: bool = False,
) -> None:
    """Runs what the model's layers need beside XLA's programs, on the target device.

    Args:
      model: the model.
      specs: of its layers' caches.
      dtype: of activations.
      attention: the implementation of paged attention that is checked.
      cache_implementation: of what writes, copies, gathers and scatters; None chooses.
      shares_prefix: whether steps may have a `SharedPrefix`, which is more heads for the kernels.

    Raises:
      KernelCheckError: the first kernel that differs by more than its dtypes explain.
    """
    begin = time.perf_counter()
    implementations = {"attention": attention, "cache": cache_implementation}
    kinds = attention_kinds(model, specs, dtype)
    num_checked = 0
    for kind in kinds:
        problem = _make(kind)
        try:
            run = jax.jit(_differences(kind, implementations, shares_prefix))
            differences = jax.device_get(run(problem))
        except Exception as error:
            raise KernelCheckError(_report("kernels", kind, f"cannot run: {error}")) from error
        for name, found in differences.items():
            if not found <= 1:  # also NaN
                tolerated = f"differs from XLA's program by {found:.3g} times what is tolerated"
                raise KernelCheckError(_report(name, kind, tolerated))
        num_checked += len(differences)
    seconds = time.perf_counter() - begin
    kind_of_device = target_device().device_kind
    logger.info(
        "%d kernels agree with XLA on %s; checked in %.1f s", num_checked, kind_of_device, seconds
    )


def attention_kinds(
    model: CausalLM, specs: Sequence[CacheSpec], dtype: Any
) -> tuple[AttentionKind, ...]:
    """Returns each kind of attention that a model's layers ask for, in the order of the layers."""
    found: dict[AttentionKind, None] = {}
    layer = iter(specs)

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, cache: Any, metadata: Any, **options: Any
    ) -> tuple[jax.Array, Any]:
        named = [
            (name, jax.ShapeDtypeStruct(value.shape, value.dtype))
            if hasattr(value, "shape")
            else (name, value)
            for name, value in sorted(options.items())
        ]
        found[AttentionKind(q.shape[1], jnp.dtype(q.dtype), next(layer), tuple(named))] = None
        return jnp.zeros((*q.shape[:2], v.shape[2]), q.dtype), cache

    def run(params: Any, caches: Any) -> Any:
        ids = jnp.zeros(2, jnp.int32)
        table, lens = jnp.zeros((1, 1), jnp.int32), jnp.zeros(1, jnp.int32)
        metadata = AttentionMetadata(ids, ids, table, lens, ids, max_query_len=2)
        return nnx.merge(graphdef, params)(ids, metadata, caches, attend=attend)

    graphdef, params = nnx.split(model)
    jax.eval_shape(run, params, tuple(spec.shapes(2) for spec in specs))
    return tuple(found)


def _report(name: str, kind: AttentionKind, what: str) -> str:
    device = target_device()
    versions = f"jax {jax.__version__}, {device.client.platform_version}".replace("\n", ", ")
    return (
        f"{name} on {device.device_kind}: {what} ({kind}; {versions}). Run with "
        "attention_implementation='xla' and cache_implementation='xla', which are slower and use "
        "no such kernels, and report this; verify_kernels=False leaves out the check"
    )


# ---- the problem -------------------------------------------------------------------------------


def _make(kind: AttentionKind) -> _Problem:
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

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    starts = np.array([0, 1, 2, _NUM_QUERIES, _NUM_QUERIES], np.int32)
    q = normal(_NUM_QUERIES + 5, kind.num_q_heads, head_dim)
    q[_NUM_QUERIES:] = np.nan
    unread = jnp.zeros(len(q), jnp.int32)
    step = map(jnp.asarray, (tables, np.append(lens, np.int32(0)), starts))
    tables_there, lens_there, starts_there = step
    metadata = AttentionMetadata(
        unread, unread, tables_there, lens_there, starts_there, max_query_len=len(q)
    )
    caches = kind.spec.shapes(int(counts.sum()) + 3)
    options = {
        name: jnp.asarray(normal(*value.shape), value.dtype) if hasattr(value, "shape") else value
        for name, value in kind.options
    }
    return _Problem(
        jax.tree.map(_poison, caches),
        jnp.asarray(normal(len(slots), num_kv_heads, head_dim), kind.dtype),
        jnp.asarray(normal(len(slots), num_kv_heads, v_head_dim), kind.dtype),
        jnp.asarray(slots),
        jnp.asarray(q, kind.dtype),
        metadata,
        options,
    )


def _poison(array: jax.ShapeDtypeStruct) -> jax.Array:
    is_float = jnp.issubdtype(array.dtype, jnp.floating)
    return jnp.full(array.shape, jnp.nan if is_float else 127, array.dtype)


# ---- what differs ------------------------------------------------------------------------------


def _differences(
    kind: AttentionKind, implementations: Mapping[str, str | None], shares_prefix: bool
) -> Callable[[_Problem], dict[str, jax.Array]]:
    """Returns a function of the problem: by kernel, the difference in units of what is tolerated.

    XLA's caches are what both attentions read.
    """

    def run(problem: _Problem) -> dict[str, jax.Array]:
        ours, theirs = (
            dict(_cache_results(problem, implementation))
            for implementation in (implementations["cache"], "xla")
        )
        found = {name: _cache_difference(name, problem, ours[name], theirs[name]) for name in ours}
        if implementations["attention"] == "xla":
            return found
        cache, ours_attend = theirs["write_kv"], implementations["attention"]

        def attend(
            implementation: str | None, q: jax.Array, metadata: AttentionMetadata
        ) -> jax.Array:
            return paged_attention(
                q,
                cache.k,
                cache.v,
                metadata,
                k_scale=cache.k_scale,
                v_scale=cache.v_scale,
                implementation=implementation,
                **problem.options,
            )

        exact = attend("xla", problem.q, problem.metadata)
        out = attend(ours_attend, problem.q, problem.metadata)
        tolerance = TOLERANCES[jnp.dtype(kind.dtype).name]
        found["paged_attention"] = _difference(out, exact, tolerance)
        if shares_prefix and dict(kind.options).get("sliding_window") is None:
            last = slice(_NUM_QUERIES - 1, _NUM_QUERIES)
            out = attend(ours_attend, problem.q[last], _last_behind_prefix(problem))
            found["paged_attention of a shared prefix"] = _difference(out, exact[last], tolerance)
        return found

    return run


def _last_behind_prefix(problem: _Problem) -> AttentionMetadata:
    """Returns the metadata of the longest sequence's last token, behind whole blocks."""
    table, length = problem.metadata.block_tables[2:3], problem.metadata.seq_lens[2:3]
    num_blocks = (length[0] - 1) // problem.caches.k.shape[2]
    prefix = SharedPrefix(table[0], num_blocks, jnp.ones(1, bool))
    metadata = AttentionMetadata.for_decode(table, length, problem.caches.k.shape[2])
    return dataclasses.replace(metadata, shared_prefix=prefix)


def _cache_results(problem: _Problem, implementation: str | None) -> Iterator[tuple[str, KVCache]]:
    """Yields what each operation on caches makes of the problem's, one after the other."""
    src = problem.metadata.block_tables[2, :2]
    dst = problem.caches.k.shape[0] - 1 - jnp.arange(2, dtype=jnp.int32)  # free blocks
    cache = write_kv(
        problem.k, problem.v, problem.caches, problem.slots, implementation=implementation
    )
    yield "write_kv", cache
    yield "copy_blocks", copy_blocks(cache, src, dst, implementation=implementation)
    blocks = gather_blocks(cache, src, implementation=implementation)
    yield "gather_blocks", blocks
    yield "scatter_blocks", scatter_blocks(cache, dst, blocks, implementation=implementation)


def _cache_difference(name: str, problem: _Problem, ours: KVCache, theirs: KVCache) -> jax.Array:
    """Returns how far two caches differ; what is only moved is the same bit for bit."""
    # The null block, whatever it holds, is not among what is gathered.
    first = 0 if name == "gather_blocks" else NULL_BLOCK + 1
    if is_quantised(ours.k.dtype):
        ours, theirs = (jax.tree.map(lambda a: a[first:], cache) for cache in (ours, theirs))
        return _quantised_difference(problem, ours, theirs)
    differ = [
        jnp.any(_bits(a)[first:] != _bits(b)[first:])
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    ]
    return jnp.where(jnp.any(jnp.stack(differ)), jnp.inf, 0.0)


def _quantised_difference(problem: _Problem, ours: KVCache, theirs: KVCache) -> jax.Array:
    """Returns how far what two caches stand for differs: by a rounding, and nowhere in what is NaN.

    A scale that differs by its last bit may round a number the other way.
    """
    found = []
    for name in ("k", "v"):
        ours_as, theirs_as = (
            getattr(cache, name).astype(jnp.float32) * getattr(cache, f"{name}_scale")[..., None]
            for cache in (ours, theirs)
        )
        largest = jnp.max(jnp.abs(getattr(problem, name).astype(jnp.float32)))
        steps = 1 / 127 if ours.k.dtype == jnp.int8 else 2**-3
        tolerance = 1.01 * steps * largest
        same = jnp.isnan(ours_as) & jnp.isnan(theirs_as)
        ours_as, theirs_as = (jnp.where(same, 0, array) for array in (ours_as, theirs_as))
        found.append(_difference(ours_as, theirs_as, tolerance))
    return jnp.max(jnp.stack(found))


def _difference(ours: jax.Array, theirs: jax.Array, tolerance: Any) -> jax.Array:
    """Returns the largest difference over what is tolerated; infinite where one is not finite."""
    a, b = ours.astype(jnp.float32), theirs.astype(jnp.float32)
    found = jnp.abs(a - b) / (tolerance * (1 + jnp.abs(b)))
    return jnp.max(jnp.where(jnp.isfinite(found), found, jnp.inf))


def _bits(array: jax.Array) -> jax.Array:
    bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
    return jax.lax.bitcast_convert_type(array, bits)
