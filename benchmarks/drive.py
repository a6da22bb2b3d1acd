"""Serves a workload from this process: requests arrive on the clock, an `Engine` runs them.

And the same again over memory without paging, with the same model, programs and pool.
"""

import collections
import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.contiguous import ContiguousMemory, Reserve
from benchmarks.metrics import RequestTimes
from benchmarks.workloads import Workload
from pallas_paged.engine import LLM, RequestOutputKind, SamplingParams
from pallas_paged.engine.build import join
from pallas_paged.engine.core.scheduler import Scheduler
from pallas_paged.engine.engine import Engine

BASELINES: dict[str, Reserve] = {
    "static": "max",
    "orca-max": "max",
    "orca-pow2": "pow2",
    "orca-oracle": "oracle",
}
"""What is reserved for a sequence in each baseline; only `static` waits for a whole batch."""


class Run(NamedTuple):
    """What one run of a workload showed.

    Attributes:
      times: of each request.
      duration_s: from the start to the last token.
      mean_running: sequences that held memory, mean over the steps.
      peak_running: their maximum.
      kv_used_share: of the slots that sequences held, the share with a token; mean over steps.
      num_steps: steps dispatched.
      num_preemptions: times a sequence lost its memory.
    """

    times: list[RequestTimes]
    duration_s: float
    mean_running: float
    peak_running: int
    kv_used_share: float
    num_steps: int
    num_preemptions: int

    @property
    def figures(self) -> dict[str, float | int | None]:
        """The counts, under their names in the JSON file."""
        return {
            "mean_running": self.mean_running,
            "peak_running": self.peak_running,
            "kv_used_share": self.kv_used_share,
            "num_steps": self.num_steps,
            "num_preemptions": self.num_preemptions,
        }


def baseline_engine(llm: LLM, reserve: Reserve = "max") -> tuple[Engine, int]:
    """Returns an engine over `ContiguousMemory`, and how many of the longest sequences fit there.

    Model, pool, programs and limits are those of `llm`, whose own engine must be idle. Call
    `llm.engine.core.reset()` before that one goes on: the device holds other block tables then.
    """
    memory = ContiguousMemory(
        num_blocks=llm.engine.memory.num_usable_blocks + 1,
        block_size=llm.config.block_size,
        max_num_seqs=llm.config.max_num_seqs,
        max_model_len=llm.max_model_len,
        reserve=reserve,
    )
    scheduler = Scheduler(
        memory,
        max_num_seqs=llm.config.max_num_seqs,
        max_num_batched_tokens=llm.config.max_num_batched_tokens,
        max_model_len=llm.max_model_len,
        watermark_blocks=0,  # nobody grows beyond what is reserved
        num_scheduler_steps=llm.runner.buckets.num_steps,
        worth_while=llm.runner.buckets.worth_while,
    )
    engine = Engine(
        join(
            scheduler,
            memory,
            llm.runner,
            llm.runner.buckets,
            vocab_size=llm.model_config.vocab_size,
            max_model_len=llm.max_model_len,
            seed=llm.config.seed or 0,
            async_scheduling=llm.config.async_scheduling,
        )
    )
    return engine, memory.max_places


def drive(
    engine: Engine,
    workload: Workload,
    arrivals_s: Sequence[float],
    *,
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE,
    static_batch_size: int | None = None,
    logprobs: int | None = None,
) -> Run:
    """Runs the workload in real time and returns when each token came.

    Args:
      engine: an idle engine.
      workload: the requests.
      arrivals_s: when each arrives, in seconds from the start, ascending.
      output_kind: whether each token is waited for, or the end of each request alone: then all its
        tokens come at once.
      static_batch_size: hand the engine batches of at most so many requests, of those that have
        arrived, each when the one before has ended; None: hand over each request on arrival.
      logprobs: what all requests ask for, see `SamplingParams`.
    """
    requests, arrivals = workload.requests, list(arrivals_s)
    waiting = collections.deque(range(len(requests)))
    token_times: list[list[float]] = [[] for _ in requests]
    failed: set[int] = set()
    running, used = [], []
    core, scheduler = engine.core, engine.core.scheduler
    begin_steps, begin_preemptions = core.num_steps, scheduler.num_preemptions
    begin = time.monotonic()
    while waiting or engine.has_unfinished:
        now = time.monotonic() - begin
        room = len(requests) if static_batch_size is None else static_batch_size
        if static_batch_size is not None and engine.has_unfinished:
            room = 0
        while room and waiting and arrivals[waiting[0]] <= now:
            _add(engine, workload, waiting.popleft(), output_kind, logprobs)
            room -= 1
        if not engine.has_unfinished:
            time.sleep(max(0.0, arrivals[waiting[0]] - (time.monotonic() - begin)))
            continue
        outputs = engine.step()
        now = time.monotonic() - begin
        for output in outputs:
            index, completion = int(output.request_id), output.outputs[0]
            times = token_times[index]
            times += [now] * (len(completion.token_ids) - len(times))
            if completion.finish_reason == "abort":
                failed.add(index)
        if scheduler.num_running:
            running.append(scheduler.num_running)
            used.append(_used_share(engine))
    engine.check_idle()
    return Run(
        [
            RequestTimes(arrivals[i], tuple(times), len(request.prompt_token_ids), i in failed)
            for i, (request, times) in enumerate(zip(requests, token_times, strict=True))
        ],
        max(times[-1] for times in token_times if times),
        statistics.fmean(running),
        max(running),
        statistics.fmean(used),
        core.num_steps - begin_steps,
        scheduler.num_preemptions - begin_preemptions,
    )


def _add(
    engine: Engine,
    workload: Workload,
    index: int,
    output_kind: RequestOutputKind,
    logprobs: int | None,
) -> None:
    request = workload.requests[index]
    params = SamplingParams(
        temperature=0,
        max_tokens=request.num_output_tokens,
        ignore_eos=True,
        logprobs=logprobs,
        detokenize=False,
        output_kind=output_kind,
    )
    engine.add(engine.make_group(request.prompt_token_ids, params, request_id=str(index)))


def _used_share(engine: Engine) -> float:
    """Returns which share of the slots that sequences hold has a token in it."""
    memory = engine.memory
    if isinstance(memory, ContiguousMemory):
        return memory.num_tokens / memory.num_reserved_slots
    return engine.kv_stats().token_share
