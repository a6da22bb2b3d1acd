"""Serves a trace on a simulated device: when each request ended, and what the memory held."""

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.contiguous import ContiguousMemory, Shares
from benchmarks.simulation.systems import Simulated
from benchmarks.workloads import Request
from pallas_paged.engine.core.request import SequenceGroup
from pallas_paged.engine.kv.stats import kv_stats
from pallas_paged.engine.sampling_params import BeamSearchParams, SamplingParams

_SAMPLE_EVERY = 16
_GREEDY = SamplingParams(temperature=0, seed=0)


class Outcome(NamedTuple):
    """What serving a trace showed.

    Attributes:
      normalized_latency_s: the paper's metric, s/token; where the run was given up a lower bound.
      is_over: whether it was given up, because the metric was certainly above the limit of the run.
      duration_s: simulated.
      mean_running: requests that held memory, mean over the steps while requests arrived.
      num_steps: of the engine.
      num_preemptions: times that a request lost its memory.
      num_tokens: computed.
      token_share: of the slots that sequences hold, the share with a token, mean over the steps.
      shares: of all slots, see `Shares`; of contiguous memory only.
      saved_share: of the blocks that samples and beams would hold, the share that sharing saves.
      cached_share: of the prompts' tokens, those found in the prefix cache.
    """

    normalized_latency_s: float
    is_over: bool
    duration_s: float
    mean_running: float
    num_steps: int
    num_preemptions: int
    num_tokens: int
    token_share: float
    shares: Shares | None
    saved_share: float
    cached_share: float


@dataclasses.dataclass(frozen=True)
class Kind:
    """What each request of a trace asks for: `num_seqs` samples, or beams."""

    num_seqs: int = 1
    is_beam_search: bool = False


class _Progress:
    """Who has ended, and how bad the metric is at least."""

    def __init__(
        self, requests: Sequence[Request], arrivals_s: Sequence[float], num_parts: int
    ) -> None:
        """`num_parts` have to end until a request has ended."""
        self._weights = [1 / request.num_output_tokens for request in requests]
        self._arrivals_s = arrivals_s
        self._left = [num_parts] * len(requests)
        self._sum = self._open_weight = self._open_due = 0.0

    def begin(self, index: int) -> None:
        """A request runs from now on, or is in the queue."""
        self._open_weight += self._weights[index]
        self._open_due += self._weights[index] * self._arrivals_s[index]

    def end(self, index: int, now_s: float) -> None:
        """A part of it has ended; the last one ends it."""
        self._left[index] -= 1
        if self._left[index]:
            return
        weight, arrival_s = self._weights[index], self._arrivals_s[index]
        self._sum += weight * (now_s - arrival_s)
        self._open_weight -= weight
        self._open_due -= weight * arrival_s

    def least_mean_s(self, now_s: float) -> float:
        """Returns the metric if all that are open ended now, and all others at once."""
        waiting = self._open_weight * now_s - self._open_due
        return (self._sum + waiting) / len(self._weights)


def serve(
    simulated: Simulated,
    requests: Sequence[Request],
    arrivals_s: Sequence[float],
    kind: Kind = Kind(),
    *,
    shares: bool = True,
    is_static: bool = False,
    over_s_per_token: float = math.inf,
    drains: bool = True,
) -> Outcome:
    """Serves requests that arrive at these simulated seconds, ascending.

    Args:
      simulated: an idle engine, used up.
      requests: what arrives.
      arrivals_s: when.
      kind: what each asks for.
      shares: whether samples share blocks; else each is a request of its own.
      is_static: whether a batch of what has arrived starts only when the one before has ended, as
        large as memory for the longest lengths allows, and is answered as a whole.
      over_s_per_token: the run is given up when its normalized latency is certainly above this.
      drains: whether it goes on behind the last arrival until all have ended.
    """
    core, device, memory = simulated.core, simulated.device, simulated.memory
    copies = 1 if shares else kind.num_seqs
    num_parts = 1 if kind.is_beam_search and shares else kind.num_seqs
    waiting = collections.deque(range(len(requests)))
    progress = _Progress(requests, arrivals_s, num_parts)
    running: list[int] = []
    seen = _Seen()
    is_over, num_cached, num_prompt = False, 0, 0
    ended: list[int] = []
    batch_size = len(requests)
    if is_static:
        assert isinstance(memory, ContiguousMemory)
        batch_size = max(1, memory.max_places // copies)
    while waiting or (drains and core.has_unfinished):
        room = 0 if is_static and core.has_unfinished else batch_size
        while room and waiting and arrivals_s[waiting[0]] <= device.now_s:
            index = waiting.popleft()
            progress.begin(index)
            for copy in range(copies):
                core.add(make_group(f"{index}.{copy}", requests[index], kind, shares))
            room -= 1
        if not core.has_unfinished:
            device.now_s = max(device.now_s, arrivals_s[waiting[0]])
            continue
        outputs = core.step()
        for output in outputs.outputs:
            if output.finish_reason is None or not (num_parts > 1 or output.is_last):
                continue
            index = int(output.request_id.split(".")[0])
            ended.append(index)
            num_cached += output.stats.num_cached_tokens
            num_prompt += len(requests[index].prompt_token_ids)
        if not (is_static and core.has_unfinished):
            for index in ended:
                progress.end(index, device.now_s)
            ended.clear()
        if waiting:
            running.append(core.scheduler.num_running)
        if core.num_steps % _SAMPLE_EVERY == 0:
            seen.look(simulated)
            if progress.least_mean_s(device.now_s) > over_s_per_token:
                is_over = True
                break
    latency_s = progress.least_mean_s(device.now_s)
    return Outcome(
        normalized_latency_s=latency_s,
        is_over=is_over,
        duration_s=device.now_s,
        mean_running=float(np.mean(running or [0])) / copies,
        num_steps=core.num_steps,
        num_preemptions=core.scheduler.num_preemptions,
        num_tokens=device.num_tokens,
        token_share=seen.token_share,
        shares=seen.shares,
        saved_share=seen.saved_share,
        cached_share=num_cached / num_prompt if num_prompt else 0.0,
    )


class _Seen:
    """What the memory held, now and then."""

    def __init__(self) -> None:
        self._token_shares: list[float] = []
        self._shares: list[Shares] = []
        self._entries = self._blocks = 0

    def look(self, simulated: Simulated) -> None:
        """Looks at the memory between two steps."""
        memory, scheduler = simulated.memory, simulated.core.scheduler
        if not scheduler.num_running:
            return
        if isinstance(memory, ContiguousMemory):
            shares = memory.shares(scheduler.row_lens)
            self._shares.append(shares)
            self._token_shares.append(shares.tokens / max(1e-9, 1 - shares.external))
            return
        stats = kv_stats(memory, scheduler)
        self._token_shares.append(stats.token_share)
        self._entries += stats.num_table_entries
        self._blocks += stats.num_allocated_blocks

    @property
    def token_share(self) -> float:
        """See `Outcome`, as are the next two."""
        return float(np.mean(self._token_shares)) if self._token_shares else 1.0

    @property
    def shares(self) -> Shares | None:
        """Mean over the looks."""
        return Shares(*np.mean(self._shares, axis=0).tolist()) if self._shares else None

    @property
    def saved_share(self) -> float:
        """Over all looks."""
        return 1 - self._blocks / self._entries if self._entries else 0.0


def make_group(request_id: str, request: Request, kind: Kind, shares: bool) -> SequenceGroup:
    """Returns what the scheduler gets: tokens are given out at the end, and none ends it."""
    num_tokens = request.num_output_tokens
    if kind.is_beam_search and shares:
        params = BeamSearchParams(kind.num_seqs, num_tokens, ignore_eos=True)
        search = params.search(frozenset())
        group = SequenceGroup(
            request_id,
            request.prompt_token_ids,
            num_tokens,
            sampling_params=dataclasses.replace(params.of_each_beam(search.num_candidates), seed=0),
            num_seqs=kind.num_seqs,
            beams=search,
        )
    else:
        group = SequenceGroup(
            request_id,
            request.prompt_token_ids,
            num_tokens,
            sampling_params=_GREEDY,
            num_seqs=kind.num_seqs if shares else 1,
        )
        group.is_held = True
    return group
