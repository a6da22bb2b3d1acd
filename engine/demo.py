"""Streams completions side by side from one running batch: `make demo`.

Runs the small model that comes with the package; --model takes any other folder. After the batch
the same prompts run one at a time, so that the last line can say what batching gave here.
"""

import dataclasses
import logging
import time

from absl import flags
from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.logging import RichHandler
from rich.panel import Panel
from rich.text import Text

from pallas_paged.engine.llm import LLM
from pallas_paged.engine.sampling_params import SamplingParams
from pallas_paged.models import command_line
from pallas_paged.models.demo import DEMO_MODEL

_MODEL = flags.DEFINE_string("model", str(DEMO_MODEL), "Folder with a Hugging Face checkpoint.")
_PROMPT = flags.DEFINE_multi_string("prompt", None, "Prompts instead of the built-in ones.")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 160, "Most tokens to generate per prompt.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.5, "0 is greedy.")
_NUM_BLOCKS = flags.DEFINE_integer("num_blocks", 96, "Size of the KV pool in blocks.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the samples.")

_PROMPTS = (
    "def read_lines(path):\n",
    "class Stack:\n    def __init__(self):\n",
    "import os\nimport sys\n\ndef main(argv):\n",
    'def is_valid(name):\n    """Return True if',
    "class TestParser(unittest.TestCase):\n",
    "    for key, value in sorted(self.items()):\n",
)

_FRAMES_PER_SECOND = 10


@dataclasses.dataclass
class Lane:
    """One completion on the screen."""

    text: str
    num_tokens: int = 0
    state: str = "waiting"


def main() -> None:
    """Runs the prompts as one batch, then one at a time."""
    console = Console()
    logger = logging.getLogger("pallas_paged")
    logger.setLevel(logging.INFO)
    logger.addHandler(RichHandler(console=console, show_time=False, show_path=False))
    logger.propagate = False

    run(console, list(_PROMPT.value or _PROMPTS))


def run(console: Console, prompts: list[str]) -> None:
    """Loads the model, then completes the prompts as one batch and one at a time."""
    begin = time.perf_counter()
    llm = LLM(
        _MODEL.value,
        num_blocks=_NUM_BLOCKS.value,
        max_num_seqs=len(prompts),
        max_num_batched_tokens=max(32, len(prompts)),
    )
    # These requests ask for nothing that only the full variants of a step do.
    llm.runner.programs.compile(bucket for bucket in llm.runner.buckets.all() if bucket.is_common)
    console.print(f"Loaded and compiled in {time.perf_counter() - begin:.1f} s.")

    params = [
        SamplingParams(
            temperature=_TEMPERATURE.value,
            top_p=0.95,
            max_tokens=_MAX_TOKENS.value,
            seed=_SEED.value + index,
        )
        for index in range(len(prompts))
    ]
    batched = stream(llm, console, prompts, params)
    console.print("The same prompts, one at a time ...")
    begin = time.perf_counter()
    alone = [
        llm.generate(prompt, one, use_tqdm=False)[0]
        for prompt, one in zip(prompts, params, strict=True)
    ]
    seconds = time.perf_counter() - begin
    single = sum(len(output.outputs[0].token_ids) for output in alone) / seconds
    console.print(
        f"{batched:.0f} tokens/s in one batch, {single:.0f} tokens/s one at a time: "
        f"{batched / single:.1f} times as many."
    )


def stream(llm: LLM, console: Console, prompts: list[str], params: list[SamplingParams]) -> float:
    """Shows the completions as they grow; returns the batch's output tokens per second."""
    lanes = [Lane(prompt) for prompt in prompts]
    lane_of: dict[str, Lane] = {}
    peak = due = 0.0
    begin = time.perf_counter()
    with Live(
        console=console, refresh_per_second=_FRAMES_PER_SECOND, vertical_overflow="crop"
    ) as live:
        for output in llm.stream(prompts, params):
            if output.request_id not in lane_of:
                lane_of[output.request_id] = next(
                    lane for lane in lanes if lane.state == "waiting" and lane.text == output.prompt
                )
            lane, completion = lane_of[output.request_id], output.outputs[0]
            lane.text = f"{output.prompt}{completion.text}"
            lane.num_tokens = len(completion.token_ids)
            lane.state = completion.finish_reason or "running"
            peak = max(peak, llm.kv_cache_usage)
            now = time.perf_counter()
            rate = sum(lane.num_tokens for lane in lanes) / (now - begin)
            is_last = all(lane.state not in ("waiting", "running") for lane in lanes)
            if now < due and not is_last:
                continue  # a layout takes longer than a step
            due = now + 1 / _FRAMES_PER_SECOND
            status = (
                f"{sum(lane.state == 'running' for lane in lanes)} running, {rate:.0f} tokens/s, "
                f"KV pool {llm.kv_cache_usage:.0%} in use, {peak:.0%} at most"
            )
            live.update(screen(console, lanes, status))
    if not console.is_terminal:
        console.print()  # there, the last frame ends without one
    return rate


def screen(console: Console, lanes: list[Lane], status: str) -> Group:
    """Lays the lanes out in two columns over a status line, the ends of their texts in view."""
    rows = -(-len(lanes) // 2)
    height = max(4, (console.height - 2) // rows)
    width = console.width // 2
    panels = []
    for lane in lanes:
        lines = Text(lane.text, overflow="fold").wrap(console, width - 4)
        panels.append(
            Panel(
                Text("\n").join(lines[-(height - 2) :]),
                title=f"{lane.num_tokens} tokens, {lane.state}",
                width=width,
                height=height,
            )
        )
    return Group(Columns(panels, padding=0), Text(status, style="bold"))


if __name__ == "__main__":
    command_line.run(main)
