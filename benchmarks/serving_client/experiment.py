"""Runs of requests at several rates, against one server or several in turn."""

import gc
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm import tqdm

from benchmarks import arrivals
from benchmarks.metrics import Figures
from benchmarks.serving_client import course, load
from benchmarks.serving_client.course import Course
from benchmarks.serving_client.load import Outgoing
from benchmarks.serving_client.servers import Server

if TYPE_CHECKING:
    from aiohttp import ClientSession


class Place(NamedTuple):
    """A run's place in an experiment: its round, its rate, and which server it is of, by index."""

    round: int
    rate: float
    server: int


class Run(NamedTuple):
    """What a run showed.

    Attributes:
      place: see `Place`.
      server: that it was of.
      figures: of `course.summarize`.
      remarks: of `course.remarks`.
    """

    place: Place
    server: Server
    figures: Figures
    remarks: list[str]


class Settings(NamedTuple):
    """What all runs have in common.

    Attributes:
      endpoint: that requests are sent to.
      burstiness: see `arrivals.arrival_times`.
      max_concurrency: see `load.send_all`.
      seed: of arrivals, other ones in each round.
      limits_ms: see `metrics.summarize`.
      is_whole: see `course.remarks`.
    """

    endpoint: str
    burstiness: float = 1.0
    max_concurrency: int | None = None
    seed: int = 0
    limits_ms: Mapping[str, float] = {}
    is_whole: bool = False


def places(num_servers: int, rates: Sequence[float], num_rounds: int) -> list[Place]:
    """Returns the order of all runs: at each rate all servers, in each round all rates.

    In every other round the servers are in the opposite order: nobody is always the first.
    """
    order = range(num_servers)
    return [
        Place(number, rate, server)
        for number in range(num_rounds)
        for rate in rates
        for server in (reversed(order) if number % 2 else order)
    ]


def parse_rates(texts: Sequence[str], burstiness: float) -> list[float]:
    """Returns requests per second.

    Raises:
      ValueError: one is no positive number or comes twice, or there is none.
    """
    rates = []
    for text in texts:
        try:
            rates.append(float(text))
        except ValueError:
            raise ValueError(f"request_rate={text!r} must be a number, or inf") from None
        arrivals.arrival_times(1, rates[-1], burstiness, 0)
    if not rates or len(set(rates)) < len(rates):
        raise ValueError(f"request_rate={','.join(texts)!r} must be one rate or several others")
    return rates


async def warm_up(
    session: "ClientSession", server: Server, endpoint: str, requests: Sequence[Outgoing]
) -> str | None:
    """Sends requests, all at once, that are not measured; returns why, if all of them failed."""

    async def send_one(index: int, due_s: float, begin_s: float) -> Course:
        url = server.base_url + endpoint
        return await load.send(session, url, requests[index], due_s, begin_s)

    courses = await load.send_all(send_one, [0.0] * len(requests))
    return None if any(one.problem is None for one in courses) else courses[0].problem


async def measure(
    session: "ClientSession",
    server: Server,
    place: Place,
    requests: Sequence[Outgoing],
    settings: Settings,
) -> Run:
    """Returns a run of requests, which arrive as `settings` and `place` say."""
    due_s = arrivals.arrival_times(
        len(requests), place.rate, settings.burstiness, settings.seed + place.round
    )
    url = server.base_url + settings.endpoint
    # What is there already need not be looked through while requests are timed.
    gc.collect()
    gc.freeze()
    with tqdm(total=len(requests), unit="request", leave=False, disable=None) as progress:

        async def send_one(index: int, due_s: float, begin_s: float) -> Course:
            done = await load.send(session, url, requests[index], due_s, begin_s)
            progress.update()
            return done

        before_s = time.process_time()
        courses = await load.send_all(send_one, due_s.tolist(), settings.max_concurrency)
        cpu_s = time.process_time() - before_s
    figures = course.summarize(courses, cpu_s, settings.limits_ms)
    remarks = course.remarks(courses, figures, is_whole=settings.is_whole)
    return Run(place, server, figures, remarks)


def report_of(run: Run, settings: Settings, **more: Any) -> dict[str, Any]:
    """Returns a run for a JSON file, under the keys that serving benchmarks use."""
    rate = run.place.rate
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "backend": "openai-chat" if "chat" in settings.endpoint else "openai",
        "label": run.server.label,
        "base_url": run.server.base_url,
        "endpoint": settings.endpoint,
        "model_id": run.server.model,
        "round": run.place.round,
        "request_rate": rate if rate < float("inf") else "inf",
        "burstiness": settings.burstiness,
        "max_concurrency": settings.max_concurrency,
        "seed": settings.seed,
        "goodput_limits_ms": dict(settings.limits_ms),
        **more,
        **run.figures,
        "remarks": run.remarks,
    }
