"""How much of the host's work is hidden behind the device's.

  python -m benchmarks.overlap

Runs the real scheduler, block tables, planner and detokenizer over a mock device whose step takes
a fixed time, with and without one step in flight. With it, a step should take as long as the
longer of the two; without, as long as both together.
"""

import concurrent.futures
import json
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
from absl import flags

from pallas_paged.engine.build import join
from pallas_paged.engine.core.buckets import Bucket, Buckets
from pallas_paged.engine.core.plan import StepPlan, StepResult
from pallas_paged.engine.core.scheduler import Scheduler
from pallas_paged.engine.engine import Engine
from pallas_paged.engine.kv.block_memory import BlockTableMemory
from pallas_paged.engine.sampling_params import SamplingParams
from pallas_paged.engine.text.tokenizer import load_tokenizer
from pallas_paged.models import command_line
from pallas_paged.models.demo import DEMO_MODEL

_DEVICE_MS = flags.DEFINE_float(
    "device_ms", 100, "Duration of the mock device's step.", lower_bound=0
)
_NUM_SEQS = flags.DEFINE_integer("num_seqs", 256, "Sequences that decode at once.", lower_bound=1)
_NUM_STEPS = flags.DEFINE_integer("num_steps", 30, "Decode steps to time.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "File to write the figures to.")


class MockDevice:
    """An `Executor` that takes `step_s` seconds per step, one after the other, and samples token 5.

    Attributes:
      waited_s: how long the host waited for it.
    """

    def __init__(self, step_s: float):
        self.waited_s = 0.0
        self._step_s = step_s
        self._device = concurrent.futures.ThreadPoolExecutor(1)

    def choose(self, best: Bucket, all_that_fit: Callable[[], Sequence[Bucket]]) -> Bucket:
        """Nothing is compiled."""
        return best

    def expect(self, bucket: Bucket) -> None:
        """Nothing is compiled."""

    def dispatch(self, plan: StepPlan) -> concurrent.futures.Future[StepResult]:
        """Lets the device begin the step when it has ended the one before."""
        return self._device.submit(self._run, plan.bucket.num_seqs)

    def _run(self, num_seqs: int) -> StepResult:
        time.sleep(self._step_s)
        return StepResult(np.full((num_seqs, 1), 5, np.int32))

    def collect(self, in_flight: concurrent.futures.Future[StepResult]) -> StepResult:
        """Waits for the step."""
        begin = time.perf_counter()
        result = in_flight.result()
        self.waited_s += time.perf_counter() - begin
        return result

    def recover(self) -> None:
        """Nothing can fail."""


def measure(async_scheduling: bool) -> dict[str, float]:
    """Returns milliseconds per decode step: whole, and of the host's own work."""
    num_seqs, prompt_len = _NUM_SEQS.value, 16
    max_num_batched_tokens = max(512, num_seqs)
    memory = BlockTableMemory(
        num_blocks=num_seqs * 16 + 1, block_size=16, max_num_seqs=num_seqs, max_model_len=256
    )
    scheduler = Scheduler(
        memory,
        max_num_seqs=num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=256,
    )
    device = MockDevice(_DEVICE_MS.value / 1e3)
    engine = Engine(
        join(
            scheduler,
            memory,
            device,
            Buckets.for_limits(num_seqs, max_num_batched_tokens, memory.tables.shape[1]),
            vocab_size=1024,
            max_model_len=256,
            tokenizer=load_tokenizer(str(DEMO_MODEL)),
            async_scheduling=async_scheduling,
        )
    )
    params = SamplingParams(max_tokens=_NUM_STEPS.value + 20, ignore_eos=True)
    for _ in range(num_seqs):
        engine.add(engine.make_group(range(prompt_len), params))
    while scheduler.num_waiting or engine.core.num_steps < 12:
        engine.step()
    whole, host = [], []
    for _ in range(_NUM_STEPS.value):
        waited, begin = device.waited_s, time.perf_counter()
        engine.step()
        seconds = time.perf_counter() - begin
        whole.append(seconds * 1e3)
        host.append((seconds - (device.waited_s - waited)) * 1e3)
    return {"step_ms": statistics.median(whole), "host_ms": statistics.median(host)}


def main() -> None:
    """Prints both and the share of the host's work that disappeared."""
    serial, overlapped = measure(async_scheduling=False), measure(async_scheduling=True)
    hidden = (serial["step_ms"] - overlapped["step_ms"]) / serial["host_ms"]
    print(f"{_NUM_SEQS.value} sequences, mock device step {_DEVICE_MS.value:.1f} ms")
    print(f"{'':22}{'step ms':>10}{'host ms':>10}")
    print(f"{'one after the other':22}{serial['step_ms']:10.2f}{serial['host_ms']:10.2f}")
    print(f"{'one step in flight':22}{overlapped['step_ms']:10.2f}{overlapped['host_ms']:10.2f}")
    print(f"share of the host's work hidden: {hidden:.0%}")
    if _JSON.value:
        figures = {"serial": serial, "overlapped": overlapped, "hidden_share": hidden}
        with open(_JSON.value, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=2)


if __name__ == "__main__":
    command_line.run(main)
