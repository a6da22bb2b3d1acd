"""An engine on the devices of several processes, of one host or of several.

Every process runs the same program. It first calls `initialize`; then the first process makes and
uses an `LLM`, an `AsyncLLM` or a server as if it were alone, and the others call `follow`:

    from pallas_paged.engine import LLM, distributed

    distributed.initialize()
    if not distributed.is_first():
        distributed.follow()  # until the first process ends
    else:
        llm = LLM("FOLDER", tensor_parallel_size=16)

The model's devices are those of all processes. The first process sends the others the configuration
and then the plan of each step (see `pallas_paged.engine.device.following`); the folder of the model
must be at the same place for all. When a process is gone, the others end within seconds.
"""

import logging
import signal
import sys
import threading

import jax

from pallas_paged.engine.device.following import (
    BUILD,
    END,
    FORGET,
    channel,
    config_from_bytes,
    exit_at_once,
    obey,
)
from pallas_paged.engine.device.runner import ModelRunner
from pallas_paged.engine.errors import ProcessLostError
from pallas_paged.engine.loading import begin, load

logger = logging.getLogger(__name__)

HEARTBEAT_TIMEOUT_S = 10
"""Seconds after which a process or host that is silent counts as gone; JAX ends the others then."""
_SHUTDOWN_TIMEOUT_S = 30


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    initialization_timeout_s: int = 300,
) -> None:
    """Joins this process to the others; before anything else that uses JAX's devices.

    `jax.distributed.initialize`, with timeouts for an engine: a process that is gone is noticed in
    `HEARTBEAT_TIMEOUT_S` seconds, and not in JAX's 100. Under Slurm, Open MPI and on Kubernetes
    (with the package `kubernetes`, in a JobSet or an indexed Job) JAX finds all three by itself.

    Args:
      coordinator_address: host and port of the first process, as all reach it; by default what the
        environment variable JAX_COORDINATOR_ADDRESS says.
      num_processes: how many there are.
      process_id: this one's number, from 0 on.
      initialization_timeout_s: how long to wait for the others.

    Raises:
      ValueError: something is not given, and JAX does not find it.
      RuntimeError: called before, or devices have been used before; the others did not come.
    """
    jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM
    jax.distributed.initialize(
        coordinator_address,
        num_processes,
        process_id,
        initialization_timeout=initialization_timeout_s,
        heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
        shutdown_timeout_seconds=_SHUTDOWN_TIMEOUT_S,
    )
    if jax.process_count() > 1 and is_first():
        channel()


def is_first() -> bool:
    """Whether this is the process that has the callers: the first one, or the only one."""
    return jax.process_index() == 0


def follow() -> None:
    """Runs this process's part of the first one's engines; returns when that process ends.

    In the main thread it leaves SIGTERM and SIGINT to the first process, which ends its requests
    and then the others.

    Whatever fails ends this process, with status 1, and the others with it: an engine of which a
    part is missing computes nothing.

    Raises:
      RuntimeError: this is the first process.
    """
    if is_first():
        raise RuntimeError("follow() is for the other processes: this is the first one, or alone")
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
    try:
        _follow()
    except BaseException as error:
        if isinstance(error, ProcessLostError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            logger.critical("process %d ends: %s", jax.process_index(), error, exc_info=error)
        exit_at_once()


def _follow() -> None:
    opened = channel()
    runners: dict[int, ModelRunner] = {}
    while (message := opened.receive()).kind != END:
        if message.kind == BUILD:
            loaded = load(begin(config_from_bytes(message.content)))
            runners[message.engine] = loaded.runner
        elif message.kind == FORGET:
            runners.pop(message.engine, None)
        else:
            obey(message, runners[message.engine])
