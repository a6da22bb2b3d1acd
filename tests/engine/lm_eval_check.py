"""The model of lm_eval against lm_eval's own `hf`, as recorded; `make eval-check` runs it.

It needs lm_eval, and so is not one of the tests that `make check` finds.
"""

import collections
import importlib.metadata
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from lm_eval.api.model import CacheHook

from pallas_paged.engine.evaluation.harness import PallasPagedLM
from tests.engine.lm_eval_cases import CASES, DATA, REFERENCE, ROOT, Answers, compare, evaluate

ENGINE = {"num_blocks": 400, "max_num_seqs": 8, "background_compilation": False}
RECORDED = json.loads(REFERENCE.read_text())["cases"]


@pytest.fixture(autouse=True, scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Keeps what the datasets library writes out of the user's folder, and its warnings apart."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.chdir(ROOT)
        yield


def recorded(name: str) -> tuple[Answers, list[float]]:
    case = RECORDED[name]
    return Answers(case["metrics"], case["responses"]), case["margins"]


@pytest.mark.parametrize("name", CASES)
def test_answers_are_those_of_hf(name: str) -> None:
    case = CASES[name]
    found = evaluate(case, PallasPagedLM(**case.model_args | ENGINE))
    largest = compare(found, *recorded(name))
    print(f"\n{name}: log-probabilities differ by {largest:.1e} at most; {found.metrics}")


def test_answers_come_from_lm_evals_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["demo"]
    model = PallasPagedLM(**case.model_args | ENGINE)
    first = evaluate(case, model, use_cache=str(tmp_path / "answers"))
    monkeypatch.setattr(model, "llm", None)
    assert evaluate(case, model, use_cache=str(tmp_path / "answers")) == first


def test_answers_are_kept_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation that is interrupted goes on with what its cache has."""
    kept: dict[str, dict[Any, Any]] = collections.defaultdict(dict)

    def keep(hook: CacheHook, kind: str, request: Any, answer: Any) -> None:
        kept[kind][json.dumps(request)] = answer

    monkeypatch.setattr(CacheHook, "add_partial", keep)
    case = CASES["demo"]
    answers = evaluate(case, PallasPagedLM(**case.model_args | ENGINE)).responses
    words = [*answers["local_choices"], *answers["local_last_words"]]
    assert sorted(kept["loglikelihood"].values()) == sorted(
        tuple(answer) for document in words for answer in document
    )
    assert [[one] for one in kept["loglikelihood_rolling"].values()] == answers["local_texts"]
    assert sorted(kept["generate_until"].values()) == sorted(
        text for (text,) in answers["local_completions"]
    )


def test_what_is_not_used_or_left_out_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    case = CASES["demo"]._replace(tasks=("local_choices",))
    with caplog.at_level(logging.INFO, "lm_eval.models.pallas_paged"):
        model = PallasPagedLM(**case.model_args | ENGINE, batch_size="auto", device="cuda:0")
        evaluate(case, model)
    ours = (r for r in caplog.records if r.name == "lm_eval.models.pallas_paged")
    unused, left_out = (record.getMessage() for record in ours)
    assert unused.startswith("batch_size=auto, device=cuda:0: not used.")
    assert left_out.startswith("4 of 30 contexts were too long for max_length=96: their first")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_lenght": 96}, "max_lenght"),
        ({"max_length": 96, "max_model_len": 97}, "max_length=96 and max_model_len=97"),
        ({"max_length": 512}, "max_model_len=513 is more than the 512 tokens"),
    ],
)
def test_options_are_refused_by_name(options: dict[str, int], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        PallasPagedLM("models/demo", **options)


def test_a_folder_without_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match="has no tokenizer files"):
        PallasPagedLM("tests/models/data/llama-mha-tied", num_blocks=400)


def test_lm_eval_finds_the_model_by_its_entry_point() -> None:
    (entry,) = importlib.metadata.entry_points(group="lm_eval.models", name="pallas-paged")
    assert entry.load() is PallasPagedLM


def test_the_program_is_lm_evals(tmp_path: Path) -> None:
    arguments = ",".join(f"{key}={value}" for key, value in CASES["demo"].model_args.items())
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pallas_paged.engine.evaluation", "--model", "pallas-paged"),
            *("--model_args", f"{arguments},num_blocks=400", "--tasks", "local_choices"),
            *("--include_path", str(DATA), "--limit", "4", "--output_path", str(tmp_path)),
        ],
        cwd=ROOT,
        env=os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "batch_size=1, device=cuda:0: not used" in done.stderr
    assert "torch" not in done.stdout
    (results,) = tmp_path.rglob("results_*.json")
    found = json.loads(results.read_text())["results"]["local_choices"]
    answers = RECORDED["demo"]["responses"]["local_choices"][:4]
    expected = sum(choices[0] == max(choices) for choices in answers) / 4
    assert found["acc,none"] == expected


def test_nothing_needs_torch() -> None:
    assert "torch" not in sys.modules
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("torch")
