"""Starts a server of a model that chats, as a program of its own."""

import contextlib
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.engine.serve.chat_folder import chat_folder

ROOT = Path(__file__).parents[2]
MODEL = "chatty"
KEY = "open sesame"
_START_S = 300


class Server(NamedTuple):
    """A server that runs.

    Attributes:
      base_url: of its API.
    """

    base_url: str


@contextlib.contextmanager
def running_server() -> Iterator[Server]:
    """Runs it at a free port, and asserts that it ends properly."""
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [
                *(os.environ.get("SERVER_PYTHON", sys.executable), "-m"),
                *("pallas_paged.engine.serve", f"--model={chat_folder(Path(folder))}", "--port=0"),
                *(f"--served_model_name={MODEL}", "--num_blocks=200", "--max_num_seqs=4"),
                *("--dtype=float32", "--deterministic"),
            ],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PALLAS_PAGED_API_KEY": KEY},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            url = _url(process)
            _wait_until_it_listens(url)
            yield Server(f"{url}/v1")
        finally:
            process.send_signal(signal.SIGTERM)
            status = process.wait(timeout=60)
        assert status == 0, f"the server ended with {status}"


def _url(process: subprocess.Popen) -> str:
    """Returns where a server is, once it says so; goes on to read what it writes."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in process.stderr or ():
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    said = []
    while (line := lines.get(timeout=_START_S)) is not None:
        said.append(line)
        if found := re.search(r"serving .* at (http://\S+)", line):
            return found.group(1)
    raise RuntimeError(f"the server does not start:\n{''.join(said)}")


def _wait_until_it_listens(url: str) -> None:
    """Waits for the moment between what the log says and the first answer."""
    end = time.monotonic() + _START_S
    while True:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=_START_S).close()
            return
        except urllib.error.URLError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
