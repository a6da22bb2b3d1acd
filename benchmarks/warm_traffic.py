"""Counts what is compiled after a warm-up while traffic of all kinds is served: it must be nothing.

  python -m benchmarks.warm_traffic                # an hour of traffic, in some minutes
  python -m benchmarks.warm_traffic --minutes=5

`LLM(compile_ahead=True)` compiles every program. Then requests arrive at random, now and then many
at once: greedy and sampled ones, with penalties, bias, bad words, log-probabilities, several
completions and beams; short and long prompts, some with a common beginning; whole outputs, and
streams of which some are aborted. The clock is a simulated one, on which each step takes --step_ms,
so that an hour passes as fast as the steps run. Ends with status 1 if anything was compiled.
"""

import collections
import json
import pathlib
import sys
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from benchmarks.traffic import KINDS, arrivals, request
from pallas_paged.engine import LLM
from pallas_paged.models import command_line
from pallas_paged.models.demo import DEMO_MODEL

_MODEL = flags.DEFINE_string("model", str(DEMO_MODEL), "Folder with a checkpoint.")
_MINUTES = flags.DEFINE_float("minutes", 60.0, "Simulated time.", lower_bound=0.1)
_RATE = flags.DEFINE_float("rate", 1.0, "Requests per second, on average.", lower_bound=0.01)
_STEP_MS = flags.DEFINE_float("step_ms", 25.0, "What a step takes on the clock.", lower_bound=0.1)
_MAX_NUM_SEQS = flags.DEFINE_integer("max_num_seqs", 16, "Most sequences at once.", lower_bound=4)
_MAX_MODEL_LEN = flags.DEFINE_integer("max_model_len", 512, "Most tokens of one.", lower_bound=64)
_NUM_BLOCKS = flags.DEFINE_integer("num_blocks", 200, "Size of the pool: less than all may need.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the traffic.", lower_bound=0)
_JSON = flags.DEFINE_string("json", None, "Also write the figures to this file.")


class Figures(NamedTuple):
    """What was served, and what was compiled meanwhile.

    Attributes:
      requests: by kind.
      aborted: of them.
      steps: of the engine.
      tokens: generated.
      preemptions: times that a request lost its blocks.
      shapes: of steps, how many were used.
      compiled: programs, by whatever name JAX has for them.
    """

    requests: dict[str, int]
    aborted: int
    steps: int
    tokens: int
    preemptions: int
    shapes: int
    compiled: list[str]


class _Shapes:
    """Counts the shapes of steps."""

    def __init__(self) -> None:
        self.seen: set[Any] = set()

    def begin(self, step_id: int) -> None:
        pass

    def end(self, record: Any) -> None:
        self.seen.add(record.bucket)


def serve(llm: LLM) -> Figures:
    """Serves the flags' traffic on a simulated clock."""
    rng = np.random.default_rng(_SEED.value)
    seconds = _MINUTES.value * 60
    due = collections.deque(arrivals(rng, seconds, _RATE.value))
    engine, core = llm.engine, llm.engine.core
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **details: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(str(details.get("fun_name", details)))

    shapes, counts, num_aborted = _Shapes(), collections.Counter[str](), 0
    core.observers.append(shapes)
    jax.monitoring.register_event_duration_secs_listener(listen)
    now = 0.0
    with tqdm(total=round(seconds), unit="s", disable=None) as progress:
        while due or engine.has_unfinished:
            if not engine.has_unfinished:
                now = max(now, due[0])
            while due and due[0] <= now:
                due.popleft()
                kind = str(rng.choice(list(KINDS)))
                prompt, params = request(
                    rng, kind, llm.model_config.vocab_size, _MAX_MODEL_LEN.value
                )
                engine.add(engine.make_group(prompt, params))
                counts[kind] += 1
            engine.step()
            now += _STEP_MS.value / 1e3
            running = list(core.scheduler.queues.unfinished)
            if running and rng.random() < 0.002:
                engine.abort(str(rng.choice(running)))
                num_aborted += 1
            progress.update(min(round(now), round(seconds)) - progress.n)
    engine.check_idle()
    jax.monitoring.unregister_event_duration_listener(listen)
    preemptions = core.scheduler.num_preemptions
    return Figures(
        dict(counts),
        num_aborted,
        core.num_steps,
        core.num_generated_tokens,
        preemptions,
        len(shapes.seen),
        compiled,
    )


def main() -> None:
    """Prints what was served, and what was compiled."""
    llm = LLM(
        _MODEL.value,
        max_num_seqs=_MAX_NUM_SEQS.value,
        max_model_len=_MAX_MODEL_LEN.value,
        num_blocks=_NUM_BLOCKS.value,
        max_num_batched_tokens=128,
        compile_ahead=True,
    )
    found = serve(llm)
    print(
        f"{_MINUTES.value:g} minutes of traffic: {sum(found.requests.values())} requests "
        f"({', '.join(f'{count} {kind}' for kind, count in sorted(found.requests.items()))}), "
        f"{found.aborted} aborted, {found.preemptions} preemptions; {found.steps} steps in "
        f"{found.shapes} of {len(llm.runner.buckets.all())} shapes, {found.tokens} tokens"
    )
    print(f"compiled after the warm-up: {len(found.compiled)} programs", *found.compiled)
    if _JSON.value:
        pathlib.Path(_JSON.value).write_text(json.dumps(found._asdict(), indent=1))
    if found.compiled:
        sys.exit(1)


if __name__ == "__main__":
    command_line.run(main)
