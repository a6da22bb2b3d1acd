"""The program `benchmarks.serving` against servers that are made up: flags, files, statuses."""

import json
import pathlib
from typing import Any

import pytest

from pallas_paged.models.demo import DEMO_MODEL
from tests.benchmarks.fake_openai import FakeServer, Script, in_thread
from tests.programs import Done, run_program

TEXT = f"--tokenizer={DEMO_MODEL}"
TOKENS = ("--prompts=tokens", "--vocab_size=50", "--prompt_len=5", "--output_len=3")


def run(*flags: str) -> Done:
    return run_program("benchmarks.serving", *flags, timeout_s=60)


def answering(script: Script) -> FakeServer:
    return FakeServer(lambda index, body: script)


def test_a_sweep_of_texts(tmp_path: pathlib.Path) -> None:
    """Also a run that fails in part, and a picture."""
    file, plot = tmp_path / "figures.json", tmp_path / "plot.png"
    server = FakeServer(lambda index, body: Script(status=500) if index == 3 else Script())
    flags = (
        *("--lengths=alpaca", "--num_prompts=6", "--request_rate=50,100,inf", "--burstiness=2"),
        *("--max_concurrency=4", "--goodput=ttft:60000", "--temperature=0.5"),
        *("--api_key=secret", f"--json={file}", f"--plot={plot}", "--warmup_requests=1"),
    )
    with in_thread(server):
        done = run(TEXT, f"--base_url={server.url}/v1/", *flags)
    assert done.returncode == 0, done.stderr
    assert "1 failed: HTTP 500: no room" in done.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
    reports = json.loads(file.read_text())
    assert [report["request_rate"] for report in reports] == [50, 100, "inf"]
    assert [(one["completed"], one["failed"]) for one in reports] == [(5, 1), (6, 0), (6, 0)]
    first = reports[0]
    assert (first["total_input_tokens"], first["total_output_tokens"]) == (35, 15)
    assert first["request_goodput"] == first["request_throughput"] > 0
    assert (first["burstiness"], first["max_concurrency"]) == (2, 4)
    assert (first["model_id"], first["num_prompts"]) == ("fake", 6)
    prompts = [body["prompt"] for body in server.requests]
    assert len(prompts) == len(set(prompts)) == 19
    assert {body["temperature"] for body in server.requests} == {0.5}
    assert "ignore_eos" not in server.requests[0]
    assert server.headers["Authorization"] == "Bearer secret"
    assert server.most_at_once <= 4


def test_servers_side_by_side(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "figures.json"
    slow, fast = answering(Script(("a", 0.3, "b"))), answering(Script(("a", "b", "c")))
    with in_thread(slow, fast):
        done = run(
            *(f"--base_url={slow.url}", "--label=slow", f"--base_url={fast.url}", "--label=fast"),
            *("--num_prompts=3", "--request_rate=100,inf", "--rounds=2", "--model=other"),
            *("--max_model_len=8", "--ignore_eos", f"--json={file}", *TOKENS),
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("fast / slow") == 2
    reports = json.loads(file.read_text())
    assert [(report["label"], report["round"]) for report in reports] == [
        *[("slow", 0), ("fast", 0)] * 2,
        *[("fast", 1), ("slow", 1)] * 2,
    ]
    assert reports[0]["mean_tpot_ms"] > reports[1]["mean_tpot_ms"]
    prompts = [[tuple(body["prompt"]) for body in one.requests] for one in (slow, fast)]
    assert sorted(prompts[0]) == sorted(prompts[1])
    assert len(set(prompts[0])) == len(prompts[0]) == 2 + 4 * 3
    for body in slow.requests:
        assert (body["model"], body["max_tokens"], body["ignore_eos"]) == ("other", 3, True)
        assert len(body["prompt"]) == 5


def test_chats_of_a_data_set(tmp_path: pathlib.Path) -> None:
    file, data = tmp_path / "figures.json", tmp_path / "alpaca.json"
    entries = [{"instruction": f"Say {i}", "input": "", "output": str(i)} for i in range(5)]
    data.write_text(json.dumps(entries))
    server = answering(Script())
    with in_thread(server):
        done = run(
            *(TEXT, f"--base_url={server.url}", "--endpoint=/v1/chat/completions"),
            *(f"--dataset={data}", "--num_prompts=4", "--warmup_requests=1", f"--json={file}"),
        )
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(file.read_text())
    assert (report["completed"], report["backend"]) == (4, "openai-chat")
    contents = [body["messages"][0]["content"] for body in server.requests]
    assert sorted(contents) == [f"Say {i}" for i in range(5)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--warmup_requests=0"], "100 failed: HTTP 500: no room"),
        pytest.param([], "all warm-up requests failed: HTTP 500: no room", marks=pytest.mark.slow),
    ],
)
def test_when_all_fail_the_status_is_1(flags: list[str], message: str) -> None:
    server = answering(Script(status=500))
    with in_thread(server):
        done = run(*TOKENS, f"--base_url={server.url}", *flags)
    assert done.returncode == 1
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


QUICK = [
    ([], "--tokenizer=FOLDER"),
    ([*TOKENS, "--request_rate=1", "--plot=p.nothing"], "'nothing' is not supported"),
]
SLOW = [
    ([*TOKENS, "--base_url=http://127.0.0.1:1", "--ready_timeout_s=0"], "is not ready"),
    ([*TOKENS, "--endpoint=/v1/chat/completions"], "which takes texts"),
    (["--vocab_size=9"], "--vocab_size is for drawn token ids"),
    ([*TOKENS, TEXT], "--vocab_size is for drawn token ids"),
    ([TEXT, "--prompt_len=9"], "go together"),
    ([TEXT, "--prompt_len=9", "--output_len=9", "--dataset=x"], "lengths of its own"),
    ([*TOKENS, "--request_rate=1,x"], "request_rate='x'"),
    ([*TOKENS, "--goodput=itl:1"], "goodput='itl:1'"),
    ([*TOKENS, "--label=a", "--label=b"], "one name for each of 1 base_url"),
    ([*TOKENS, "--plot=p.png"], "finite rates"),
    ([*TOKENS, "--request_rate=1", "--plot=no/such/p.png"], "no/such"),
]


@pytest.mark.parametrize(
    ("flags", "message"), QUICK + [pytest.param(*one, marks=pytest.mark.slow) for one in SLOW]
)
def test_wrong_flags_are_refused_in_a_line(flags: list[str], message: str) -> None:
    done = run(*flags)
    assert done.returncode == 2
    *_, line = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_model_len=7"], "prompt_len=5 and output_len=3 are more than the 7 tokens"),
        (["--max_model_len=1"], "max_model_len=1 must be 2 or more"),
        (["--model=other"], "give --max_model_len"),
    ],
)
def test_what_a_server_does_not_have_is_refused(flags: list[str], message: str) -> None:
    server = answering(Script())
    with in_thread(server):
        done = run(*TOKENS, f"--base_url={server.url}", *flags)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert not server.requests
