"""Times matrix products with weights as checkpoints have them, in each way to write one.

  python -m benchmarks.products --shapes=4096x768,768x2048 --rows=1,4,16,64,128 --dtype=float32

`x left` is `x @ weight.T` as it stands; `weight left` the transpose of `weight @ x.T`, behind a
barrier, for XLA would make the first of it; `three axes` the first with the weight's features in
two axes. `engine` is what the models run, `pallas_paged.ops.product.api.product`. Each is followed
by the largest number of each row, so that the product is an operand of something, as in a model.
Calls go around among copies of the weight, so many that they do not stay in a CPU's caches: as in a
model, where other weights come in between. All figures are GFLOP/s, medians.
"""

import itertools
import json
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import flags

from benchmarks import tables
from pallas_paged.models import command_line
from pallas_paged.ops.product.api import product

_SHAPES = flags.DEFINE_list(
    "shapes", ["4096x768", "768x2048"], "Weights, as output x input features."
)
_ROWS = flags.DEFINE_list("rows", ["1", "4", "16", "64", "128", "512"], "Numbers of rows of x.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "float16"], "Of both.")
_REPEATS = flags.DEFINE_integer("repeats", 7, "Timings per figure.", lower_bound=1)
_MIN_MIB = flags.DEFINE_integer(
    "min_mib", 128, "Copies of the weight have so much memory at least.", lower_bound=0
)
_JSON = flags.DEFINE_string("json", None, "Also write the figures to this file.")


def _three_axes(x: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.einsum("nk,abk->nab", x, weight.reshape(2, -1, weight.shape[1]))


def _weight_left(x: jax.Array, weight: jax.Array) -> jax.Array:
    return jax.lax.optimization_barrier(jnp.einsum("ok,nk->on", weight, x)).T


FORMS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "x left": lambda x, weight: jnp.einsum("nk,ok->no", x, weight),
    "weight left": _weight_left,
    "three axes": _three_axes,
    "engine": product,
}


def main() -> None:
    """Prints a row for each shape and number of rows."""
    try:
        shapes = [tuple(map(int, shape.split("x"))) for shape in _SHAPES.value]
        counts = [int(count) for count in _ROWS.value]
        if any(len(shape) != 2 or min(shape) < 1 for shape in shapes) or min(counts) < 1:
            raise ValueError("not positive")
    except ValueError as error:
        raise ValueError(
            f"--shapes={_SHAPES.value} must be like 4096x768, and --rows={_ROWS.value} like 1,16"
        ) from error
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, {_DTYPE.value}")
    figures = [
        {"weight": f"{out}x{features}", "rows": rows, **_gflops(rows, out, features)}
        for out, features in shapes
        for rows in counts
    ]
    tables.show("GFLOP/s", figures)
    if _JSON.value:
        with open(_JSON.value, "w") as file:
            json.dump(figures, file, indent=1)


def _row_maxima(y: jax.Array) -> jax.Array:
    return jnp.max(y.reshape(y.shape[0], -1), axis=-1)


def _gflops(rows: int, out: int, features: int) -> dict[str, float]:
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (rows, features), _DTYPE.value)
    weight = jax.random.normal(keys[1], (out, features), _DTYPE.value)
    weights = [weight + 0 for _ in range(1 + (_MIN_MIB.value << 20) // weight.nbytes)]
    operations = 2e-9 * rows * out * features
    return {name: operations / _seconds(form, x, weights) for name, form in FORMS.items()}


def _seconds(form: Callable[..., jax.Array], x: jax.Array, weights: list[jax.Array]) -> float:
    """Returns the median time of a call among several that are dispatched together."""
    run = jax.jit(lambda x, weight: _row_maxima(form(x, weight))).lower(x, weights[0]).compile()
    run(x, weights[0]).block_until_ready()
    times = []
    turns = itertools.cycle(weights)
    for _ in range(_REPEATS.value):
        begin = time.perf_counter()
        results = [run(x, weight) for weight in itertools.islice(turns, 10)]
        jax.block_until_ready(results)
        times.append((time.perf_counter() - begin) / len(results))
    return statistics.median(times)


if __name__ == "__main__":
    command_line.run(main)
