"""Two replicas on Ray Serve, of which some are killed under load; `make ray-check` runs it.

Every request is answered completely, or its client sees that it was not; none hangs; the
deployment gets back to two replicas. It prints how many of each there were.
"""

import collections
import http.client
import json
import os
import pathlib
import signal
import socket
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable
from typing import Any

import pytest
import ray
from ray import serve

from pallas_paged.engine import LLM, SamplingParams
from pallas_paged.engine.serve import on_ray
from pallas_paged.engine.serve.ray_options import ray_options
from pallas_paged.models.demo import DEMO_MODEL

ENGINE: dict[str, Any] = {
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "num_blocks": 400,
    "dtype": "float32",
    "deterministic": True,
}
ARGS = ENGINE | {"num_replicas": 2, "served_model_name": "demo", "health_check_period_s": 1.0}
PROMPTS = ["def main():", "class Stack:\n    ", "import os\n", "for i in range("]
MAX_TOKENS = 60
NUM_CLIENTS = 12
TIMEOUT_S = 60
"""A request that takes longer hangs."""
RECOVERY_S = 120
FAULT = "PALLAS_PAGED_CHECK_FAULT"
"""In the environment: a file; the replica that finds it removes it, and its engine ends."""


class Faulty(on_ray.Replica):
    """A replica whose engine can be ended in its middle, while its process goes on."""

    def __init__(self, options: Any):
        super().__init__(options)
        fault, executor = os.environ[FAULT], self.llm.engine.parts.core.executor
        dispatch = executor.dispatch

        def dispatch_or_end(plan: Any) -> Any:
            if os.path.exists(fault):
                os.unlink(fault)
                raise SystemExit("the check has ended it")
            return dispatch(plan)

        executor.dispatch = dispatch_or_end  # type: ignore[method-assign]


def replica_pids() -> list[int]:
    """Returns the processes of replicas, which name themselves, of this session."""
    pids = []
    for folder in pathlib.Path("/proc").iterdir():
        try:
            title = (folder / "cmdline").read_bytes() if folder.name.isdigit() else b""
            environment = (folder / "environ").read_bytes() if title else b""
        except OSError:
            continue
        if title.startswith(b"ray::ServeReplica") and os.environ[FAULT].encode() in environment:
            pids.append(int(folder.name))
    return sorted(pids)


def until(what: str, condition: Callable[[], bool]) -> float:
    """Waits for a condition; returns the seconds that it took."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < RECOVERY_S, f"still not: {what}"
        time.sleep(0.1)
    return time.monotonic() - begin


def post(url: str, index: int) -> str:
    """Sends a request, every second one for a stream; returns what its client makes of it.

    That is "complete" with the right text, or how it was told that it was not served.
    """
    address = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=TIMEOUT_S)
    prompt, streams = PROMPTS[index % len(PROMPTS)], index % 2 == 1
    body = {"model": "demo", "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0}
    try:
        connection.request("POST", "/v1/completions", json.dumps(body | {"stream": streams}))
        response = connection.getresponse()
        if response.status != 200:
            response.read()
            return f"status {response.status}"
        if not streams:
            text = json.loads(response.read())["choices"][0]["text"]
            return "complete" if text == EXPECTED[prompt] else "WRONG"
        return stream_end(response, EXPECTED[prompt])
    except TimeoutError:
        return "HANGS"
    except (http.client.HTTPException, OSError) as error:
        return f"broken connection: {type(error).__name__}"
    finally:
        connection.close()


def stream_end(response: http.client.HTTPResponse, expected: str) -> str:
    """Returns how a stream of events ended."""
    text, error = "", None
    for line in response:
        if line == b"data: [DONE]\n":
            if error is not None:
                return f"event with error {error}"
            return "complete stream" if text == expected else "WRONG"
        if line.startswith(b"data: "):
            event = json.loads(line[6:])
            if "error" in event:
                error = event["error"]["code"]
            else:
                text += event["choices"][0]["text"]
    return "stream without [DONE]"


def under_load(url: str, disturb: Callable[[], None], seconds: float) -> collections.Counter[str]:
    """Returns the ends of requests of many clients, in whose midst something is done."""
    ends: collections.Counter[str] = collections.Counter()
    stop, lock = threading.Event(), threading.Lock()

    def run(index: int) -> None:
        while not stop.is_set():
            end = post(url, index)
            with lock:
                ends[end] += 1
            if not end.startswith("complete"):
                time.sleep(0.2)  # as who tries again
            index += 1

    threads = [threading.Thread(target=run, args=(index,)) for index in range(NUM_CLIENTS)]
    for thread in threads:
        thread.start()
    time.sleep(seconds / 2)
    disturb()
    time.sleep(seconds / 2)
    stop.set()
    for thread in threads:
        thread.join(2 * TIMEOUT_S)
        assert not thread.is_alive(), "a client hangs"
    return ends


def num_failed(ends: collections.Counter[str]) -> int:
    """Returns how many were not served; asserts that none was served wrong, or hung."""
    assert not ends["WRONG"], ends
    assert not ends["HANGS"], ends
    assert ends["complete"], ends
    assert ends["complete stream"], ends
    return sum(count for end, count in ends.items() if not end.startswith("complete"))


def check_wrong_options() -> None:
    """Asserts that options which are wrong end the start, and are named."""
    for args, said in (
        ({"num_blockz": 3}, "num_blockz=3 is not known"),
        ({"max_num_seqs": "many"}, "max_num_seqs='many' must be int"),
        ({"block_size": 0}, "block_size=0"),
    ):
        with pytest.raises(ValueError, match=said):
            on_ray.app(args)
    begin = time.monotonic()
    with pytest.raises(RuntimeError):  # what is wrong only where the replica runs
        serve.run(on_ray.app({"model": "/nowhere"}), name="wrong", route_prefix="/wrong")
    message = serve.status().applications["wrong"].deployments[on_ray.NAME].message
    assert "no folder /nowhere" in message, message
    serve.delete("wrong")
    print(f"a wrong folder is said after {time.monotonic() - begin:.1f} s", flush=True)


def check(url: str, fault: pathlib.Path) -> None:
    """Asks a deployment of two, ends each of them once, and asserts what clients see."""
    for index in range(2 * len(PROMPTS)):
        assert post(url, index).startswith("complete")
    before = replica_pids()
    assert len(before) == 2, before

    ends = under_load(url, lambda: None, 6)
    print(f"undisturbed: {dict(ends)}", flush=True)
    assert num_failed(ends) == 0, ends

    ends = under_load(url, lambda: os.kill(before[0], signal.SIGKILL), 8)
    print(f"a process killed: {dict(ends)}", flush=True)
    assert num_failed(ends) > 0, "nobody has seen it, so that nothing was tried"
    print(f"two again after {recovered(url, before[0]):.1f} s", flush=True)

    pids = replica_pids()
    ends = under_load(url, fault.touch, 8)
    print(f"an engine ended: {dict(ends)}", flush=True)
    assert num_failed(ends) > 0, "nobody has seen it, so that nothing was tried"
    until("one is replaced", lambda: set(replica_pids()) != set(pids))
    print(f"two again after {recovered(url):.1f} s", flush=True)

    ends = under_load(url, lambda: None, 4)
    assert num_failed(ends) == 0, ends

    begin = time.monotonic()
    ends = under_load(url, lambda: deploy({"num_replicas": 1}), 6)
    print(f"one taken away: {dict(ends)}, {time.monotonic() - begin:.1f} s", flush=True)
    assert num_failed(ends) == 0, "a replica that is taken away ends its requests first"


def recovered(url: str, gone: int | None = None) -> float:
    """Waits until two replicas run and all requests are served; returns the seconds."""

    def is_well() -> bool:
        pids, status = replica_pids(), serve.status().applications["default"]
        running = status.deployments[on_ray.NAME].replica_states.get("RUNNING", 0)
        return len(pids) == running == 2 and gone not in pids and status.status == "RUNNING"

    return until("two replicas", is_well)


def deploy(changes: dict[str, Any]) -> None:
    """Deploys the application, or changes it."""
    serve.run(on_ray.application_of(Faulty, ray_options(ARGS | changes)), name="default")


def free_port() -> int:
    """Returns a port that nobody listens at."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


def main() -> None:
    """Starts Ray on this machine, and checks."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        os.environ[FAULT] = f"{folder}/fault"
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver="-v" in sys.argv)
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            check_wrong_options()
            deploy({})
            check(f"http://127.0.0.1:{port}", pathlib.Path(folder, "fault"))
        finally:
            serve.shutdown()
            ray.shutdown()


def expected_texts() -> dict[str, str]:
    """Returns what an engine without a server answers."""
    llm = LLM(DEMO_MODEL, **ENGINE)
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    return {str(output.prompt): output.outputs[0].text or "" for output in outputs}


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    EXPECTED = expected_texts()
    main()
    print("ray-check: all is well")
