"""Finds the decode kernel's fastest configurations on this GPU, and writes them into the package.

Every configuration that fits the chip is timed on a few steps (many short sequences, a few long
ones, one very long) for each case of head_dim, block size and group. The one with the smallest
geometric mean of its times is kept, if it beats the configuration by rule by more than the noise.
The default cases take less than ten minutes; when `--budget_s` is over, what was measured is kept.

  python -m benchmarks.tune_attention --head_dims=64,128 --block_sizes=16,32,64 --groups=8
"""

import datetime
import itertools
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from pallas_paged.dispatch import target_device, unsupported_target
from pallas_paged.kv_cache import to_stored
from pallas_paged.models import command_line
from pallas_paged.ops.attention import config as attention_config
from pallas_paged.ops.attention.config import DecodeConfig, DecodeKey, format_tuned, parse_tuned
from pallas_paged.ops.attention.decode_cases import DecodeCase, candidate_configs, make_case
from pallas_paged.ops.attention.mosaic_gpu import decode_key
from pallas_paged.quantisation import LARGEST, is_quantised

_HEAD_DIMS = flags.DEFINE_list("head_dims", ["64", "128"], "head_dim of the cases.")
command_line.integers_only("head_dims", "64")
_BLOCK_SIZES = flags.DEFINE_list("block_sizes", ["16", "32", "64"], "Block sizes of the cases.")
command_line.integers_only("block_sizes", "16")
_GROUPS = flags.DEFINE_list("groups", ["8"], "Query heads per KV head of the cases.")
command_line.integers_only("groups", "8")
_DTYPE = flags.DEFINE_enum(
    "cache_dtype",
    "bfloat16",
    ["bfloat16", "float16", *map(str, LARGEST)],
    "Dtype of the cache; queries have the same, or bfloat16 if the cache is quantised.",
)
_BUDGET = flags.DEFINE_float("budget_s", 540.0, "Seconds after which no more cases are begun.")
_OUT = flags.DEFINE_string(
    "tuned_dir", None, "Folder for the file of this kind of GPU; the package's own if not given."
)

_STEPS = ((128, 512), (32, 4096), (1, 65536))  # (sequences, tokens of each)
_NOISE = 0.02
_REPEATS = 20


class Measured(NamedTuple):
    """Seconds of one configuration in each of the steps."""

    config: DecodeConfig
    times_s: tuple[float, ...]

    @property
    def mean_s(self) -> float:
        """The geometric mean: each step counts by its ratio, not by its length."""
        return math.exp(statistics.fmean(map(math.log, self.times_s)))


def choose(default: DecodeConfig, measured: Sequence[Measured], noise: float = _NOISE) -> Measured:
    """Returns the fastest, or the one with the default configuration if that is as fast."""
    fastest = min(measured, key=lambda result: result.mean_s)
    by_rule = [result for result in measured if result.config == default]
    if by_rule and by_rule[0].mean_s <= fastest.mean_s * (1 + noise):
        return by_rule[0]
    return fastest


def tune(
    cases: Iterable[DecodeCase],
    candidates: Callable[[DecodeCase], Sequence[DecodeConfig]],
    measure: Callable[[DecodeCase], tuple[float, ...]],
    budget_s: float,
    clock: Callable[[], float] = time.monotonic,
) -> dict[DecodeKey, Measured]:
    """Returns the choice for each case that was begun within the budget, by its key.

    Args:
      cases: with the configuration by rule.
      candidates: the configurations to try for a case.
      measure: seconds of a case with its configuration in each of the steps; may raise
        `jax.errors.JaxRuntimeError` where it cannot run, which leaves that configuration out.
      budget_s: seconds.
      clock: seconds since whenever.
    """
    chosen: dict[DecodeKey, Measured] = {}
    end = clock() + budget_s
    for case in cases:
        if clock() > end:
            break
        results = []
        for config in candidates(case):
            try:
                results.append(Measured(config, measure(case._replace(config=config))))
            except jax.errors.JaxRuntimeError as error:
                print(f"  left out: {config}: {str(error).splitlines()[0]}")
        if results:
            chosen[decode_key(case.problem)] = choose(case.config, results)
    return chosen


def merged_file(old: str | None, chosen: Mapping[DecodeKey, Measured], device_kind: str) -> str:
    """Returns the new text of a file of configurations: the chosen ones over those of before."""
    configs = parse_tuned(old) if old is not None else {}
    configs |= {key: result.config for key, result in chosen.items()}
    about = {
        "device": device_kind,
        "jax": jax.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    return format_tuned(configs, about)


def measure_on_device(case: DecodeCase) -> tuple[float, ...]:
    """Returns the median seconds of the case's kernels in each of the steps."""
    return tuple(_time(case, *step) for step in _STEPS)


def _time(case: DecodeCase, num_sequences: int, length: int) -> float:
    function = jax.jit(case.function)
    caches = [_arguments(case, num_sequences, length, seed) for seed in range(2)]
    for arguments in caches:
        jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        results = [function(*caches[i % len(caches)]) for i in range(_REPEATS)]
        jax.block_until_ready(results)
        times.append((time.perf_counter() - begin) / _REPEATS)
    return statistics.median(times)


def _arguments(case: DecodeCase, num_sequences: int, length: int, seed: int) -> tuple[Any, ...]:
    """Returns random arrays, the blocks in random order."""
    blocks_per_sequence = -(-length // case.problem.block_size)
    num_blocks = num_sequences * blocks_per_sequence + 1
    q, cache, *_, slopes, sinks = case.arguments(num_sequences, num_blocks, blocks_per_sequence)
    keys = jax.random.split(jax.random.key(seed), 3)
    random_q, k, v = (
        jax.random.normal(key, array.shape, q.dtype)
        for key, array in zip(keys, (q, cache.k, cache.v), strict=True)
    )
    tables = np.random.default_rng(seed).permutation(np.arange(1, num_blocks, dtype=np.int32))
    return (
        random_q,
        jax.jit(to_stored)(k, v, cache),
        jnp.asarray(tables.reshape(num_sequences, blocks_per_sequence)),
        jnp.full(num_sequences, length, jnp.int32),
        jnp.arange(num_sequences + 1, dtype=jnp.int32),
        jnp.zeros(slopes.shape, slopes.dtype),
        jnp.zeros(sinks.shape, sinks.dtype),
    )


def main() -> None:
    """Tunes, prints a line per case, and writes the file."""
    reason = unsupported_target([(9, 0)])
    if reason is not None:
        raise NotImplementedError(f"tune_attention cannot measure here: {reason}")
    sizes = itertools.product(*(map(int, f.value) for f in (_GROUPS, _HEAD_DIMS, _BLOCK_SIZES)))
    dtype = "bfloat16" if is_quantised(_DTYPE.value) else _DTYPE.value
    cases = [
        make_case(group, head_dim, block_size, dtype=dtype, cache_dtype=_DTYPE.value)
        for group, head_dim, block_size in sizes
    ]
    chosen = tune(
        cases, lambda case: candidate_configs(case.problem), measure_on_device, _BUDGET.value
    )
    for key, result in chosen.items():
        microseconds = ", ".join(f"{seconds * 1e6:.1f}" for seconds in result.times_s)
        print(f"{key}: {result.config}: {microseconds} us")
    print(f"{len(chosen)} of {len(cases)} cases")
    device_kind = target_device().device_kind
    folder = pathlib.Path(_OUT.value or pathlib.Path(attention_config.__file__).parent / "tuned")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / attention_config.tuned_file_name(device_kind)
    file.write_text(merged_file(file.read_text() if file.exists() else None, chosen, device_kind))
    print(file)


if __name__ == "__main__":
    command_line.run(main)
