"""The program `python -m pallas_paged.engine.serve`: how it begins, and how it ends."""

import contextlib
import http.client
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.engine.serve.wire import COMPLETIONS, connected, events, send, whole

PATIENCE_S = 120
SMALL = ("--max_num_seqs=4", "--max_num_batched_tokens=64", "--num_blocks=200")


def begun(*flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pallas_paged.engine.serve", *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@contextlib.contextmanager
def program(*flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Runs the server of the demo model at a free port; gives its URL too."""
    process = begun("--port=0", *SMALL, *flags)
    try:
        assert process.stderr is not None
        url = None
        for line in process.stderr:
            if found := re.search(r"serving .* at (http://\S+)", line):
                url = found[1]
                break
        assert url is not None, "the program has ended"
        end = time.monotonic() + PATIENCE_S
        while True:  # it says so a moment before it listens
            with contextlib.suppress(ConnectionRefusedError):
                assert send(url, "/health", method="GET").status == 200
                break
            assert time.monotonic() < end
            time.sleep(0.01)
        yield process, url
    finally:
        process.kill()
        process.communicate()


def test_a_port_in_use_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        process = begun(f"--port={taken.getsockname()[1]}", *SMALL)
        output, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, output) == (2, "")
    assert errors.startswith("error: --host=127.0.0.1 --port=")
    assert errors.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_what_runs_end(number: signal.Signals) -> None:
    with program("--shutdown_grace_s=60") as (process, url):
        request = {"prompt": "def", "max_tokens": 300, "ignore_eos": True, "stream": True}
        mine = connected(url)
        mine.sendall(whole(COMPLETIONS, request))
        response = http.client.HTTPResponse(mine)
        response.begin()
        assert response.readline().startswith(b"data: ")
        response.readline()
        process.send_signal(number)
        *_, last = events(response.read())
        assert last["choices"][0]["finish_reason"] == "length"
        mine.close()
        assert process.wait(PATIENCE_S) == 0


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once() -> None:
    with program("--shutdown_grace_s=600") as (process, url), connected(url) as mine:
        request = {"prompt": "def", "max_tokens": 500, "ignore_eos": True, "stream": True}
        mine.sendall(whole(COMPLETIONS, request | {"n": 4, "temperature": 1}))
        assert mine.recv(1)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        begin = time.monotonic()
        assert process.wait(PATIENCE_S) == 128 + signal.SIGTERM
        assert time.monotonic() - begin < 10
