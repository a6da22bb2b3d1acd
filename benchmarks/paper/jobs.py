"""Simulations that figures ask for: each is a curve over request rates, kept as it ends.

A job is data, and its result depends on nothing else, so that an interrupted run goes on where it
stopped, and two figures that ask for the same get one run.
"""

import concurrent.futures
import concurrent.futures.process
import dataclasses
import hashlib
import json
import math
import multiprocessing
import pathlib
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

from benchmarks.contiguous import Shares
from benchmarks.paper import traces
from benchmarks.paper.traces import Data
from benchmarks.simulation.serve import Kind, Outcome, serve
from benchmarks.simulation.shapes import SHAPES
from benchmarks.simulation.systems import System, build

OVER = 1.2
"""A run whose normalized latency is certainly above so many times the limit is given up."""
BEAM_TEMPERATURE = 0.05
"""Of simulated candidates: chosen so that beams on Alpaca share what the paper's Fig. 15 says."""
_SOURCES = (
    *("pallas_paged/targets/*.txtpb", "benchmarks/results/*/device.jsonl"),
    *("engine/sampling_params.py", "pallas_paged/deviceless.py"),
    *(f"benchmarks/{name}.py" for name in ("arrivals", "buddies", "contiguous", "workloads")),
    *("benchmarks/paper/jobs.py", "benchmarks/paper/traces.py", "pallas_paged/block_tables.py"),
    *("benchmarks/simulation/*.py", "engine/core/*.py", "engine/kv/*.py"),
)
_ROOT = pathlib.Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Job:
    """A system that serves a data set at several rates.

    Attributes:
      system: how it serves.
      shape: which model, one of `SHAPES`.
      data: the requests.
      kind: what each request asks for.
      minutes: of the trace, simulated.
      seed: of everything.
      rates: requests per second. With `searches` the lowest and the highest between which the
        sustained rate is searched.
      searches: how many rates to try for that, each between the two that the sustained rate must be
        between; 0 runs `rates`.
      num_requests: that come; None: as many as fill the minutes.
      limit_s: normalized latency up to which a rate is sustained, s/token.
      drains: whether a run goes on until all requests have ended; else it ends with the last
        arrival, whatever the latency is.
    """

    system: System
    shape: str
    data: Data
    kind: Kind
    minutes: float
    seed: int
    rates: tuple[float, ...]
    searches: int = 0
    num_requests: int | None = None
    limit_s: float = 0.5
    drains: bool = True

    @property
    def key(self) -> str:
        """Tells it from all other jobs."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


@dataclasses.dataclass(frozen=True)
class Point:
    """A run at one rate.

    Attributes:
      rate: requests per second.
      outcome: what it showed.
      cpu_s: seconds that simulating it took a core; not a part of the result.
    """

    rate: float
    outcome: Outcome
    cpu_s: float = dataclasses.field(default=0.0, compare=False)

    def is_within(self, limit_s: float) -> bool:
        """Whether the latency is."""
        return self.outcome.normalized_latency_s <= limit_s


@dataclasses.dataclass(frozen=True)
class Curve:
    """A job's points, by rate."""

    job: Job
    points: tuple[Point, ...]

    @property
    def crosses(self) -> bool:
        """Whether there are rates on both sides of the limit."""
        return len({point.is_within(self.job.limit_s) for point in self.points}) == 2

    @property
    def sustained_rate(self) -> float:
        """The rate at which the latency meets the limit, between the two rates around it.

        On a straight line between the logarithms; in the middle where all that is known of the
        higher rate is that its latency is above; the lowest or highest rate unless it `crosses`.
        """
        limit_s = self.job.limit_s
        below = [point for point in self.points if point.is_within(limit_s)]
        above = [point for point in self.points if not point.is_within(limit_s)]
        if not below or not above:
            return above[0].rate if not below else below[-1].rate
        left, right = below[-1], next((p for p in above if p.rate > below[-1].rate), None)
        if right is None:
            return left.rate
        if right.outcome.is_over:
            return math.sqrt(left.rate * right.rate)
        ends = [math.log(point.outcome.normalized_latency_s) for point in (left, right)]
        share = (math.log(limit_s) - ends[0]) / max(1e-9, ends[1] - ends[0])
        return left.rate * (right.rate / left.rate) ** min(1.0, max(0.0, share))


def run(job: Job) -> Curve:
    """Returns the curve of a job."""
    if not job.searches:
        return Curve(job, tuple(run_at(job, rate) for rate in sorted(job.rates)))
    low, high = job.rates
    points = []
    for _ in range(job.searches):
        point = run_at(job, math.sqrt(low * high))
        points.append(point)
        low, high = (point.rate, high) if point.is_within(job.limit_s) else (low, point.rate)
    return Curve(job, tuple(sorted(points, key=lambda point: point.rate)))


def run_at(job: Job, rate: float) -> Point:
    """Returns a run at one rate; at a higher one the same requests come sooner, and others too."""
    begin = time.process_time()
    num_requests = job.num_requests or max(2, round(60 * job.minutes * rate))
    requests = traces.draw(job.data, num_requests, job.seed)
    arrivals_s = traces.arrivals(num_requests, rate, job.seed)
    beam_temperature = BEAM_TEMPERATURE if job.kind.is_beam_search else None
    simulated = build(
        job.system, SHAPES[job.shape], seed=job.seed, beam_temperature=beam_temperature
    )
    outcome = serve(
        simulated,
        requests,
        arrivals_s,
        job.kind,
        shares=job.system.shares,
        is_static=job.system.is_static,
        over_s_per_token=OVER * job.limit_s if job.drains else math.inf,
        drains=job.drains,
    )
    return Point(rate, outcome, time.process_time() - begin)


def slowest(curves: Iterable[Curve]) -> str:
    """Returns which run took longest to simulate, in words."""
    job, point = max(
        ((curve.job, point) for curve in curves for point in curve.points),
        key=lambda pair: pair[1].cpu_s,
    )
    return (
        f"the longest run: {point.outcome.duration_s / 60:.0f} minutes of {job.system.name}, "
        f"{job.shape}, {job.data.name} at {point.rate:.3g} requests/s, {point.outcome.num_steps} "
        f"steps, simulated in {point.cpu_s:.0f} s of one core"
    )


def run_all(jobs: Sequence[Job], folder: pathlib.Path, num_processes: int) -> dict[Job, Curve]:
    """Returns the curves of jobs; those that `folder` has already are not run again.

    Each curve is written to `folder/curves.jsonl` when it is there. Curves that other sources of
    the simulation made are left out, and said so.
    """
    path, code = folder / "curves.jsonl", sources_hash()
    known, stale = _read(path, code)
    wanted = {job.key: job for job in jobs}
    if num_stale := len((stale & wanted.keys()) - known.keys()):
        print(
            f"{path}: {num_stale} curves are of other sources, and are run again", file=sys.stderr
        )
    found = {job: Curve(job, known[key]) for key, job in wanted.items() if key in known}
    left = [job for key, job in wanted.items() if key not in known]
    left.sort(key=lambda job: -job.minutes * job.kind.num_seqs)  # the longest first
    progress = tqdm(total=len(wanted), initial=len(found), unit="curve", disable=None)
    with progress, path.open("a", encoding="utf-8") as file:
        if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            file.write("\n")  # behind a line in which the run before was ended
        for curve in _each(left, num_processes):
            found[curve.job] = curve
            file.write(json.dumps(_row(curve, code)) + "\n")
            file.flush()
            progress.update()
    return found


def _each(wanted: Sequence[Job], num_processes: int) -> Iterator[Curve]:
    """Yields the curves of jobs as they end."""
    if num_processes == 1:
        yield from map(run, wanted)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(num_processes, context) as pool:
        futures = [pool.submit(run, job) for job in wanted]
        try:
            for future in concurrent.futures.as_completed(futures):
                yield future.result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise ValueError(
                "a process that simulates was ended, by lack of memory perhaps; run again with "
                "--jobs=1: what was done is kept"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def sources_hash() -> str:
    """Returns a hash of what results depend on: the simulation's sources and the scheduler's."""
    digest = hashlib.sha256()
    for pattern in _SOURCES:
        for path in sorted(_ROOT.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _row(curve: Curve, code: str) -> dict[str, Any]:
    points = [
        {"rate": point.rate, "cpu_s": point.cpu_s, **point.outcome._asdict()}
        for point in curve.points
    ]
    return {"code": code, "key": curve.job.key, "points": points}


def _read(path: pathlib.Path, code: str) -> tuple[dict[str, tuple[Point, ...]], set[str]]:
    """Returns a file's points by the key of their curve, and the keys of those of other sources."""
    if not path.exists():
        return {}, set()
    known: dict[str, tuple[Point, ...]] = {}
    stale: set[str] = set()
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # the last line, when the run was ended in the middle of it
        if row["code"] != code:
            stale.add(row["key"])
            continue
        known[row["key"]] = tuple(_point(fields) for fields in row["points"])
    return known, stale


def _point(fields: dict[str, Any]) -> Point:
    outcome = {name: value for name, value in fields.items() if name not in ("rate", "cpu_s")}
    shares = outcome["shares"]
    outcome["shares"] = None if shares is None else Shares(*shares)
    return Point(fields["rate"], Outcome(**outcome), fields["cpu_s"])
