"""Real processes on this machine share a model: the tokens of one, and an end when one is gone."""

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np
import pytest

from pallas_paged.engine import LLM, distributed
from pallas_paged.engine.config import EngineConfig
from pallas_paged.engine.device.following import config_from_bytes, config_to_bytes
from tests.engine.process_programs import NAME, OPTIONS, answers
from tests.models.references import DATA

SECONDS = 240
"""The most that a program may take, on a machine that does much else."""


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


@contextlib.contextmanager
def processes(
    name: str, count: int, devices: int, *arguments: str
) -> Iterator[list[subprocess.Popen[str]]]:
    """Runs `process_programs` in so many processes, each with so many devices."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    port = str(free_port())
    command = [sys.executable, "-m", "tests.engine.process_programs", name, port]
    started = [
        subprocess.Popen(
            [*command, str(number), str(count), *arguments],
            env=os.environ | {"XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def outputs_of(started: Sequence[subprocess.Popen[str]]) -> list[list[str]]:
    """Returns what the processes say; all must end well."""
    found = [process.communicate(timeout=SECONDS) for process in started]
    for process, (_, errors) in zip(started, found, strict=True):
        assert process.returncode == 0, errors[-4000:]
    return [said(output) for output, _ in found]


def said(output: str) -> list[str]:
    """Returns what `process_programs.say` printed."""
    return re.findall(r"^= (.*)$", output, re.MULTILINE)


@pytest.mark.parametrize(("count", "devices"), [(2, 2), (4, 1)], ids=["two", "four"])
def test_processes_serve_the_tokens_of_one(count: int, devices: int) -> None:
    with processes("serve", count, devices) as started:
        first, *others = outputs_of(started)
    plain, small, preemptions = first
    expected = answers(LLM(DATA / NAME, **OPTIONS))
    assert json.loads(plain) == expected
    assert json.loads(small) == expected
    assert int(preemptions) > 0
    assert others == [["followed to the end"]] * (count - 1)


@pytest.mark.parametrize("program", ["busy", "idle"])
def test_a_process_that_is_gone_ends_the_others(program: str, tmp_path: pathlib.Path) -> None:
    ready = tmp_path / "ready"
    with processes(program, 4, 1, str(ready), "die") as started:
        last = started[-1]
        assert last.wait(SECONDS) == -signal.SIGKILL
        gone = time.time()
        found = [process.communicate(timeout=60) for process in started[:-1]]
        assert time.time() - gone < 3 * distributed.HEARTBEAT_TIMEOUT_S  # Python's own end too
    when, kind, message = said(found[0][0])[-1].split(" ", 2)
    assert kind == "ProcessLostError"
    assert "one of the 4 processes of this engine is gone; this one is number 0" in message
    assert float(when) - gone < distributed.HEARTBEAT_TIMEOUT_S
    assert started[0].returncode == 1
    for number, (process, (_, errors)) in enumerate(zip(started[1:-1], found[1:], strict=True), 1):
        assert process.returncode == 1
        assert (
            f"error: one of the 4 processes of this engine is gone; this one is number {number}"
            in (errors)
        )


def test_the_others_end_when_the_first_is_gone(tmp_path: pathlib.Path) -> None:
    ready = tmp_path / "ready"
    with processes("busy", 2, 1, str(ready), "live") as started:
        begin = time.monotonic()
        while not ready.exists():
            assert time.monotonic() - begin < SECONDS
            assert started[0].poll() is None
            time.sleep(0.05)
        started[1].send_signal(signal.SIGTERM)  # is left to the first one
        time.sleep(1)
        assert started[1].poll() is None
        started[0].kill()
        gone = time.monotonic()
        _, errors = started[1].communicate(timeout=60)
        assert time.monotonic() - gone < 3 * distributed.HEARTBEAT_TIMEOUT_S
        assert started[1].returncode != 0
        assert "gone" in errors


def test_a_step_that_only_the_others_have_begun_ends_the_engine() -> None:
    with processes("interrupted", 2, 1) as started:
        found = [process.communicate(timeout=SECONDS) for process in started]
    assert started[0].returncode == 1
    assert started[1].returncode != 0  # XLA may end it before it can say why
    errors = said(found[0][0])
    assert len(errors) == 2
    assert all("ProcessLostError this engine of 2 processes has ended, step" in e for e in errors)


def test_a_start_that_fails_in_the_first_process_ends_the_others() -> None:
    with processes("failing_start", 2, 1) as started:
        found = [process.communicate(timeout=SECONDS) for process in started]
    assert started[0].returncode == 1
    assert started[1].returncode != 0
    first, second = said(found[0][0])
    assert first == "MemoryError no room"
    assert "ProcessLostError this engine of 2 processes has ended, its start failed: Mem" in second


def test_the_least_number_of_all_processes() -> None:
    with processes("least", 3, 2) as started:
        assert outputs_of(started) == [["8"]] * 3


def test_messages_of_any_size_arrive_in_order() -> None:
    with processes("messages", 3, 1, "7") as started:
        _, *others = outputs_of(started)
    assert others == [["40 [0, 10, 20, 30]"]] * 2


def test_a_model_is_shared_by_all_devices_or_refused() -> None:
    with processes("wrong_size", 2, 2) as started:
        first, second = outputs_of(started)
    assert "tensor_parallel_size=2 must be 4 here: the 2 processes" in first[0]
    assert second == ["followed to the end"]


def test_only_the_first_process_makes_engines() -> None:
    with processes("own_engine", 2, 1) as started:
        output, errors = started[1].communicate(timeout=SECONDS)
    assert "process 1 of 2 follows the first one" in output, errors
    with pytest.raises(RuntimeError, match="this is the first one, or alone"):
        distributed.follow()


def test_a_configuration_travels() -> None:
    config = EngineConfig(
        "folder",
        dtype="bfloat16",
        seed=None,
        tensor_parallel_size=4,
        speculative_config={"method": "ngram", "num_speculative_tokens": 3},
        profile_dir="traces",
        profile_steps=(1, 3),
    )
    back = config_from_bytes(config_to_bytes(config))
    assert back == EngineConfig(**(vars(config) | {"profile_steps": [1, 3]}))
    assert back.seed == config.seed
    assert jax.process_count() == 1
    assert np.issubdtype(type(back.seed), np.integer)
