"""Whether the GPU kernels that an engine will run compute on this very device what XLA does.

Compilers and drivers differ from machine to machine, and a kernel that is wrong answers nonsense
without a word. So before an engine on a GPU takes requests, each kernel runs on a small problem of
the model's own heads, blocks and dtypes, beside XLA's program for the same. Whatever may not be
read is NaN there: free blocks, the null block, the tails of last blocks, padding.
"""

import dataclasses
import logging
import math
import operator
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_paged.cache_spec import CacheSpec
from pallas_paged.deviceless import compile_lowered
from pallas_paged.dispatch import target_device
from pallas_paged.engine.config import EngineConfig
from pallas_paged.engine.device.kernel_problem import (
    NUM_QUERIES,
    AttentionKind,
    Problem,
    attention_kinds,
    make_problem,
)
from pallas_paged.engine.device.pool_size import shares_prefixes
from pallas_paged.kv_cache import NULL_BLOCK, AttentionMetadata, KVCache, SharedPrefix
from pallas_paged.models import CausalLM
from pallas_paged.ops.attention.api import paged_attention
from pallas_paged.ops.block_copy.api import copy_blocks
from pallas_paged.ops.block_transfer.api import gather_blocks, scatter_blocks
from pallas_paged.ops.kv_write.api import rotate_and_write, rotates_as_it_writes, write_kv
from pallas_paged.quantisation import LARGEST, is_quantised

logger = logging.getLogger(__name__)

TOLERANCES = {"bfloat16": 2e-2, "float16": 3e-3, "float32": 1e-4}
"""Of attention to standard-normal queries, keys and values, by the queries' dtype."""
CHECK = "verify_kernels"
"""What the names of all checks' programs begin with: the option's."""
ROUNDINGS = {"bfloat16": 2**-7, "float16": 2**-10, "float32": 1e-5}
"""Of numbers that are rounded to a dtype, by its name: now and then two ways round differently."""


class KernelCheckError(RuntimeError):
    """A kernel computes something else than XLA, or cannot be run; the message says which."""


@dataclasses.dataclass(frozen=True)
class KernelCheck:
    """The kernels that layers with one kind of attention need, beside XLA's programs.

    Attributes:
      kind: of the attention.
      number: among a model's kinds.
      attention: the implementation of paged attention that is checked.
      cache_implementation: of what writes, copies, gathers and scatters; None chooses.
      shares_prefix: whether steps may have a `SharedPrefix`, which is more heads for the kernels.
    """

    kind: AttentionKind
    number: int
    attention: str
    cache_implementation: str | None
    shares_prefix: bool

    @property
    def name(self) -> tuple[str, int]:
        """Of its program in a bundle."""
        return (f"{CHECK} and prefixes" if self.shares_prefix else CHECK), self.number

    def lower(self) -> jax.stages.Lowered:
        """Traces its program, for the target device: of the arrays of a problem, in their order."""
        leaves, tree = jax.tree.flatten(make_problem(self.kind))
        shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
        find = _differences(self)
        return jax.jit(lambda *arrays: find(jax.tree.unflatten(tree, arrays))).lower(*shapes)


def kernel_checks(
    config: EngineConfig,
    model: CausalLM,
    specs: Sequence[CacheSpec],
    dtype: Any,
    *,
    attention: str,
    writes: str,
    platform: str,
) -> tuple[KernelCheck, ...]:
    """Returns what an engine checks: nothing if it is told so, or if no kernel runs.

    Args:
      config: of the engine.
      model: the model.
      specs: of its layers' caches.
      dtype: of activations.
      attention: the implementation of attention, see `choose_attention`.
      writes: those of the writes, see `choose_writes`.
      platform: that the engine runs on.
    """
    if not config.verify_kernels or "mosaic_gpu" not in (attention, *writes.split(", ")):
        return ()
    shares_prefix = shares_prefixes(config, platform, specs)
    return tuple(
        KernelCheck(kind, number, attention, config.cache_implementation, shares_prefix)
        for number, kind in enumerate(attention_kinds(model, specs, dtype))
    )


def check_kernels(
    checks: Sequence[KernelCheck],
    compiled: Callable[[], Mapping[Any, Callable[..., Any]]] = dict,
) -> None:
    """Runs the checks on the target device.

    Args:
      checks: which.
      compiled: returns their programs by name, as far as they need not be compiled here.

    Raises:
      KernelCheckError: the first kernel that differs by more than its dtypes explain.
    """
    begin = time.perf_counter()
    programs = compiled()
    num_checked = 0
    for check in checks:
        try:
            arrays = jax.device_put(jax.tree.leaves(make_problem(check.kind)), target_device())
            run = programs.get(check.name) or compile_lowered(check.lower(), target_device())
            differences = jax.device_get(run(*arrays))
        except Exception as error:
            raise KernelCheckError(
                _report("kernels", check.kind, f"cannot run: {error}")
            ) from error
        for name, found in differences.items():
            if not found <= 1:  # also NaN
                tolerated = f"differs from XLA's program by {found:.3g} times what is tolerated"
                raise KernelCheckError(_report(name, check.kind, tolerated))
        num_checked += len(differences)
    seconds = time.perf_counter() - begin
    kind_of_device = target_device().device_kind
    logger.info(
        "%d kernels agree with XLA on %s; checked in %.1f s", num_checked, kind_of_device, seconds
    )


def _report(name: str, kind: AttentionKind, what: str) -> str:
    device = target_device()
    versions = f"jax {jax.__version__}, {device.client.platform_version}".replace("\n", ", ")
    return (
        f"{name} on {device.device_kind}: {what} ({kind}; {versions}). Run with "
        "attention_implementation='xla' and cache_implementation='xla', which are slower and use "
        "no such kernels, and report this; verify_kernels=False leaves out the check"
    )


def _differences(check: KernelCheck) -> Callable[[Problem], dict[str, jax.Array]]:
    """Returns a function of the problem: by kernel, the difference in units of what is tolerated.

    XLA's caches are what both attentions read.
    """

    def run(problem: Problem) -> dict[str, jax.Array]:
        written = _written(problem, "xla")
        ours, theirs = (
            dict(_cache_results(problem, written, implementation))
            for implementation in (check.cache_implementation, "xla")
        )
        found = {name: _cache_difference(name, problem, ours[name], theirs[name]) for name in ours}
        if check.kind.rotates and rotates_as_it_writes(
            check.cache_implementation, problem.q_written, problem.k, problem.v, problem.caches
        ):
            found["rotate_and_write"] = _rotation_difference(check.kind, problem)
        if check.attention == "xla":
            return found
        cache, ours_attend = written, check.attention

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
        tolerance = TOLERANCES[jnp.dtype(check.kind.dtype).name]
        found["paged_attention"] = _difference(out, exact, tolerance)
        if check.shares_prefix and dict(check.kind.options).get("sliding_window") is None:
            last = slice(NUM_QUERIES - 1, NUM_QUERIES)
            out = attend(ours_attend, problem.q[last], _last_behind_prefix(problem))
            found["paged_attention of a shared prefix"] = _difference(out, exact[last], tolerance)
        return found

    return run


def _last_behind_prefix(problem: Problem) -> AttentionMetadata:
    """Returns the metadata of the longest sequence's last token, behind whole blocks."""
    table, length = problem.metadata.block_tables[2:3], problem.metadata.seq_lens[2:3]
    num_blocks = (length[0] - 1) // problem.caches.k.shape[2]
    prefix = SharedPrefix(table[0], num_blocks, jnp.ones(1, bool))
    metadata = AttentionMetadata.for_decode(table, length, problem.caches.k.shape[2])
    return dataclasses.replace(metadata, shared_prefix=prefix)


def _written(problem: Problem, implementation: str | None) -> KVCache:
    return write_kv(
        problem.k,
        problem.v,
        problem.caches,
        problem.slots,
        static_scales=problem.static_scales,
        implementation=implementation,
    )


def _cache_results(
    problem: Problem, cache: KVCache, implementation: str | None
) -> Iterator[tuple[str, KVCache]]:
    """Yields what a write makes of the problem's cache, and what each move makes of `cache`."""
    src = problem.metadata.block_tables[2, :2]
    dst = problem.caches.k.shape[0] - 1 - jnp.arange(2, dtype=jnp.int32)  # free blocks
    yield "write_kv", _written(problem, implementation)
    yield "copy_blocks", copy_blocks(cache, src, dst, implementation=implementation)
    blocks = gather_blocks(cache, src, implementation=implementation)
    yield "gather_blocks", blocks
    yield "scatter_blocks", scatter_blocks(cache, dst, blocks, implementation=implementation)


def _rotation_difference(kind: AttentionKind, problem: Problem) -> jax.Array:
    """Returns how far rotated queries, and a cache with rotated keys, are from XLA's."""
    angles = jnp.arange(problem.k.shape[0] * (problem.k.shape[2] // 2), dtype=jnp.float32)
    angles = angles.reshape(problem.k.shape[0], -1)
    rows = problem.q_written, problem.k, problem.v, jnp.cos(angles), jnp.sin(angles)
    (ours_q, ours), (theirs_q, theirs) = (
        rotate_and_write(
            *rows,
            problem.caches,
            problem.slots,
            static_scales=problem.static_scales,
            implementation=name,
        )
        for name in (None, "xla")
    )
    found = [_difference(ours_q, theirs_q, ROUNDINGS[jnp.dtype(kind.dtype).name])]
    ours, theirs = (jax.tree.map(lambda a: a[NULL_BLOCK + 1 :], cache) for cache in (ours, theirs))
    if is_quantised(ours.k.dtype):
        found.append(_quantised_difference(problem, ours, theirs, rotated=True))
    else:
        tolerance = max(ROUNDINGS[jnp.dtype(dtype).name] for dtype in (kind.dtype, ours.k.dtype))
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            unwritten = jnp.isnan(a) & jnp.isnan(b)
            a, b = jnp.where(unwritten, 0, a), jnp.where(unwritten, 0, b)
            found.append(_difference(a, b, tolerance))
    return jnp.max(jnp.stack(found))


def _cache_difference(name: str, problem: Problem, ours: KVCache, theirs: KVCache) -> jax.Array:
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


def _quantised_difference(
    problem: Problem, ours: KVCache, theirs: KVCache, *, rotated: bool = False
) -> jax.Array:
    """Returns how far what two caches stand for differs: by a rounding, and nowhere in what is NaN.

    A scale that differs by its last bit may round a number the other way. A rotated pair may be as
    long as the square root of 2 times its larger number. Scales that are given are the same.
    """
    found = []
    given = problem.static_scales
    for name in ("k", "v"):
        ours_as, theirs_as = (
            getattr(cache, name).astype(jnp.float32) * getattr(cache, f"{name}_scale")[..., None]
            for cache in (ours, theirs)
        )
        if given is not None:
            scales = (_bits(getattr(cache, f"{name}_scale")) for cache in (ours, theirs))
            found.append(jnp.where(jnp.any(operator.ne(*scales)), jnp.inf, 0.0))
            largest = LARGEST[ours.k.dtype] * getattr(given, name)[None, :, None, None]
        else:
            largest = jnp.max(jnp.abs(getattr(problem, name).astype(jnp.float32)))
            largest *= math.sqrt(2) if rotated else 1
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
