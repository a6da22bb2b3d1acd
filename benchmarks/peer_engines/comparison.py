"""Engines that serve one workload in turn, and what is found of each."""

import contextlib
import dataclasses
import json
import os
import pathlib
import statistics
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from benchmarks import random_models
from benchmarks.peer_engines import floor
from benchmarks.peer_engines.agreement import Agreement, Reference, compare
from benchmarks.peer_engines.checkpoint import write_checkpoint
from benchmarks.peer_engines.driver_process import DriverProcess, EngineError, run_to_end
from benchmarks.peer_engines.peer_protocol import Job
from benchmarks.workloads import Request

DRIVERS = pathlib.Path(__file__).parent
OURS = "ours"
REFERENCE = "transformers, static"
"""The engine whose outputs those of the others are held against."""


class Engine(NamedTuple):
    """An engine: its name, its driver's file, the Python that runs it, if it converts the model."""

    name: str
    driver: str
    python: str
    is_converted: bool = False


@dataclasses.dataclass
class Column:
    """What was found of an engine with so many sequences; `problem` is why it failed."""

    engine: str
    max_num_seqs: int
    load_s: float | None = None
    warm_up_s: float | None = None
    seconds: list[float] = dataclasses.field(default_factory=list)
    tokens_per_s: float | None = None
    ours_over_this: float | None = None
    agreement: Agreement | None = None
    problem: str | None = None


class Comparison:
    """Engines, ours the first, with one model and one workload.

    Args:
      engines: what is compared.
      requests: what each serves.
      folder: for the model in all its forms, and for what engines write to standard error.
      model: a name in `random_models.CONFIGS`.
      seed: of its weights.
      kv_cache_gib: memory for keys and values.
      time_limit_s: an engine that needs longer for a step has failed.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        requests: Sequence[Request],
        folder: pathlib.Path,
        *,
        model: str,
        seed: int,
        kv_cache_gib: int,
        time_limit_s: float,
    ) -> None:
        self._engines, self._requests, self._folder = list(engines), requests, folder
        self._kv_cache_gib, self._time_limit_s = kv_cache_gib, time_limit_s
        longest = max(len(r.prompt_token_ids) + r.num_output_tokens for r in requests)
        context = random_models.CONFIGS[model]["max_position_embeddings"]
        self._max_model_len = min(-(-longest // 128) * 128, context)  # whole blocks, anybody's
        self._reference: Reference | None = None
        self._converted: set[str] = set()
        self._products = floor.Products(random_models.CONFIGS[model])
        (folder / "model").mkdir(exist_ok=True)
        write_checkpoint(model, folder / "model", seed)

    def measure(self, max_num_seqs: int, num_rounds: int) -> list[Column]:
        """Returns a column per engine: all are loaded, then each is timed in every round.

        And a last one of what `floor` says, from rates measured in every round.
        """
        engines, least = self._engines, Column(floor.NAME, max_num_seqs)
        columns = {engine.name: Column(engine.name, max_num_seqs) for engine in engines}
        outputs: dict[str, list[list[list[int]]]] = {engine.name: [] for engine in engines}
        running: dict[str, DriverProcess] = {}

        @contextlib.contextmanager
        def told(name: str) -> Iterator[None]:
            """An engine that fails says so, and is no more."""
            try:
                yield
            except EngineError as error:
                columns[name].problem = str(error)
                running.pop(name, None)
                print(f"{name}, {max_num_seqs} running, {error}", file=sys.stderr, flush=True)

        with contextlib.ExitStack() as stack:
            for engine in engines:
                column = columns[engine.name]
                with told(engine.name):
                    process = self._start(engine, max_num_seqs)
                    stack.callback(process.close)
                    running[engine.name], column.load_s = process, process.load_s
                    is_first = engine.name == REFERENCE and self._reference is None
                    answer = process.ask("reference" if is_first else "run")
                    if is_first:
                        self._reference = Reference(answer["tokens"], answer["margins"])
                    column.warm_up_s = answer["seconds"]
                    outputs[engine.name].append(answer["tokens"])
            for number in range(num_rounds):
                first = number % len(engines)  # nobody is always the first
                for engine in engines[first:] + engines[:first]:
                    if engine.name in running:
                        with told(engine.name):
                            answer = running[engine.name].ask("run")
                            columns[engine.name].seconds.append(answer["seconds"])
                            outputs[engine.name].append(answer["tokens"])
                rates = self._products.measure()
                least.seconds.append(floor.least_seconds(self._requests, max_num_seqs, rates))
        self._summarise(least, columns[OURS], [])
        for name, column in columns.items():
            self._summarise(column, columns[OURS], outputs[name])
        return [*columns.values(), least]

    def _start(self, engine: Engine, max_num_seqs: int) -> DriverProcess:
        """Returns the engine's process, ready."""
        folder = self._folder / engine.driver.removesuffix(".py")
        folder.mkdir(exist_ok=True)
        job = Job(
            model=str(self._folder / "model"),
            converted=str(folder),
            max_num_seqs=max_num_seqs,
            max_model_len=self._max_model_len,
            num_threads=len(os.sched_getaffinity(0)),
            kv_cache_gib=self._kv_cache_gib,
            prompts=[list(request.prompt_token_ids) for request in self._requests],
            num_output_tokens=[request.num_output_tokens for request in self._requests],
        )
        file = folder / f"job-{max_num_seqs}.json"
        file.write_text(json.dumps(dataclasses.asdict(job)), encoding="utf-8")
        command = [engine.python, str(DRIVERS / engine.driver), str(file)]
        variables = _variables(engine, job.num_threads)
        if engine.is_converted and engine.name not in self._converted:
            log = folder / "convert.txt"
            run_to_end([*command, "convert"], variables, log, self._time_limit_s)
            self._converted.add(engine.name)
        log = folder / f"log-{max_num_seqs}.txt"
        return DriverProcess(command, variables, log, self._time_limit_s)

    def _summarise(self, column: Column, ours: Column, outputs: list[list[list[int]]]) -> None:
        """Fills in what follows from the rounds."""
        if self._reference is not None and outputs:
            found = [compare(self._reference, tokens) for tokens in outputs]
            column.agreement = max(found, key=lambda one: (len(one.wrong), one.near_ties))
        if column.problem is not None:
            return
        num_tokens = sum(request.num_output_tokens for request in self._requests)
        column.tokens_per_s = num_tokens / statistics.median(column.seconds)
        if ours.problem is None:
            pairs = zip(column.seconds, ours.seconds, strict=True)
            column.ours_over_this = statistics.median(its / our for its, our in pairs)


def _variables(engine: Engine, num_threads: int) -> dict[str, str]:
    """Returns the environment variables of an engine's process."""
    threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    variables = dict(os.environ) | dict.fromkeys(threads, str(num_threads))
    variables |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "0"}
    if engine.name == OURS:
        return variables | {"PYTHONPATH": str(DRIVERS.parent.parent), "JAX_PLATFORMS": "cpu"}
    variables.pop("PYTHONPATH", None)
    return variables
