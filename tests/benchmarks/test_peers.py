"""Other engines beside ours: the rule for equal outputs, their processes, and what fails in one."""

import json
import pathlib
import sys
import textwrap
import time
from collections.abc import Iterator

import pytest

from benchmarks import random_models
from benchmarks.peer_engines import floor
from benchmarks.peer_engines.agreement import Agreement, Reference, compare
from benchmarks.peer_engines.comparison import DRIVERS, OURS, REFERENCE
from benchmarks.peer_engines.driver_process import DriverProcess, EngineError, run_to_end
from benchmarks.workloads import Request
from tests.programs import ROOT, run_program

TOKENS = [[1, 2, 3], [4, 5, 6]]
SURE = Reference(TOKENS, [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
TIED = Reference(TOKENS, [[1.0, 1.0, 1.0], [1.0, 1e-4, 1.0]])


@pytest.mark.parametrize(
    ("reference", "second", "agreement"),
    [
        (SURE, [4, 5, 6], Agreement(2, 0, ())),
        (TIED, [4, 7, 6], Agreement(1, 1, ())),
        (TIED, [4, 5, 7], Agreement(1, 1, ())),
    ],
)
def test_outputs_may_differ_from_a_near_tie_on(
    reference: Reference, second: list[int], agreement: Agreement
) -> None:
    assert compare(reference, [TOKENS[0], second]) == agreement


@pytest.mark.parametrize(
    ("reference", "second", "problem"),
    [
        (SURE, [4, 5, 7], "request 1: token 2 is 7, not 6, whose logit is 1 above the next one"),
        (TIED, [3, 7, 7], "request 1: token 0 is 3, not 4, whose logit is 1 above the next one"),
        (TIED, [4, 5], "request 1: 2 tokens, not 3"),
    ],
)
def test_other_differences_are_wrong(reference: Reference, second: list[int], problem: str) -> None:
    assert compare(reference, [TOKENS[0], second]) == Agreement(1, 0, (problem,))


def test_a_missing_output_is_wrong() -> None:
    assert compare(SURE, TOKENS[:1]) == Agreement(0, 0, ("1 outputs for 2 requests",))


# --- the floor ------------------------------------------------------------------------------------


def requests(*lengths: tuple[int, int]) -> list[Request]:
    return [Request((5,) * prompt_len, output_len) for prompt_len, output_len in lengths]


@pytest.mark.parametrize(
    ("max_num_seqs", "lengths", "seconds"),
    [
        (4, [(8, 4)], 8 * 1 + 3 * 10),  # the memory
        (20, [(3, 2)] * 20, 60 * 1 + 20 * 1),  # the arithmetic
        (2, [(3, 4), (5, 2), (7, 3)], 15 * 1 + 3 * 10),  # the last behind the second
        (1, [(3, 4), (5, 2), (7, 3)], 15 * 1 + 6 * 10),
        (2, [(3, 1), (5, 1)], 8 * 1),  # no decode step
    ],
)
def test_the_floor_of_a_workload(
    max_num_seqs: int, lengths: list[tuple[int, int]], seconds: float
) -> None:
    rates = floor.Rates(one_row_s=10.0, per_row_s=1.0)
    assert floor.least_seconds(requests(*lengths), max_num_seqs, rates) == seconds


def test_rates_are_of_all_products_of_a_model() -> None:
    """Twice the layers take longer, and a row among many less than one alone."""
    config = random_models.CONFIGS["20m"]
    rates = floor.Products(config).measure()
    assert 0 < rates.per_row_s < rates.one_row_s
    small = floor.Products(config | {"num_hidden_layers": 1, "vocab_size": 64}).measure()
    assert 2 * small.per_row_s < rates.per_row_s


# --- a driver's process ---------------------------------------------------------------------------

READY = "print('{\"ready\": true}', flush=True)"


class Start:
    """Starts Python programs as drivers."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.log = folder / "log.txt"
        self.started: list[DriverProcess] = []

    def __call__(self, program: str, time_limit_s: float = 60) -> DriverProcess:
        command = [sys.executable, "-c", "import sys, time\n" + textwrap.dedent(program)]
        self.started.append(DriverProcess(command, {}, self.log, time_limit_s))
        return self.started[-1]


@pytest.fixture
def start(tmp_path: pathlib.Path) -> Iterator[Start]:
    start = Start(tmp_path)
    yield start
    for process in start.started:
        process.close()


def await_stop(process: DriverProcess) -> None:
    """Returns when the process is stopped; a signal takes a moment."""
    for _ in range(2000):
        fields = pathlib.Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2]
        if fields.split()[0] == "T":
            return
        time.sleep(0.01)
    raise AssertionError("it goes on")


def test_it_runs_only_while_it_is_asked(start: Start) -> None:
    process = start(f"""
        {READY}
        for line in sys.stdin:
            print('{{"heard": "' + line.strip() + '"}}', flush=True)
    """)
    assert process.load_s > 0
    await_stop(process)
    assert process.ask("run") == {"heard": "run"}
    assert process.ask("reference") == {"heard": "reference"}
    await_stop(process)


def test_what_one_that_dies_said_last_is_told(start: Start) -> None:
    process = start(f"{READY}\ninput()\nsys.exit('out of memory')")
    with pytest.raises(EngineError, match=r"ended with status 1 at: run\n    out of memory$"):
        process.ask("run")


def test_one_that_cannot_load_is_told(start: Start) -> None:
    with pytest.raises(EngineError, match=r"ended with status 1 at: loading[\s\S]*no_such_engine"):
        start("import no_such_engine")


def test_one_that_hangs_is_ended(start: Start) -> None:
    process = start(f"{READY}\ninput()\ntime.sleep(600)", time_limit_s=2)
    with pytest.raises(EngineError, match="no answer in 2 s to: run"):
        process.ask("run")
    assert not pathlib.Path(f"/proc/{process.pid}").exists()


def test_an_answer_that_is_none_is_told(start: Start) -> None:
    with pytest.raises(EngineError, match="answered b'hello' to: loading"):
        start("print('hello', flush=True)\ntime.sleep(600)")


def test_an_interpreter_that_is_not_there_is_told(tmp_path: pathlib.Path) -> None:
    with pytest.raises(EngineError, match=r"cannot be started: .*no/python"):
        DriverProcess([str(tmp_path / "no/python")], {}, tmp_path / "log.txt", 1)


def test_a_conversion_that_fails_or_hangs_is_told(tmp_path: pathlib.Path) -> None:
    command, log = [sys.executable, "-c"], tmp_path / "log.txt"
    with pytest.raises(EngineError, match=r"ended with status 1\n    no such layer$"):
        run_to_end([*command, "import sys; sys.exit('no such layer')"], {}, log, 60)
    with pytest.raises(EngineError, match=r"did not end in 0\.5 s"):
        run_to_end([*command, "import time; time.sleep(600)"], {}, log, 0.5)


# --- the program ----------------------------------------------------------------------------------

FAKE = f"""#!{sys.executable}
import json, pathlib, sys
sys.path[:0] = [{str(DRIVERS)!r}, {str(ROOT)!r}]
driver = pathlib.Path(sys.argv.pop(1)).name
import peer_protocol
file = pathlib.Path(__file__).with_name("tokens.json")

def agreeing(job):
    import run_ours
    run = run_ours.load(job)["run"]
    def reference():
        answer = run()
        file.write_text(json.dumps(answer))
        return answer | {{"margins": [[1.0] * len(tokens) for tokens in answer["tokens"]]}}
    return {{"run": run, "reference": reference}}

def wrong(job):
    def run():
        answer = json.loads(file.read_text())
        answer["tokens"][1][2] ^= 1
        return answer
    return {{"run": run}}

def crashing(job):
    assert pathlib.Path(job.converted, "converted").exists()
    sys.exit("no kernel for this CPU")

def convert(job):
    pathlib.Path(job.converted, "converted").touch()

loads = {{"run_transformers_static.py": agreeing, "run_vllm.py": wrong}}
peer_protocol.main(loads.get(driver, crashing), convert)
"""


@pytest.mark.slow
def test_engines_that_agree_differ_and_fail_are_told_apart(tmp_path: pathlib.Path) -> None:
    fake = tmp_path / "python"
    fake.write_text(FAKE)
    fake.chmod(0o755)
    file = tmp_path / "figures.json"
    pythons = [f"--{name}_python={fake}" for name in ("transformers", "vllm", "llama_cpp")]
    done = run_program(
        "benchmarks.peers",
        "--model=tiny",
        "--num_requests=5",
        "--num_seqs=64",
        "--rounds=2",
        f"--folder={tmp_path / 'kept'}",
        f"--json={file}",
        *pythons,
    )
    assert done.returncode == 1, done.stderr
    assert "5 running" in done.stdout  # no more than there are requests
    columns = {c["engine"]: c for c in json.loads(file.read_text())}
    assert {c["max_num_seqs"] for c in columns.values()} == {5}
    for name in (OURS, REFERENCE):
        column = columns[name]
        assert column["problem"] is None
        assert column["agreement"] == {"equal": 5, "near_ties": 0, "wrong": []}
        assert len(column["seconds"]) == 2
        assert column["tokens_per_s"] > 0
    assert columns[OURS]["ours_over_this"] == 1
    (wrong,) = columns["vLLM"]["agreement"]["wrong"]
    assert wrong.startswith("request 1: token 2 is ")
    assert f"vLLM: {wrong}" in done.stdout
    assert columns["llama.cpp"]["problem"].endswith("no kernel for this CPU")
    assert columns["llama.cpp"]["tokens_per_s"] is None
    least = columns[floor.NAME]
    assert least["agreement"] is None
    assert 0 < least["ours_over_this"] < 1
    assert "llama.cpp failed: ended with status 1 at: loading\n" in done.stdout
    assert "OpenVINO GenAI" not in columns


def test_a_model_whose_context_is_too_short_is_refused() -> None:
    done = run_program("benchmarks.peers", "--model=tiny", "--workload=long")
    assert done.returncode == 2
    assert "workload=long has requests of 1600 tokens, model=tiny a context of 256" in done.stderr
