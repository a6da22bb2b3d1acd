"""How well the cost model says what a real engine's steps take, once it is calibrated on them.

An engine serves requests one step at a time, and each step's seconds are kept with its work. The
constants of `cost_model.Costs`, and the host's seconds, are fitted to half of the requests. The
errors are those of the other half, whose steps they have not seen: of single steps, and of the
whole run, which the same scheduler repeats on a simulated device.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import least_squares

from benchmarks import workloads
from benchmarks.drive import drive
from benchmarks.simulation.cost_model import Costs, Work
from benchmarks.simulation.device import SimulatedDevice, Way, works_of
from benchmarks.simulation.serve import serve
from benchmarks.simulation.systems import Simulated
from benchmarks.workloads import Workload
from pallas_paged.engine import LLM, RequestOutputKind
from pallas_paged.engine.core.buckets import Bucket
from pallas_paged.engine.core.engine_core import EngineCore
from pallas_paged.engine.core.plan import Executor, StepPlan, StepResult
from pallas_paged.engine.core.planner import Planner
from pallas_paged.engine.core.scheduler import Scheduler
from pallas_paged.engine.kv.block_memory import BlockTableMemory
from pallas_paged.engine.kv.sharing import blocks_for
from pallas_paged.models import load_config

_MAX_MODEL_LEN, _MAX_NUM_SEQS, _MAX_NUM_BATCHED_TOKENS, _BLOCK_SIZE = 512, 32, 512, 16
FITTED = ("weights_s", "token_s", "kv_token_s", "pair_s", "step_s")
"""The constants that are fitted; the others are of what these runs do not do."""
_GUESS = (1e-3, 1e-4, 1e-7, 1e-8, 5e-4)


class Timed(NamedTuple):
    """A step's work, and what it took."""

    work: Work
    seconds: float


class Fit(NamedTuple):
    """What calibration found.

    Attributes:
      costs: the constants.
      num_steps: that they were fitted to.
      step_error: median relative error of single steps that they were not fitted to.
      run_ratio: simulated seconds of a run that they were not fitted to, by those it took.
    """

    costs: Costs
    num_steps: int
    step_error: float
    run_ratio: float


class TimedDevice(Executor):
    """Passes everything on to a device, and keeps what each step does and takes."""

    def __init__(self, device: Executor, way: Way) -> None:
        self._device, self._way = device, way
        self.steps: list[Timed] = []

    def choose(self, best: Bucket, all_that_fit: Callable[[], Sequence[Bucket]]) -> Bucket:
        """As the device does."""
        return self._device.choose(best, all_that_fit)

    def expect(self, bucket: Bucket) -> None:
        """As the device does."""
        self._device.expect(bucket)

    def dispatch(self, plan: StepPlan) -> tuple[float, Work, Any]:
        """Notes when the step began."""
        (work,), _, _ = works_of(plan, self._way)
        return time.perf_counter(), work, self._device.dispatch(plan)

    def collect(self, in_flight: tuple[float, Work, Any]) -> StepResult:
        """Notes when it ended."""
        begin, work, handle = in_flight
        result = self._device.collect(handle)
        self.steps.append(Timed(work, time.perf_counter() - begin))
        return result

    def recover(self) -> None:
        """As the device does."""
        self._device.recover()


def calibrate(llm: LLM, num_requests: int, seed: int) -> Fit:
    """Fits the model to one half of the requests and tries it on the other.

    Args:
      llm: an idle engine of `make_llm`.
      num_requests: of each half.
      seed: of both.
    """
    way = Way(pads=True, block_size=_BLOCK_SIZE)
    core = llm.engine.core
    device = TimedDevice(core.executor, way)
    core.executor = device
    try:
        _drive(
            llm, make_workload(llm, num_requests, 3 * seed)
        )  # first touches of memory cost extra
        device.steps.clear()
        known_s = _drive(llm, make_workload(llm, num_requests, 3 * seed + 1))
        known = list(device.steps)
        device.steps.clear()
        workload = make_workload(llm, num_requests, 3 * seed + 2)
        seconds = _drive(llm, workload)
        unseen = list(device.steps)
    finally:
        core.executor = device._device
    costs = fit(known)
    host_s = max(0.0, (known_s - sum(step.seconds for step in known)) / len(known))
    simulated = _simulated(llm, costs, way._replace(host_s=host_s), seed)
    outcome = serve(
        simulated, workload.requests, [0.0] * num_requests, over_s_per_token=float("inf")
    )
    errors = [abs(costs.seconds(step.work) / step.seconds - 1) for step in unseen]
    return Fit(costs, len(known), statistics.median(errors), outcome.duration_s / seconds)


def fit(steps: Sequence[Timed]) -> Costs:
    """Returns the constants with the least relative errors, outliers of a busy machine aside."""
    works = np.array([(s.work.num_tokens, *s.work.decodes, *s.work.prompts) for s in steps], float)
    seconds = np.array([step.seconds for step in steps])

    def errors(logs: np.ndarray) -> np.ndarray:
        weights_s, token_s, kv_token_s, pair_s, step_s = np.exp(logs)
        tokens, kv_tokens, pairs, prompt_kv_tokens, prompt_pairs = works.T
        products = np.maximum(weights_s, tokens * token_s)
        attention = np.maximum(kv_tokens * kv_token_s, pairs * pair_s)
        attention += np.maximum(prompt_kv_tokens * kv_token_s, prompt_pairs * pair_s)
        return (step_s + products + attention) / seconds - 1

    found = least_squares(errors, np.log(_GUESS), loss="soft_l1", f_scale=0.1)
    return Costs(**dict(zip(FITTED, np.exp(found.x).tolist(), strict=True)))


def make_llm(folder: str) -> LLM:
    """Returns an engine that makes one step at a time, and none in flight, compiled."""
    max_model_len = min(_MAX_MODEL_LEN, load_config(folder).default_max_model_len)
    llm = LLM(
        folder,
        load_format="dummy",
        max_model_len=max_model_len,
        max_num_seqs=_MAX_NUM_SEQS,
        max_num_batched_tokens=_MAX_NUM_BATCHED_TOKENS,
        block_size=_BLOCK_SIZE,
        num_blocks=1 + _MAX_NUM_SEQS * blocks_for(max_model_len, _BLOCK_SIZE),
        enable_prefix_caching=False,
        num_scheduler_steps=1,
        async_scheduling=False,
    )
    llm.runner.programs.compile(bucket for bucket in llm.runner.buckets.all() if bucket.is_common)
    return llm


def make_workload(llm: LLM, num_requests: int, seed: int) -> Workload:
    """Returns requests with a quarter of ShareGPT's lengths."""
    return workloads.draw(
        "sharegpt",
        num_requests,
        scale=0.25,
        max_model_len=llm.max_model_len,
        vocab_size=llm.model_config.vocab_size,
        seed=seed,
    )


def _drive(llm: LLM, workload: Workload) -> float:
    """Returns the seconds of a workload that is there at the start."""
    arrivals_s = [0.0] * len(workload.requests)
    kind = RequestOutputKind.FINAL_ONLY
    return drive(llm.engine, workload, arrivals_s, output_kind=kind).duration_s


def _simulated(llm: LLM, costs: Costs, way: Way, seed: int) -> Simulated:
    """Returns the same engine on a simulated device."""
    buckets = llm.runner.buckets
    memory = BlockTableMemory(
        num_blocks=llm.engine.memory.num_usable_blocks + 1,
        block_size=_BLOCK_SIZE,
        max_num_seqs=_MAX_NUM_SEQS,
        max_model_len=llm.max_model_len,
    )
    scheduler = Scheduler(
        memory,
        max_num_seqs=_MAX_NUM_SEQS,
        max_num_batched_tokens=_MAX_NUM_BATCHED_TOKENS,
        max_model_len=llm.max_model_len,
        worth_while=buckets.worth_while,
    )
    vocab_size = llm.model_config.vocab_size
    device = SimulatedDevice(costs, way, vocab_size=vocab_size, seed=seed)
    planner = Planner(memory, buckets, device.choose)
    core = EngineCore(scheduler, planner, device, vocab_size=vocab_size, async_scheduling=False)
    return Simulated(core, memory, device)
