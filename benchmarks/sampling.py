"""Times the choice of the next tokens, option by option, beside a model's decode step.

`decode step` is a whole greedy step of a Llama with random weights, by default of 100 million
parameters: 768 x 12 layers, 12 query and 4 KV heads, the vocabulary of the table, one token for
each row. The rows below it time what follows the logits, with the same options in all rows, on
normally distributed logits: first the plain variant of a step, then what the full one adds. The
programs take turns, so that a busy machine slows all of them alike; "of step" is a row's share of
the decode step, the figure to compare between machines, as is the ratio to the matmul
[64, 768] x [768, 16384], a small model's own logits. `sort` sorts each row's logits and does
nothing else.

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
from absl import flags
from flax import nnx

from pallas_paged.engine import SamplingParams
from pallas_paged.engine.core.buckets import Buckets
from pallas_paged.engine.core.logprobs import packed_width, width_for
from pallas_paged.engine.core.plan import StepPlan
from pallas_paged.engine.core.planner import Planner
from pallas_paged.engine.core.request import SequenceGroup
from pallas_paged.engine.core.scheduler import Scheduler
from pallas_paged.engine.core.step_inputs import seed_words
from pallas_paged.engine.device.logprobs import pack
from pallas_paged.engine.device.placement import Placement
from pallas_paged.engine.device.row_state import LogitInputs, RowState, apply_rules, count_tokens
from pallas_paged.engine.device.runner import ModelRunner
from pallas_paged.engine.device.sampling import SamplingInputs, sample
from pallas_paged.engine.kv.block_memory import BlockTableMemory
from pallas_paged.models import command_line
from pallas_paged.models.decoder import Decoder
from pallas_paged.models.llama import LlamaConfig

_SHAPES = flags.DEFINE_list("shapes", ["64x16384", "16x131072"], "Rows x vocabulary.")
command_line.integers_only("shapes", "64x16384")
_SPREAD = flags.DEFINE_float(
    "spread", 2.0, "Standard deviation of the logits; a larger one makes top-p keep fewer tokens."
)
_ROUNDS = flags.DEFINE_integer("rounds", 20, "Calls timed per figure.", lower_bound=1)
_HIDDEN = flags.DEFINE_integer("hidden", 768, "Size of the model's hidden states.", lower_bound=8)
_LAYERS = flags.DEFINE_integer("layers", 12, "Layers of the model.", lower_bound=1)
_HEADS = flags.DEFINE_string("heads", "12/4", "Query / KV heads of the model.")
command_line.integers_only("heads", "12/4")
_CONTEXT = flags.DEFINE_integer("context", 256, "Tokens in front of each new one.", lower_bound=1)
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
    "temperature=0.7 top_k=50 top_p=0.95": {"temperature": 0.7, "top_k": 50, "top_p": 0.95},
}

FULL: dict[str, dict[str, int]] = {
    "full: nothing used": {},
    "full: penalties": {"penalties": 1},
    "full: bias, masks": {"bias": 1},
    "full: grammar": {"mask": 1},
    "full: logprobs": {"logprobs": 1},
    "full: all of it": {"penalties": 1, "bias": 1, "mask": 1, "logprobs": 1},
}
"""Beside greedy; bias, allowed tokens, bad words and min_tokens cost the same."""


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


def full_program(
    logits: jax.Array, penalties: int = 0, bias: int = 0, mask: int = 0, logprobs: int = 0
) -> Callable[[], jax.Array]:
    """Returns a greedy choice with what a full step does, the row state updated in place."""
    num_rows, vocab_size = logits.shape
    width = width_for(20, vocab_size)
    rows = jnp.arange(num_rows, dtype=jnp.int32)
    used = [jnp.full(num_rows, flag, jnp.int32) for flag in (bias, penalties, mask)]
    factors = [jnp.full(num_rows, factor, jnp.float32) for factor in (1.2, 0.5, 0.2)]
    inputs = LogitInputs(rows, *used, *factors)
    greedy = inputs_of(num_rows, temperature=0.0)
    state = RowState.zeros(num_rows, vocab_size)
    masks = ~state.masks  # every token may follow
    looks = Placement().may_look

    def run(
        counts: jax.Array,
        bias: jax.Array,
        masks: jax.Array,
        last: jax.Array,
        logits: jax.Array,
        inputs: LogitInputs,
        wants_logprobs: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        counts = count_tokens(counts, jnp.where(inputs.uses_penalties == 1, rows, num_rows), last)
        ruled = apply_rules(logits, RowState(counts, bias, masks), inputs, looks=looks)
        tokens = sample(ruled, greedy, looks=looks)
        if not looks:
            return counts, tokens, pack(logits, tokens, width)
        packed = jax.lax.cond(
            wants_logprobs == 1,
            lambda: pack(logits, tokens, width),
            lambda: jnp.zeros((num_rows, packed_width(width)), jnp.int32),
        )
        return counts, tokens, packed

    jitted = jax.jit(run, donate_argnums=0)
    held = [state.counts, jnp.zeros(num_rows, jnp.int32)]

    def call() -> jax.Array:
        counts, last = held
        held[0], held[1], packed = jitted(
            counts, state.bias, masks, last, logits, inputs, jnp.int32(logprobs)
        )
        return packed

    return call


def decode_step(num_rows: int, vocab_size: int) -> Callable[[], jax.Array]:
    """Returns the greedy decode step of the flags' model, the same tokens each time."""
    num_q_heads, num_kv_heads = map(int, _HEADS.value.split("/"))
    context = _CONTEXT.value
    shape = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=_HIDDEN.value,
        intermediate_size=_HIDDEN.value * 8 // 3,
        num_layers=_LAYERS.value,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_HIDDEN.value // num_q_heads,
        max_position_embeddings=context + 2,
        tie_word_embeddings=True,
    )
    model = Decoder(shape, dtype=jnp.float32, rngs=nnx.Rngs(0))
    num_blocks = num_rows * -(-(context + 2) // 16) + 2
    memory = BlockTableMemory(
        num_blocks=num_blocks, block_size=16, max_num_seqs=num_rows, max_model_len=context + 2
    )
    buckets = Buckets.for_limits(num_rows, num_rows, memory.tables.shape[1])
    runner = ModelRunner(
        model,
        num_blocks=num_blocks,
        block_size=16,
        kv_cache_dtype=jnp.dtype(jnp.float32),
        max_num_seqs=num_rows,
        buckets=buckets,
    )
    plan = whole_decode_step(
        memory, buckets, num_rows, tuple(t % vocab_size for t in range(context))
    )
    runner.dispatch(plan)  # with all entries of the block tables, which stay there
    plan = plan._replace(table_edits=())
    return lambda: runner.dispatch(plan).tokens


def whole_decode_step(
    memory: BlockTableMemory, buckets: Buckets, num_rows: int, prompt: tuple[int, ...]
) -> StepPlan:
    """Returns the first step in which every row has its prompt behind it."""
    scheduler = Scheduler(
        memory,
        max_num_seqs=num_rows,
        max_num_batched_tokens=num_rows * len(prompt),
        max_model_len=len(prompt) + 2,
    )
    params = SamplingParams(temperature=0, seed=0)
    for row in range(num_rows):
        scheduler.add(SequenceGroup(f"{row}", prompt, max_tokens=2, sampling_params=params))
    while True:
        step = scheduler.schedule()
        assert step is not None, "nothing is left to schedule"
        if step.batch.starts.tolist() == [len(prompt)] * num_rows:
            return Planner(memory, buckets).plan(step).plan
        scheduler.commit(step, [0] * len(step.batch.rows))


def programs(num_rows: int, vocab_size: int) -> dict[str, Callable[[], jax.Array]]:
    """Returns a call without arguments per row of the table, compiled."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((num_rows, vocab_size)).astype(np.float32) * _SPREAD.value
    logits = jnp.asarray(values)
    x, w = jnp.ones((64, 768)), jnp.ones((768, 16384))
    jitted_matmul = jax.jit(jnp.matmul)
    jitted_sample = jax.jit(functools.partial(sample, looks=Placement().may_look))
    calls: dict[str, Callable[[], jax.Array]] = {"matmul": lambda: jitted_matmul(x, w)}
    calls["decode step"] = decode_step(num_rows, vocab_size)
    if _SORT.value:
        jitted_sort = jax.jit(jnp.sort)
        calls["sort"] = lambda: jitted_sort(logits)
    for name, options in OPTIONS.items():
        inputs = inputs_of(num_rows, **options)
        calls[name] = functools.partial(jitted_sample, logits, inputs)
    for name, used in FULL.items():
        calls[name] = full_program(logits, **used)
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


def main() -> None:
    """Prints a table per shape."""
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
        print(f"\n{shape:36} {'median ms':>10} {'min ms':>10} {'of matmul':>10} {'of step':>8}")
        for name, values in times.items():
            of_matmul = medians[name] / medians["matmul"]
            of_step = medians[name] / medians["decode step"]
            print(
                f"{name:36} {medians[name]:10.2f} {min(values):10.2f} {of_matmul:10.2f} "
                f"{of_step:8.1%}"
            )
    if _JSON.value:
        with open(_JSON.value, "w") as file:
            json.dump(figures, file, indent=2)


if __name__ == "__main__":
    command_line.run(main)
