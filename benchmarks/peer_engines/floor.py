"""What a workload takes at least on this machine: the time of its matrix products alone.

A decode step reads all weights once, however few sequences it is of, and multiplies them for each.
So it takes no less than the products of one row, which the memory holds up, nor than those of its
rows at the rate of many, which the arithmetic does. A prompt's token takes the latter.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.workloads import Request
from pallas_paged.ops.product.api import product

NAME = "products alone"
_MANY_ROWS = 512
_REPEATS = 5
_TURNS = 8  # of one row, in one program, for its start would take a tenth of the time


class Rates(NamedTuple):
    """How fast a machine multiplies by all weights of a model.

    Attributes:
      one_row_s: seconds for the products of one token.
      per_row_s: seconds for those of a token among many.
    """

    one_row_s: float
    per_row_s: float


def least_seconds(requests: Sequence[Request], max_num_seqs: int, rates: Rates) -> float:
    """Returns the seconds for requests in order, so many of them at a time."""
    waiting = list(requests)
    running: list[int] = []  # output tokens that are left, of each
    seconds = 0.0
    while waiting or running:
        while waiting and len(running) < max_num_seqs:
            request = waiting.pop(0)
            seconds += len(request.prompt_token_ids) * rates.per_row_s
            if request.num_output_tokens > 1:  # the prompt's last token gives the first
                running.append(request.num_output_tokens - 1)
        if running:
            steps = min(running)
            seconds += steps * max(rates.one_row_s, len(running) * rates.per_row_s)
            running = [left - steps for left in running if left > steps]
    return seconds


class Products:
    """All products of a Llama with weights of random numbers, in float32.

    Args:
      config: a `config.json`.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        hidden, head_dim = config["hidden_size"], _head_dim(config)
        q, kv = (config[f"num_{kind}_heads"] * head_dim for kind in ("attention", "key_value"))
        intermediate = config["intermediate_size"]
        layer = [(q + 2 * kv, hidden), (hidden, q), (2 * intermediate, hidden)]
        layer.append((hidden, intermediate))
        shapes = layer * config["num_hidden_layers"] + [(config["vocab_size"], hidden)]
        keys = jax.random.split(jax.random.key(0), len(shapes))
        self._weights = [jax.random.normal(*pair) for pair in zip(keys, shapes, strict=True)]
        self._one = [self._program(1, _TURNS, name) for name in (None, "xla")]
        self._many = self._program(_MANY_ROWS, 1, "xla")

    def _program(self, rows: int, turns: int, implementation: str | None) -> Callable[[], object]:
        def multiply(xs: dict[int, jax.Array], weights: list[jax.Array]) -> jax.Array:
            def turn(_: int, before: jax.Array) -> jax.Array:
                # Each takes something of those before, so that nothing is left out.
                for weight in weights:
                    x = xs[weight.shape[1]] + before
                    before = 1e-6 * jnp.max(product(x, weight, implementation=implementation))
                return before

            return jax.lax.fori_loop(0, turns, turn, jnp.float32(0))

        xs = {w.shape[1]: jnp.ones((rows, w.shape[1])) for w in self._weights}
        compiled = jax.jit(multiply).lower(xs, self._weights).compile()
        return lambda: jax.block_until_ready(compiled(xs, self._weights))

    def measure(self) -> Rates:
        """Returns the rates now: the best of some turns."""
        one_row_s = min(_seconds(run) for run in self._one for _ in range(_REPEATS)) / _TURNS
        return Rates(one_row_s, min(_seconds(self._many) for _ in range(_REPEATS)) / _MANY_ROWS)


def _head_dim(config: dict[str, Any]) -> int:
    return int(config.get("head_dim", config["hidden_size"] // config["num_attention_heads"]))


def _seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
