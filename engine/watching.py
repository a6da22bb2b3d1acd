"""What watches an engine: a log of its steps as JSON lines, JAX's profiler, events for routers."""

import json
import logging
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from pallas_paged.engine.config import EngineConfig
from pallas_paged.engine.core.engine_core import EngineCore
from pallas_paged.engine.core.step_record import StepRecord
from pallas_paged.engine.kv.block_events import BlockEvents
from pallas_paged.engine.kv_events import KVEventPublisher

logger = logging.getLogger(__name__)


class StepLog:
    """Writes one JSON object a line: a step with `StepRecord`'s fields, or a compilation.

    Each has an "event", "step" or "compile", and the "time" in seconds since 1970. A step has the
    text of its "bucket", and "interval_s" since the step before it was taken in, which is about
    what it took the device while steps follow each other; None for the first. A compilation has
    its "programs" and "seconds".
    """

    def __init__(self, path: str) -> None:
        """Appends to the file at `path`; `OSError` if that cannot be done."""
        self._file = Path(path).open("a", encoding="utf-8", buffering=1)  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._last: float | None = None

    def begin(self, step_id: int) -> None:
        """Nothing: steps are written when they are over."""

    def end(self, record: StepRecord) -> None:
        """Writes a step."""
        now = time.perf_counter()
        interval_s = None if self._last is None else now - self._last
        self._last = now
        fields = record._asdict() | {"bucket": str(record.bucket), "interval_s": interval_s}
        self._write("step", fields)

    def compiled(self, programs: Sequence[str], seconds: float) -> None:
        """Writes a compilation."""
        self._write("compile", {"programs": list(programs), "seconds": seconds})

    def _write(self, event: str, fields: dict[str, Any]) -> None:
        rounded = {
            name: round(value, 6) if isinstance(value, float) else value
            for name, value in fields.items()
        }
        self._file.write(json.dumps({"event": event, "time": time.time()} | rounded) + "\n")


class Profiler:
    """Lets JAX trace chosen steps; a trace is a folder of files for XProf or Perfetto.

    Each step is marked in it by its `step_id`. A step that is in flight when the trace begins or
    ends is in it in part.
    """

    def __init__(self, folder: str | None, steps: tuple[int, int] | None) -> None:
        """Traces into `folder` the steps from the first of `steps` to before the second, if any."""
        self._folder = folder
        self._steps = steps
        self._is_on = False

    def start(self) -> None:
        """Begins a trace; `RuntimeError` if one is under way, or there is no folder for it."""
        if self._folder is None:
            raise RuntimeError("profile_dir=None: name a folder for traces, LLM(profile_dir=...)")
        if self._is_on:
            raise RuntimeError("a trace is under way; end it first")
        jax.profiler.start_trace(self._folder)
        self._is_on = True

    def stop(self) -> None:
        """Ends the trace and writes it; `RuntimeError` if there is none."""
        if not self._is_on:
            raise RuntimeError("no trace is under way")
        self._is_on = False
        jax.profiler.stop_trace()
        logger.info("the trace is in %s", self._folder)

    def begin(self, step_id: int) -> None:
        """Begins the trace of the chosen steps before the first of them."""
        if self._steps is not None and step_id == self._steps[0] and not self._is_on:
            self.start()

    def end(self, record: StepRecord) -> None:
        """Ends it after the last of them, or with the last request."""
        if self._steps is None or not self._is_on or record.step_id < self._steps[0]:
            return
        if record.step_id + 1 >= self._steps[1] or not record.num_running + record.num_waiting:
            self.stop()


def watch(
    core: EngineCore, programs: Any, config: EngineConfig, data_parallel_rank: int = 0
) -> tuple[Profiler, KVEventPublisher | None]:
    """Lets what the configuration asks for watch an engine.

    Returns its profiler, and what publishes its cached blocks, if anything does. That closes itself
    when `core` is garbage or the program ends, or before when it is told to.

    Args:
      core: tells of its steps.
      programs: `StepPrograms`, which tell what they compiled.
      config: what is asked for.
      data_parallel_rank: see `KVEventPublisher`.

    Raises:
      OSError: `step_log` cannot be written to.
      ValueError, ImportError: see `KVEventPublisher`.
    """
    folder = None if config.profile_dir is None else str(config.profile_dir)
    profiler = Profiler(folder, config.profile_steps)
    if folder is not None:
        core.observers.append(profiler)
    if config.step_log is not None:
        log = StepLog(str(config.step_log))
        core.observers.append(log)
        programs.on_compiled = log.compiled
    return profiler, _publish_kv_events(core, config, data_parallel_rank)


def _publish_kv_events(
    core: EngineCore, config: EngineConfig, rank: int
) -> KVEventPublisher | None:
    if config.kv_events_endpoint is None:
        return None
    events = BlockEvents(config.block_size)
    publisher = KVEventPublisher(
        events,
        config.kv_events_endpoint,
        topic=config.kv_events_topic,
        replay_endpoint=config.kv_events_replay_endpoint,
        buffer_steps=config.kv_events_buffer_steps,
        data_parallel_rank=rank,
    )
    weakref.finalize(core, publisher.close)
    core.scheduler.memory.listen(events)
    core.observers.append(publisher)
    return publisher
