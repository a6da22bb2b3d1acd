"""What watches steps: a line of JSON for each, and traces of chosen ones."""

import json
import pathlib
from typing import Any

import jax
import pytest

from pallas_paged.engine import LLM, SamplingParams
from pallas_paged.engine.config import EngineConfig
from tests.engine.mock_model import make_mock_llm
from tests.engine.serving import make_llm
from tests.programs import run_program

PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
PROMPTS = [{"prompt_token_ids": [3, 4, 5 + i]} for i in range(3)]


def lines_of(file: pathlib.Path, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> tuple[LLM, pathlib.Path]:
    file = tmp_path_factory.mktemp("log") / "steps.jsonl"
    return make_llm("llama-mqa-linear", max_num_seqs=4, step_log=file), file


def test_each_step_is_a_line(watched: tuple[LLM, pathlib.Path]) -> None:
    llm, file = watched
    llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    steps = lines_of(file, "step")
    assert [step["step_id"] for step in steps] == list(range(llm.engine.core.num_steps))
    compiled = [name for line in lines_of(file, "compile") for name in line["programs"]]
    assert {step["bucket"] for step in steps} <= set(compiled)
    first, *others = steps
    assert (first["num_seqs"], first["num_tokens"], first["num_admitted"]) == (3, 9, 3)
    assert first["bucket"].startswith("mixed ")
    assert first["interval_s"] is None
    assert sum(step["num_new_tokens"] for step in steps) == 36
    assert [step["num_steps"] for step in others] == [8, 3]
    assert [step["num_tokens"] for step in others] == [24, 9]
    assert steps[-1]["num_running"] == 0
    for step in steps:
        assert min(step[f"{name}_s"] for name in ("schedule", "dispatch", "wait", "commit")) >= 0
        assert step["time"] > 1e9


def test_chosen_steps_are_traced(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    events: list[str] = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: events.append(f"in {folder}"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append("stop"))
    config = {"profile_dir": "there", "profile_steps": (3, 5)}
    llm = make_mock_llm(**config)
    device = llm.engine.core.executor
    device.before = events.append
    llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    begin, end = events.index("in there"), events.index("stop")
    assert events[begin + 1] == "dispatch 3"
    assert events[end - 1] == "collect 4"
    assert events.count("in there") == events.count("stop") == 1
    events.clear()
    short = make_mock_llm(profile_dir="there", profile_steps=(3, 500))
    short.engine.core.executor.before = events.append
    short.generate(PROMPTS, PARAMS, use_tqdm=False)
    assert events[-1] == "stop"


def test_a_trace_on_request(tmp_path: pathlib.Path) -> None:
    llm = make_llm("llama-mqa-linear", max_num_seqs=4, profile_dir=tmp_path)
    with pytest.raises(RuntimeError, match="no trace is under way"):
        llm.stop_profile()
    llm.start_profile()
    with pytest.raises(RuntimeError, match="under way; end it first"):
        llm.start_profile()
    llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    llm.stop_profile()
    assert list(tmp_path.rglob("*.xplane.pb"))
    with pytest.raises(RuntimeError, match="profile_dir=None: name a folder"):
        make_mock_llm().start_profile()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"profile_steps": (1, 2)}, "needs a folder for the trace; set profile_dir"),
        ({"profile_dir": "d", "profile_steps": (2, 2)}, "two integers, 0 <= first < second"),
        ({"profile_dir": "d", "profile_steps": 3}, "two integers, 0 <= first < second"),
        ({"profile_dir": ""}, "must be the name of a file or folder"),
        ({"step_log": 3}, "must be the name of a file or folder"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig("m", **options)


@pytest.mark.slow
def test_the_programs_take_the_flags(tmp_path: pathlib.Path) -> None:
    log, folder = tmp_path / "log", tmp_path / "trace"
    flags = [f"--step_log={log}", f"--profile_dir={folder}", "--profile_steps=1:3"]
    done = run_program("pallas_paged.engine.generate", "--prompt=def", "--max_tokens=6", *flags)
    assert done.returncode == 0, done.stderr
    assert lines_of(log, "step")
    assert list(folder.rglob("*.xplane.pb"))
    wrong = run_program("pallas_paged.engine.generate", "--prompt=x", "--profile_steps=5")
    assert wrong.returncode != 0
    assert "first:end" in wrong.stderr
