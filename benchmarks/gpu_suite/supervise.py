"""Handles of worker processes; what they do not survive, their owner does. No jax here."""

import contextlib
import importlib.util
import json
import os
import pathlib
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import IO

from benchmarks import interrupts
from benchmarks.gpu_suite.stage import Row

ROOT = pathlib.Path(__file__).parent.parent.parent
START_LIMIT_S = 120.0
"""Seconds that a process may take to import everything."""

_GPU_FILE = pathlib.Path("/dev/nvidia0")
_TOOLKIT = pathlib.Path("/usr/local/cuda")
_STOP_LIMIT_S = 20.0
"""Seconds that a killed process may take to end: a driver may hold it while a kernel hangs."""
_MAX_LOG_BYTES = 1 << 20
_TELLING = re.compile(r"Fatal|Check failed|CUDA_ERROR|^F\d{4}|[Ee]rror:|Killed")


def check_gpu(on_gpu: bool) -> None:
    """Raises `RuntimeError` if JAX uses the CPU beside a GPU, and nobody has asked it to.

    Else a rare GPU's time would go into interpreting kernels.
    """
    if not on_gpu and _GPU_FILE.exists() and os.environ.get("JAX_PLATFORMS") != "cpu":
        raise RuntimeError(f"{_GPU_FILE} is there, but JAX uses the CPU; or set JAX_PLATFORMS=cpu")


def no_assembler() -> str | None:
    """Returns where there is no CUDA assembler, without which no kernel compiles; None if it is."""
    folders = [_TOOLKIT]
    packages = importlib.util.find_spec("nvidia")
    for place in packages.submodule_search_locations or () if packages is not None else ():
        folders += [pathlib.Path(place) / name for name in ("cu13", "cuda_nvcc")]
    if any((folder / "bin" / "ptxas").exists() for folder in folders):
        return None
    return f"no bin/ptxas in {_TOOLKIT}, and no package nvidia-cuda-nvcc"


class Worker:
    """A process of `worker.py`, started when it is first asked for something.

    For one thread at a time, and the same one always: the process ends with the thread.
    """

    command = (sys.executable, "-m", "benchmarks.gpu_suite.worker")

    def __init__(self, log: pathlib.Path, environment: Mapping[str, str]) -> None:
        """The process's output goes to `log`; `environment` goes over this process's own."""
        self.log = log
        self.environment = dict(environment)
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""
        self._log_begin = 0
        self._is_killed = False

    def ask(self, message: Row, limit_s: float, deadline: float) -> Row:
        """Returns the answer to a message, or a row that says what became of the process.

        Args:
          message: see `worker.answer`.
          limit_s: seconds after which the process is killed, its start apart.
          deadline: of `time.monotonic()`, when it is killed in any case: "out of time".
        """
        if self._process is None or self._process.poll() is not None:
            row = self._start(deadline)
            if row["status"] != "ready":
                return row
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return self._crashed()
        return self._receive(limit_s, deadline)

    def kill(self) -> None:
        """Kills the process and all that it started, from any thread; who asked is answered so.

        No other is started.
        """
        self._is_killed = True
        process = self._process
        if process is not None and process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def stop(self) -> None:
        """Kills the process and all that it started, and forgets it."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_LIMIT_S)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        self._process = None
        self._unread = b""

    def _start(self, deadline: float) -> Row:
        self.stop()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log, interrupts.held():
            self._log_begin = log.tell()
            self._process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                env=dict(os.environ) | self.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        if self._is_killed:
            self.stop()
            return {"status": "out of time", "reason": "the suite was stopped"}
        return self._receive(START_LIMIT_S, deadline)

    def _receive(self, limit_s: float, deadline: float) -> Row:
        assert self._process is not None
        assert self._process.stdout is not None
        end = time.monotonic() + limit_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while True:
                line, found, rest = self._unread.partition(b"\n")
                if found:
                    self._unread = rest
                    row = json.loads(line)
                    if row.pop("is_last", False):
                        self.stop()  # or the next message would reach it before it has ended
                    if "more_s" not in row:
                        return row
                    limit_s += row["more_s"]
                    end += row["more_s"]
                    continue
                left_s = min(end, deadline) - time.monotonic()
                if left_s <= 0:
                    is_over = deadline < end
                    self.stop()
                    if is_over:
                        return {"status": "out of time", "reason": "the time for it was over"}
                    return {"status": "timed out", "reason": f"longer than {limit_s:g} s"}
                if selector.select(left_s) and not self._read(self._process.stdout):
                    return self._crashed()

    def _read(self, pipe: IO[bytes]) -> bool:
        """Takes what there is to read; returns whether the pipe is still open."""
        chunk = os.read(pipe.fileno(), 1 << 16)
        self._unread += chunk
        return bool(chunk)

    def _crashed(self) -> Row:
        assert self._process is not None
        try:
            status = self._process.wait(10)
            how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        except subprocess.TimeoutExpired:
            how = "its output closed"
        self.stop()
        reason = f"its process ended: {how}; {self._last_words()}"
        return {"status": "crashed", "reason": reason}

    def _last_words(self) -> str:
        """Returns the line of the log that tells most of an end, of what this process wrote."""
        with self.log.open("rb") as log:
            end = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_begin, end - _MAX_LOG_BYTES))
            lines = log.read(_MAX_LOG_BYTES).decode(errors="replace").splitlines()
        words = [line.strip() for line in lines if line.strip()]
        telling = [line for line in words if _TELLING.search(line)]
        return f"{self.log.name}: {(telling or words or ['(nothing)'])[-1][-300:]}"
