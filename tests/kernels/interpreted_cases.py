"""The attention kernels with every configuration and option, interpreted.

Tiles, stages, CTAs, dtypes, head_dims, block sizes, groups, query tokens, options and shapes of
steps meet pairwise; see `covering`. A case is a call of the "mosaic_gpu" implementation, small
enough to be interpreted with race detection, and held against the float32 reference over memory in
which all that may not be read is NaN. `make kernels-full` runs all cases; the tests a few of their
own. Interpreted memory has no limit, so that some cases would not fit into a chip.
"""

import contextlib
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.attention_cases.arguments import AttentionSpec, build
from pallas_paged.ops.attention import mosaic_gpu, reference
from pallas_paged.ops.attention.config import DecodeConfig
from pallas_paged.ops.attention.hopper.prefill_config import PrefillTuning
from tests.kernels.covering import covering
from tests.kernels.interpret_sm80 import interpret_sm80
from tests.kernels.interpreting import TOLERANCES, build_poisoned, complete, interpreted

_LSE_TOLERANCE = 1e-5
_SHAPES: dict[str, tuple[Any, ...]] = {
    "dim": mosaic_gpu.HEAD_DIMS,
    "group": (1, 3, 4, 5, 7, 8, 16),
    "heads": (1, 2),  # of keys and values
    "block": mosaic_gpu.BLOCK_SIZES,
    "dtype": mosaic_gpu.DTYPES,
    "lens": ("edges", "long", "shared"),
    "padded": (False, True),
    "window": (None, "narrow", "wide"),
    "cap": (None, 1.5),
    "alibi": (False, True),
    "sinks": (False, True),
    "tile": (64, 128),
    "stages": (2, 3),
}
_CACHES = ("same", "float8_e4m3fn", "int8")
_SHARES = {"ctas": (1, 2), "least": (1, 2)}
FACTORS: dict[str, dict[str, tuple[Any, ...]]] = {
    "decode": {
        **_SHAPES,
        **_SHARES,
        "cache": _CACHES,
        "queries": (1, 2, 8),
        "ahead": (False, True),
    },
    "prefill": {
        **_SHAPES,
        "cache": _CACHES,
        "queries": ("whole", "chunk", "mixed"),
        "converted": (1, 2),
        "converters": (1, 2),
        "turns": (False, True),
        "ahead": (False, True),
        "persistent": (False, True),
    },
    "ampere": {
        **_SHAPES,
        **_SHARES,
        "tile": (32, 64, 128),
        "cache": _CACHES,
        "queries": (1, 3, "chunk", "mixed"),
        "landing": ("early", "late"),
    },
    "blackwell": {
        **_SHAPES,
        **_SHARES,
        "cache": _CACHES,
        "queries": (1, 3, "chunk", "mixed"),
        "tile": (64,),
    },
}
"""The values that meet pairwise, by kernel."""


class Case(NamedTuple):
    """A kernel, and a value of each of its factors."""

    kernel: str
    values: dict[str, Any]

    @property
    def name(self) -> str:
        """What tables call it; every value that is not off is in it."""
        parts = []
        for name, value in self.values.items():
            if isinstance(value, str):
                parts.append(value)
            elif value is True:
                parts.append(name)
            elif value:
                parts.append(f"{name}{value}")
        return "-".join(parts)

    @property
    def spec(self) -> AttentionSpec:
        """The arguments."""
        value = self.values
        block = value["block"]
        lens = {
            "edges": (0, 1, block - 1, block, block + 1),
            "long": (300, 7, 0),
            "shared": (2 * block + 5, block, 2 * block),
        }[value["lens"]]
        queries = tuple(_num_queries(value["queries"], i, length) for i, length in enumerate(lens))
        cache = value.get("cache", "same")
        return AttentionSpec(
            self.name,
            lens,
            queries,
            num_q_heads=value["heads"] * value["group"],
            num_kv_heads=value["heads"],
            head_dim=value["dim"],
            block_size=block,
            dtype=value["dtype"],
            cache_dtype=None if cache == "same" else cache,
            num_rows=None if value["padded"] else len(lens),
            num_tokens=None if value["padded"] else sum(queries),
            max_query_len=value["queries"] if isinstance(value["queries"], int) else None,
            num_shared_blocks=2 if value["lens"] == "shared" else 0,
            sliding_window={None: None, "narrow": 5, "wide": max(lens) * 2 // 3}[value["window"]],
            logits_soft_cap=value["cap"],
            alibi=value["alibi"],
            sinks=value["sinks"],
        )

    @property
    def configuration(self) -> dict[str, Any]:
        """How the kernel cuts its work, as arguments of the implementation."""
        tile, stages = self.values["tile"], self.values["stages"]
        if self.kernel == "prefill":
            others = ("converted", "converters", "turns", "ahead", "persistent")
            pipelined = {name: self.values[name] for name in others}
            tuning = PrefillTuning(tile, stages, in_registers=False, **pipelined)
            return {"tuning": tuning, "config": DecodeConfig(num_stages=2, ctas_per_sm=1)}
        ctas, least = self.values["ctas"], self.values["least"]
        ahead = self.values.get("ahead", True)  # of conversion, in the decode kernel
        return {"config": DecodeConfig(tile, stages, ctas, least, ahead)}


def _num_queries(queries: int | str, row: int, length: int) -> int:
    """Returns the query tokens of a sequence of a step; a number is the most that one has."""
    if isinstance(queries, int):
        return min(length, queries - row % queries)
    most = {"whole": 40, "chunk": 13, "mixed": 1 if row % 2 else 13}[queries]
    return min(length, most)


@functools.cache
def cases(kernel: str) -> tuple[Case, ...]:
    """Returns the cases of a kernel."""
    is_possible = _is_decode if kernel == "decode" else lambda row: True
    return tuple(Case(kernel, row) for row in covering(FACTORS[kernel], is_possible))


def _is_decode(row: dict[str, Any]) -> bool:
    """Whether the decode kernel takes so many query tokens; else they are the prefill kernel's."""
    quantised = row["cache"] != "same"
    tokens = mosaic_gpu.max_decode_tokens(row["group"], row["dim"], row["queries"], quantised)
    return tokens == row["queries"]


def check(case: Case) -> float:
    """Returns the largest error of a case's result, in units of what is tolerated.

    Raises:
      AssertionError: an error is larger, or threads race.
    """
    spec = case.spec
    # Left of one sequence's window may be what another one, which shares the block, still sees.
    arguments = build(spec) if spec.num_shared_blocks else build_poisoned(spec)
    options = complete(spec, arguments.options)
    expected = reference.paged_attention(*arguments.arrays, **options)
    run = functools.partial(mosaic_gpu.paged_attention, **options, **case.configuration)
    with _interpreted(case):
        actual = jax.block_until_ready(jax.jit(run)(*arguments.arrays))
    unit = float(jnp.finfo(spec.dtype).eps)  # both results are rounded, large ones by more
    tolerances = (TOLERANCES[spec.dtype], unit), (_LSE_TOLERANCE, _LSE_TOLERANCE)
    return max(
        _relative_error(some, other, *tolerance)
        for some, other, tolerance in zip(actual, expected, tolerances, strict=True)
    )


def _interpreted(case: Case) -> contextlib.AbstractContextManager[None]:
    if case.kernel == "ampere":
        return interpret_sm80(case.values["landing"])
    return interpreted((10, 0) if case.kernel == "blackwell" else (9, 0))


def _relative_error(actual: jax.Array, expected: jax.Array, atol: float, rtol: float) -> float:
    left, right = np.asarray(actual, np.float32), np.asarray(expected, np.float32)
    np.testing.assert_allclose(left, right, rtol=rtol, atol=atol)
    finite = np.isfinite(right)
    left, right = left[finite], right[finite]
    return float(np.max(np.abs(left - right) / (atol + rtol * np.abs(right)), initial=0.0))
