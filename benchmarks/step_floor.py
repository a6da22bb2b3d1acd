"""How far the engine's decode step is from what its parts cost alone, all timed in turns.

  python -m benchmarks.step_floor                       # `make speed`, some minutes
  python -m benchmarks.step_floor --models=20m --rows=1,64 --contexts=128,2048 --plot=FILE.png

`step` is the engine's compiled program, called in a row with its state donated. Its floor is the
sum of `products`, all matrix products of the model in the best of three forms (either operand order
of XLA's, and the engine's own, `pallas_paged.ops.product`), of `contiguous`, attention over keys
and values that lie in one piece, and of `sampling`; each is a program of its own. `attention` is
the engine's, over blocks in order. `engine` is a decode step of `LLM`'s engine, one at a time: what
it takes beyond `step` is the host's. `offline` is one of several that a program makes (see
`EngineConfig.num_scheduler_steps`), as `LLM.generate` runs them. All in milliseconds, medians; the
ratios are those of each round.

Their medians are compared with the committed ones. What is worse than those by more than
--tolerance is named, and the program then ends with status 1.
"""

import functools
import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from benchmarks import pictures, random_models, tables
from benchmarks.decode_inputs import decode_inputs
from pallas_paged import AttentionMetadata, paged_attention
from pallas_paged.engine import LLM, RequestOutputKind, SamplingParams
from pallas_paged.engine.config import CPU_SCHEDULER_STEPS
from pallas_paged.engine.device.rows import Rows
from pallas_paged.engine.device.sampling import SamplingInputs, sample
from pallas_paged.engine.kv.sharing import blocks_for
from pallas_paged.models import command_line
from pallas_paged.ops.product.api import product

_MODELS = flags.DEFINE_list("models", ["20m", "100m", "smollm2"], "Shapes, of `random_models`.")
_DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "Of parameters and cache.")
_ROWS = flags.DEFINE_list("rows", ["1", "4", "16", "64"], "Sequences in a decode step.")
command_line.integers_only("rows", "16")
_CONTEXTS = flags.DEFINE_list("contexts", ["128"], "Tokens of each sequence.")
command_line.integers_only("contexts", "128")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns of everything.", lower_bound=1)
_MIN_MS = flags.DEFINE_float("min_ms", 150.0, "Least duration of a timing.", lower_bound=0)
_TOLERANCE = flags.DEFINE_float(
    "tolerance", 0.15, "How much worse than expected a ratio may be.", lower_bound=0
)
_UPDATE = flags.DEFINE_boolean("update", False, "Expect these figures from now on.")
_EXPECTED = flags.DEFINE_string(
    "expected",
    str(pathlib.Path(__file__).with_name("step_floor.expected.json")),
    "File with the ratios that are expected.",
)
_JSON = flags.DEFINE_string("json", None, "Also write the figures to this file.")
_PLOT = flags.DEFINE_string("plot", None, "Also draw tokens per second (PNG).")

BLOCK_SIZE = 16
_TURNS_PER_ROUND = 2  # of the engine, with as many steps as a program makes
_CONTIGUOUS_LAYERS = 4  # with keys and values of their own; more layers go around
RATIOS = ("floor/step", "step/engine", "step/offline")
"""Larger is better, and 1 is the most: what is compared with expectations."""


class Case(NamedTuple):
    """What is timed, and its name in the file of expectations."""

    model: str
    dtype: str
    rows: int
    context: int

    @property
    def name(self) -> str:
        """In words."""
        return f"{self.model} {self.dtype} {self.rows} x {self.context}"


def make_llm(model: str, dtype: str, max_rows: int, max_context: int) -> LLM:
    """Returns an engine of random weights with room for the largest case."""
    tokens = max_context + _most_steps() + 4 * CPU_SCHEDULER_STEPS
    with tempfile.TemporaryDirectory() as folder:
        random_models.write_config(model, pathlib.Path(folder))
        return LLM(
            folder,
            load_format="dummy",
            dtype=dtype,
            max_num_seqs=max_rows,
            max_num_batched_tokens=max(512, max_rows),
            max_model_len=tokens,
            block_size=BLOCK_SIZE,
            num_blocks=1 + max_rows * blocks_for(tokens, BLOCK_SIZE),
            enable_prefix_caching=False,
        )


class Parts:
    """The programs of one case, each a method that runs it once and waits for it."""

    def __init__(self, llm: LLM, case: Case) -> None:
        runner, self.rows = llm.runner, case.rows
        self._programs = runner.programs
        width = blocks_for(case.context, BLOCK_SIZE)
        self._bucket = runner.buckets.pick(self.rows, self.rows, width, is_decode=True)
        padded = self._bucket.num_seqs
        tables = 1 + np.arange(padded * width, dtype=np.int32).reshape(padded, width)
        num_rows, full_width = runner.rows.block_tables.shape
        there = jnp.zeros((num_rows, full_width), jnp.int32)
        self._state: list[Any] = [
            jax.tree.map(_normal_like, runner.kv_caches),
            Rows(jnp.zeros(num_rows, jnp.int32), there.at[:padded, :width].set(tables)),
        ]
        self._packed = jnp.asarray(
            decode_inputs(
                self._bucket,
                tables,
                context=case.context,
                block_size=BLOCK_SIZE,
                padding_place=(num_rows - 1) * full_width,
            )
        )
        shape, dtype = llm.model_config, jnp.dtype(case.dtype)
        self.num_layers = shape.num_layers
        q = _normal((padded, shape.num_q_heads, shape.head_dim), dtype)
        metadata = AttentionMetadata.for_decode(
            jnp.asarray(tables), jnp.full(padded, case.context, jnp.int32), BLOCK_SIZE
        )
        implementation = self._programs.implementation
        self._attention = _compiled(
            lambda q, caches: [
                paged_attention(q, c.k, c.v, metadata, implementation=implementation)
                for c in caches
            ],
            q,
            self._state[0],
        )
        self._q = q
        kv = (padded, shape.num_kv_heads, case.context, shape.head_dim)
        count = min(self.num_layers, _CONTIGUOUS_LAYERS)
        self._kv = [(_normal(kv, dtype), _normal(kv, dtype)) for _ in range(count)]
        self._contiguous = _compiled(self._attend_all, q, self._kv)
        self._weights = _weights(self._programs.params, shape.tie_word_embeddings)
        features = {weight.shape[1] for weight in self._weights}
        self._x = {str(size): _normal((padded, size), dtype) for size in features}
        self._products = {
            name: _compiled(_all_products(form), self._x, self._weights)
            for name, form in FORMS.items()
        }
        logits = _normal((padded, shape.vocab_size), jnp.float32)
        self._logits = logits
        self._sampling = _compiled(lambda logits: sample(logits, _greedy(padded)), logits)

    def _attend_all(self, q: jax.Array, kv: list[tuple[jax.Array, jax.Array]]) -> list[jax.Array]:
        # Queries of their own for each layer: XLA computes equal things once.
        scales = [1 + i / 64 for i in range(self.num_layers)]
        return [_attend_contiguous(q * s, *kv[i % len(kv)]) for i, s in enumerate(scales)]

    def step(self) -> None:
        """The engine's program."""
        result = self._programs(self._bucket, self._state[0], self._state[1], self._packed)
        self._state = [result.kv_caches, result.rows]
        result.tokens.block_until_ready()

    def attention(self) -> None:
        """Of all layers, over blocks."""
        jax.block_until_ready(self._attention(self._q, self._state[0]))

    def contiguous(self) -> None:
        """The same over contiguous keys and values."""
        jax.block_until_ready(self._contiguous(self._q, self._kv))

    def products(self, form: str) -> None:
        """All products, in one of `FORMS`."""
        jax.block_until_ready(self._products[form](self._x, self._weights))

    def sampling(self) -> None:
        """Greedy."""
        jax.block_until_ready(self._sampling(self._logits))


def _most_steps() -> int:
    """Returns how many decode steps of the engine are timed, at most."""
    return 2 * _TURNS_PER_ROUND * CPU_SCHEDULER_STEPS * (_ROUNDS.value + 3)


def engine_steps(llm: LLM, case: Case) -> Generator[tuple[float, float]]:
    """Yields milliseconds of a decode step alone, and of one of several, again and again."""
    engine, scheduler = llm.engine, llm.engine.core.scheduler
    several = scheduler.num_scheduler_steps
    prompt_len = max(1, case.context - _most_steps() // 2)
    params = SamplingParams(
        temperature=0,
        max_tokens=_most_steps() + 4 * several,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )

    def ms(most: int) -> float:
        scheduler.num_scheduler_steps = most
        engine.step()  # the step in flight is one of before
        before, begin = engine.core.num_generated_tokens, time.perf_counter()
        for _ in range(_TURNS_PER_ROUND * several // most):
            engine.step()
        seconds = time.perf_counter() - begin
        return 1e3 * seconds * case.rows / (engine.core.num_generated_tokens - before)

    for i in range(case.rows):
        engine.add(engine.make_group([1 + i % 7] * prompt_len, params))
    while scheduler.num_waiting or scheduler.queues.placed == []:
        engine.step()
    while any(s.progress.num_computed < prompt_len for s in scheduler.queues.placed):
        engine.step()
    try:
        while True:
            yield ms(1), ms(several)
    finally:
        scheduler.num_scheduler_steps = several
        for request_id in list(scheduler.queues.unfinished):
            engine.abort(request_id)
        engine.drain()


def measure(llm: LLM, case: Case) -> dict[str, Any]:
    """Returns the figures of a case."""
    parts = Parts(llm, case)
    runs: dict[str, Callable[[], None]] = {
        name: getattr(parts, name) for name in ("step", "attention", "contiguous", "sampling")
    }
    runs |= {form: functools.partial(parts.products, form) for form in FORMS}
    calls = {name: _calls_for(run) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in (*runs, "engine", "offline")}
    steps = engine_steps(llm, case)
    next(steps)  # lets programs be compiled in the background, also for what is to come
    llm.runner.programs.wait_for_background()
    for _ in range(_ROUNDS.value):
        for name, run in runs.items():
            times[name].append(_ms(run, calls[name]))
        for name, found in zip(("engine", "offline"), next(steps), strict=True):
            times[name].append(found)
    steps.close()
    rounds = [dict(zip(times, values, strict=True)) for values in zip(*times.values(), strict=True)]
    for one in rounds:
        one["products"] = min(one.pop(form) for form in FORMS)
        one["floor"] = one["products"] + one["contiguous"] + one["sampling"]
        one["floor/step"] = one["floor"] / one["step"]
        one["step/engine"] = one["step"] / one["engine"]
        one["step/offline"] = one["step"] / one["offline"]
    medians = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    parts_of_it = ("products", "contiguous", "sampling", "floor")
    columns = (*parts_of_it, "step", "attention", "engine", "offline")
    return {
        "case": case.name,
        **{name: medians[name] for name in (*columns, *RATIOS)},
        "tokens/s": 1e3 * case.rows / medians["offline"],
    }


def worse_than(
    expected: dict[str, dict[str, float]], figures: list[dict[str, Any]], tolerance: float
) -> list[str]:
    """Returns in words which ratios are worse than expected by more than `tolerance`."""
    found = []
    for row in figures:
        for name in RATIOS:
            before = expected.get(row["case"], {}).get(name)
            if before is not None and row[name] < before * (1 - tolerance):
                found.append(f"{row['case']}: {name} is {row[name]:.2f}, expected {before:.2f}")
    return found


def main() -> None:
    """Prints the table and what is worse than expected."""
    figures = []
    figure = pictures.new_figure(6, 5) if _PLOT.value else None
    rows, contexts = (list(map(int, flag.value)) for flag in (_ROWS, _CONTEXTS))
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}; ms", flush=True)
    for model in _MODELS.value:
        for dtype in _DTYPES.value:
            llm = make_llm(model, dtype, max(rows), max(contexts))
            for context in contexts:
                for count in rows:
                    figures.append(measure(llm, Case(model, dtype, count, context)))
                    print(tables.render([list(figures[-1].values())]), file=sys.stderr, flush=True)
            llm.runner.kv_caches = ()
    tables.show("a decode step and its parts", figures)
    if _JSON.value:
        pathlib.Path(_JSON.value).write_text(json.dumps(figures, indent=1), encoding="utf-8")
    if figure and _PLOT.value:
        draw(figure, figures)
        pictures.save(figure, _PLOT.value)
    path = pathlib.Path(_EXPECTED.value)
    expected = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if _UPDATE.value:
        for row in figures:  # beyond 1 is chance
            expected[row["case"]] = {name: round(min(1.0, row[name]), 3) for name in RATIOS}
        path.write_text(json.dumps(expected, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return
    new = [row["case"] for row in figures if row["case"] not in expected]
    print("\nexpected as in", path.name, f"but for what is new: {', '.join(new)}" if new else "")
    if found := worse_than(expected, figures, _TOLERANCE.value):
        print("WORSE than expected:", *found, sep="\n  ")
        sys.exit(1)
    print("nothing is worse than expected")


def draw(figure: "pictures.Figure", figures: list[dict[str, Any]]) -> None:
    """Draws tokens per second of the engine, and of its floor, over the number of sequences."""
    panels: dict[str, dict[str, list[tuple[int, float, float]]]] = {}
    for row in figures:
        model, dtype, count, _, context = row["case"].split()
        line = panels.setdefault(f"{model} {dtype}", {}).setdefault(context, [])
        line.append((int(count), row["tokens/s"], 1e3 * int(count) / row["floor"]))
    figure.set_size_inches(1 + 5 * len(panels), 5)
    for axes, (title, lines) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for index, (context, points) in enumerate(lines.items()):
            counts, engine, floor = zip(*points, strict=True)
            axes.plot(
                counts, engine, marker="o", color=f"C{index}", label=f"{context} tokens of context"
            )
            axes.plot(counts, floor, linestyle=":", color=f"C{index}")
            axes.set_xscale("log", base=2)
            axes.set_xticks(counts, counts)
        axes.set(yscale="log", title=title, xlabel="running sequences", ylabel="tokens per second")
        axes.grid(which="both", alpha=0.2)
        axes.legend(fontsize="small", title="decoding; dotted: the floor")


# --- the parts ------------------------------------------------------------------------------------

FORMS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "x left": lambda x, weight: jnp.einsum("nk,ok->no", x, weight),
    "weight left": lambda x, weight: jax.lax.optimization_barrier(
        jnp.einsum("ok,nk->on", weight, x)
    ),
    "the models'": product,
}


def _all_products(form: Callable[..., jax.Array]) -> Callable[..., list[jax.Array]]:
    def run(x: dict[str, jax.Array], weights: list[jax.Array]) -> list[jax.Array]:
        return [jnp.max(form(x[str(weight.shape[1])], weight)) for weight in weights]

    return run


def _attend_contiguous(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attends to keys and values [B, Hk, C, D]."""
    grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[2])
    logits = jnp.einsum("bhgd,bhcd->bhgc", grouped, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits * q.shape[2] ** -0.5, axis=-1).astype(v.dtype)
    return jnp.einsum("bhgc,bhcd->bhgd", weights, v).reshape(q.shape)


def _weights(params: Any, tied: bool) -> list[jax.Array]:
    """Returns the matrices that a step multiplies by: all but an embedding that is only read."""
    named = nnx.to_flat_state(params)
    return [
        param[...].reshape(-1, param.shape[-1])
        for path, param in named
        if len(param.shape) > 1 and (tied or "embed_tokens" not in path)
    ]


def _greedy(num_rows: int) -> SamplingInputs:
    zeros = jnp.zeros(num_rows, jnp.int32)
    floats = zeros.astype(jnp.float32)
    seeds = jnp.zeros((num_rows, 2), jnp.uint32)
    return SamplingInputs(floats, zeros, floats + 1.0, floats, seeds, zeros, zeros)


def _normal(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.normal(jax.random.key(len(shape)), shape, dtype)


def _normal_like(array: jax.Array) -> jax.Array:
    return _normal(array.shape, array.dtype)


def _compiled(function: Callable[..., Any], *arguments: Any) -> Any:
    return jax.jit(function).lower(*arguments).compile()


def _calls_for(run: Callable[[], None]) -> int:
    """Returns how many calls take long enough to be timed."""
    return max(1, round(_MIN_MS.value / max(1e-3, _ms(run, 1))))


def _ms(run: Callable[[], None], calls: int) -> float:
    run()  # what lay in the processor's caches before is of another program
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return 1e3 * (time.perf_counter() - begin) / calls


if __name__ == "__main__":
    command_line.run(main)
