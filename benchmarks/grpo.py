"""GRPO in plain JAX: the engine samples in the trainer's process, from the trainer's own arrays.

    python -m benchmarks.grpo --steps=30 --seed=0

trains the demo model, in float32, to write what a rule rewards: by default digits, of which it
writes next to none at first. A step samples a group of completions for each prompt, trains on them
and hands the new weights to the engine. Its line says how much the completions were rewarded, how
far the engine's log-probabilities were from the trainer's before training, and where the seconds
went; the first step compiles, too. The loop is in `benchmarks.grpo_loop`.
"""

import functools
import json
from collections.abc import Callable

import optax
from absl import flags
from flax import nnx

from benchmarks.grpo_loop import grpo
from pallas_paged.engine import LLM, CompletionOutput, SamplingParams
from pallas_paged.models import command_line, load_model
from pallas_paged.models.demo import DEMO_MODEL

REWARDS: dict[str, Callable[[str], bool]] = {"digits": str.isdigit, "letters": str.islower}
"""What characters may be rewarded for being: digits, small letters."""

_STEPS = flags.DEFINE_integer("steps", 30, "Batches that are sampled.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the samples.", lower_bound=0)
_GROUP_SIZE = flags.DEFINE_integer("group_size", 8, "Completions of a prompt.", lower_bound=2)
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 16, "Most tokens of a completion.", lower_bound=1)
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 3e-4, "Adam's learning rate.", lower_bound=0)
_REWARD = flags.DEFINE_enum(
    "reward", "digits", list(REWARDS), "Characters whose share of a completion is its reward."
)
_JSON = flags.DEFINE_string("json", None, "Also write the figures to this file.")

PROMPTS = (
    "x = ",
    "def ",
    "return ",
    "# The ",
    "for i in range(",
    "import os\nimport ",
    "class Point:\n    ",
    'if __name__ == "__main__":\n    ',
)


def share(kind: str, completion: CompletionOutput) -> float:
    """Returns how much of a completion's text is of a kind, one of `REWARDS`; 0 without text."""
    assert completion.text is not None
    return sum(map(REWARDS[kind], completion.text)) / max(1, len(completion.text))


def main() -> None:
    """Trains, and prints a line for each step."""
    model = load_model(DEMO_MODEL, dtype="float32")
    llm = LLM.from_model(model, DEMO_MODEL, seed=_SEED.value)
    optimizer = nnx.Optimizer(model, optax.adam(_LEARNING_RATE.value), wrt=nnx.Param)
    reward = functools.partial(share, _REWARD.value)
    params = SamplingParams(n=_GROUP_SIZE.value, max_tokens=_MAX_TOKENS.value, logprobs=0)
    steps: list[dict[str, float]] = []
    print("step  reward  difference  sample s  train s  update s")
    for step in grpo(llm, model, optimizer, PROMPTS, reward, params, _STEPS.value):
        print(
            f"{len(steps):4}  {step.reward:6.3f}  {step.difference:10.1e}  {step.sample_s:8.3f}  "
            f"{step.train_s:7.3f}  {step.update_s:8.4f}",
            flush=True,
        )
        steps.append(step._asdict())
    if _JSON.value:
        with open(_JSON.value, "w", encoding="utf-8") as file:
            json.dump(steps, file, indent=2)


if __name__ == "__main__":
    command_line.run(main)
