"""A driver as a process of its own, which runs only while it is asked something."""

import contextlib
import json
import os
import pathlib
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Any

_LAST_LINES = 12


class EngineError(Exception):
    """An engine gave no answer; the message says why, with the end of its standard error."""


def run_to_end(
    command: Sequence[str], variables: Mapping[str, str], log: pathlib.Path, time_limit_s: float
) -> None:
    """Runs a command, everything that it prints into `log`.

    Raises:
      EngineError: it failed, or took too long.
    """
    with log.open("wb") as file:
        process = _start(command, variables, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        try:
            status = process.wait(time_limit_s)
        except subprocess.TimeoutExpired as error:
            raise EngineError(f"did not end in {time_limit_s:g} s{_end_of(log)}") from error
        finally:
            _kill(process)
    if status:
        raise EngineError(f"ended with status {status}{_end_of(log)}")


class DriverProcess:
    """A process that speaks the protocol of `peer_protocol`; stopped while it is not asked.

    So nothing that it does beside its work, such as threads that spin, disturbs who is measured
    next. It leads a process group, which is stopped, continued and killed as one, in the program's
    session: where that is killed, most systems hang up on what is stopped.

    Attributes:
      pid: the process, and its group.
      load_s: from its start until it was ready.
    """

    def __init__(
        self,
        command: Sequence[str],
        variables: Mapping[str, str],
        log: pathlib.Path,
        time_limit_s: float,
    ) -> None:
        self._log, self._time_limit_s = log, time_limit_s
        begin = time.monotonic()
        with log.open("wb") as file:
            self._process = _start(
                command, variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file
            )
        self.pid = self._process.pid
        self._rest = b""
        try:
            self._read("loading")
        except BaseException:
            self.close()
            raise
        self.load_s = time.monotonic() - begin
        self._signal(signal.SIGSTOP)

    def ask(self, line: str) -> dict[str, Any]:
        """Returns the answer to a line; raises `EngineError`, and the process is no more."""
        self._signal(signal.SIGCONT)
        try:
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # likewise
                self._process.stdin.write(line.encode() + b"\n")
                self._process.stdin.flush()
            answer = self._read(line)
        except BaseException:
            self.close()
            raise
        self._signal(signal.SIGSTOP)
        return answer

    def close(self) -> None:
        """Ends the process and all that it has started; may be called again."""
        _kill(self._process)
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):
                assert pipe is not None
                pipe.close()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # what is read next tells of it
            os.killpg(self.pid, number)

    def _read(self, what: str) -> dict[str, Any]:
        """Returns the next line that the process writes."""
        pipe = self._process.stdout
        assert pipe is not None
        deadline = time.monotonic() + self._time_limit_s
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if not selector.select(deadline - time.monotonic()):
                    limit = f"{self._time_limit_s:g}"
                    raise EngineError(f"no answer in {limit} s to: {what}{_end_of(self._log)}")
                more = os.read(pipe.fileno(), 1 << 16)
                if not more:
                    raise EngineError(f"ended {self._status()}at: {what}{_end_of(self._log)}")
                self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        try:
            answer = json.loads(line)
        except ValueError as error:
            raise EngineError(f"answered {line[:80]!r} to: {what}") from error
        return dict(answer)

    def _status(self) -> str:
        """Returns with what the process ended, in words, if it does."""
        try:
            return f"with status {self._process.wait(5)} "
        except subprocess.TimeoutExpired:
            return ""


def _start(
    command: Sequence[str], variables: Mapping[str, str], **pipes: Any
) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(command, env=dict(variables), process_group=0, **pipes)
    except OSError as error:
        raise EngineError(f"cannot be started: {error}") from error


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends a process, if it has not ended, and the rest of its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _end_of(log: pathlib.Path) -> str:
    """Returns the last lines of a file, each on a line of its own, indented."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    lines = [line for line in lines if line.strip()][-_LAST_LINES:]
    return "".join(f"\n    {line[:200]}" for line in lines)
