"""What a step of the engine costs the host, beside a device that takes no time.

Each row is a decode step of `num_seqs` sequences that already have `num_tokens` output tokens each.
Outputs are cumulative: a stream gives out all tokens so far with every step; `generate` wants the
last output only. In the last row a prompt waits for memory that begins with `waiting_len` tokens
which are cached, and has as many more; a step's blocks are cached too.

  python -m benchmarks.host_step --num_seqs=256 --num_tokens=4000 --json=out.json
"""

import json
import statistics
import time

import numpy as np
from absl import flags

from benchmarks import tables
from pallas_paged.block_tables import BlockTables
from pallas_paged.engine.core import Engine
from pallas_paged.engine.logprobs import TokenLogprobs
from pallas_paged.engine.memory import BlockTableMemory
from pallas_paged.engine.outputs import logprobs_by_token
from pallas_paged.engine.runner import Collected, InFlight
from pallas_paged.engine.sampling_params import SamplingParams
from pallas_paged.engine.scheduler import ScheduledStep, Scheduler
from pallas_paged.models import command_line

_NUM_SEQS = flags.DEFINE_integer("num_seqs", 256, "Sequences that decode at once.", lower_bound=1)
_NUM_TOKENS = flags.DEFINE_integer("num_tokens", 4000, "Output tokens of each.", lower_bound=1)
_NUM_STEPS = flags.DEFINE_integer("num_steps", 20, "Decode steps to time.", lower_bound=1)
_WAITING_LEN = flags.DEFINE_integer("waiting_len", 16384, "See above.", lower_bound=16)
_JSON = flags.DEFINE_string("json", None, "Also write the figures, in milliseconds, to this file.")

_TOKEN = 5
_BLOCK_SIZE = 16
_FOUND = TokenLogprobs(-1.0, 1, [_TOKEN, 6], [-1.0, -2.0])


class MockRunner:
    """A device that takes no time, and samples the same token everywhere."""

    def dispatch(self, step: ScheduledStep, state: BlockTables) -> InFlight:
        """Does nothing: what a step's inputs cost is the device's side of the border."""
        return InFlight(step, np.full(len(step.scheduled), _TOKEN, np.int32))

    def collect(self, in_flight: InFlight) -> Collected:
        """Returns the token, with log-probabilities where they are asked for."""
        scheduled = in_flight.step.scheduled
        asked = [share.sequence.sampling_params.logprobs is not None for share in scheduled]
        return Collected([_TOKEN] * len(scheduled), [_FOUND if one else None for one in asked])

    def recover(self) -> None:
        """Nothing can fail."""


def measure(final_only: bool, logprobs: int | None, waits: bool = False) -> dict[str, object]:
    """Returns the milliseconds of a decode step."""
    num_seqs, num_tokens, waiting_len = _NUM_SEQS.value, _NUM_TOKENS.value, _WAITING_LEN.value
    longest = num_tokens + _NUM_STEPS.value + 16
    max_model_len = longest + 3 * waiting_len
    num_blocks = num_seqs * -(-longest // _BLOCK_SIZE) + 1 + waiting_len // _BLOCK_SIZE
    memory = BlockTableMemory(
        num_blocks=num_blocks,
        block_size=_BLOCK_SIZE,
        max_num_seqs=num_seqs + 1,
        max_model_len=max_model_len,
        enable_prefix_caching=True,
    )
    scheduler = Scheduler(
        memory,
        max_num_seqs=num_seqs + 1,
        max_num_batched_tokens=num_seqs * longest + waiting_len,
        max_model_len=max_model_len,
    )
    engine = Engine(scheduler, memory, MockRunner(), vocab_size=1024, max_model_len=max_model_len)
    params = SamplingParams(max_tokens=longest - 8, ignore_eos=True, logprobs=logprobs)
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 1024, 2 * waiting_len).tolist()
    if waits:
        engine.add(engine.make_group(prompt[: waiting_len + 1], SamplingParams(max_tokens=1)))
        engine.drain()
    for _ in range(num_seqs):
        group = engine.make_group(rng.integers(0, 1024, 8).tolist(), params)
        engine.add(group, final_only=final_only)
        (sequence,) = group.sequences  # as if it had lost its memory
        sequence.token_ids += [_TOKEN] * num_tokens
        if logprobs is not None:
            sequence.logprobs += [logprobs_by_token(_TOKEN, _FOUND, None)] * num_tokens
    for _ in range(4):
        engine.step()
    if waits:
        engine.add(engine.make_group(prompt, SamplingParams(max_tokens=1)))
    seconds = []
    for _ in range(_NUM_STEPS.value):
        begin = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - begin)
    assert scheduler.num_running == num_seqs, "not a step of decodes"
    assert scheduler.num_waiting == waits, "there is room: raise waiting_len"
    return {"ms": 1e3 * statistics.median(seconds), "max ms": 1e3 * max(seconds)}


def main() -> None:
    """Prints a row for each kind of request."""
    kinds = [("every step", logprobs, False) for logprobs in (None, 1)]
    kinds += [("the last", None, False), ("the last", 1, False), ("the last", None, True)]
    rows = [
        {"outputs": outputs, "logprobs": logprobs, "waits": waits}
        | measure(outputs == "the last", logprobs, waits)
        for outputs, logprobs, waits in kinds
    ]
    tables.show(
        f"a step of {_NUM_SEQS.value} sequences with {_NUM_TOKENS.value} output tokens each", rows
    )
    if _JSON.value:
        with open(_JSON.value, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=2)


if __name__ == "__main__":
    command_line.run(main)
