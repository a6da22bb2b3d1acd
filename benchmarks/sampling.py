"""Times the choice of the next tokens, option by option, beside a plain matmul.

Every row but the first two is `pallas_paged.engine.sampling.sample` with the same options in all
rows, on normally distributed logits. The programs take turns, so that a busy machine slows all of
them alike; the ratio to the matmul [64, 768] x [768, 16384], a small model's own logits, is the
figure to compare between machines. `sort` sorts each row's logits and does nothing else.

  python -m benchmarks.sampling --spread=2 --rounds=20 --json=out.json
"""

import functools
import json
import platform
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from pallas_paged.engine.sampling import SamplingInputs, sample, seed_words

_SHAPES = flags.DEFINE_list("shapes", ["64x16384", "16x131072"], "Rows x vocabulary.")
_SPREAD = flags.DEFINE_float(
    "spread", 2.0, "Standard deviation of the logits; a larger one makes top-p keep fewer tokens."
)
_ROUNDS = flags.DEFINE_integer("rounds", 20, "Calls timed per figure.", lower_bound=1)
_SORT = flags.DEFINE_boolean("sort", True, "Also sort the logits.")
_JSON = flags.DEFINE_string("json", None, "Also write the figures, in milliseconds, to this file.")

OPTIONS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {},
    "min_p=0.05": {"min_p": 0.05},
    "top_k=50": {"top_k": 50},
    "top_k=200": {"top_k": 200},
    "top_p=0.95": {"top_p": 0.95},
    "top_p=0.5": {"top_p": 0.5},
    "top_k=50 top_p=0.95": {"top_k": 50, "top_p": 0.95},
    "top_k=200 top_p=0.95": {"top_k": 200, "top_p": 0.95},
}


def inputs_of(
    num_rows: int,
    temperature: float = 1.0,
    top_k: float = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> SamplingInputs:
    """Returns the same options for every row, and a seed for each."""
    return SamplingInputs(
        jnp.full(num_rows, temperature, jnp.float32),
        jnp.full(num_rows, int(top_k), jnp.int32),
        jnp.full(num_rows, top_p, jnp.float32),
        jnp.full(num_rows, min_p, jnp.float32),
        jnp.asarray([seed_words(seed) for seed in range(num_rows)], jnp.uint32),
        jnp.zeros(num_rows, jnp.int32),
        jnp.arange(num_rows, dtype=jnp.int32),
    )


def programs(num_rows: int, vocab_size: int) -> dict[str, Callable[[], jax.Array]]:
    """Returns a call without arguments per row of the table, compiled."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((num_rows, vocab_size)).astype(np.float32) * _SPREAD.value
    logits = jnp.asarray(values)
    x, w = jnp.ones((64, 768)), jnp.ones((768, 16384))
    jitted_matmul, jitted_sample = jax.jit(jnp.matmul), jax.jit(sample)
    calls: dict[str, Callable[[], jax.Array]] = {"matmul": lambda: jitted_matmul(x, w)}
    if _SORT.value:
        jitted_sort = jax.jit(jnp.sort)
        calls["sort"] = lambda: jitted_sort(logits)
    for name, options in OPTIONS.items():
        inputs = inputs_of(num_rows, **options)
        calls[name] = functools.partial(jitted_sample, logits, inputs)
    for call in calls.values():
        call().block_until_ready()
    return calls


def timed(calls: dict[str, Callable[[], jax.Array]]) -> dict[str, list[float]]:
    """Returns the milliseconds of each call, `--rounds` times, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(_ROUNDS.value):
        for name, call in calls.items():
            start = time.perf_counter()
            call().block_until_ready()
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def main(argv: list[str]) -> None:
    """Prints a table per shape."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    figures: dict[str, dict[str, dict[str, float]]] = {}
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, {platform.machine()}")
    print(f"logits: normal, standard deviation {_SPREAD.value}; {_ROUNDS.value} rounds")
    for shape in _SHAPES.value:
        num_rows, vocab_size = (int(size) for size in shape.split("x"))
        times = timed(programs(num_rows, vocab_size))
        medians = {name: statistics.median(values) for name, values in times.items()}
        figures[shape] = {
            name: {"median": medians[name], "min": min(values)} for name, values in times.items()
        }
        print(f"\n{shape:24} {'median ms':>10} {'min ms':>10} {'of matmul':>10}")
        for name, values in times.items():
            ratio = medians[name] / medians["matmul"]
            print(f"{name:24} {medians[name]:10.2f} {min(values):10.2f} {ratio:10.2f}")
    if _JSON.value:
        with open(_JSON.value, "w") as file:
            json.dump(figures, file, indent=2)


if __name__ == "__main__":
    app.run(main)
