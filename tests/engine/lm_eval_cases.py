"""Local tasks of lm_eval, and how a model is evaluated on them and held against another.

It needs lm_eval, and neither jax nor torch: what records the references has no jax.
"""

from pathlib import Path
from typing import Any, NamedTuple

import lm_eval
from lm_eval.tasks import TaskManager

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests/engine/data/lm_eval"
REFERENCE = DATA / "reference.json"
ALL_TASKS = ("local_choices", "local_last_words", "local_texts", "local_completions")
MIN_MARGIN = 1e-3
RELATIVE, ABSOLUTE = 1e-6, 3e-5
"""What a sum of log-probabilities in float32 may be off: 1e-5 for a single one, and rounding."""


class Case(NamedTuple):
    """A model, and the tasks that it is evaluated on.

    Attributes:
      model: folder with a checkpoint, from the root.
      tasks: their names.
      options: of the model, beside `pretrained`; hf and pallas-paged have the same.
      chat: whether prompts go through the chat template.
    """

    model: str
    tasks: tuple[str, ...]
    options: dict[str, Any]
    chat: bool = False

    @property
    def model_args(self) -> dict[str, Any]:
        """What both are made of, in the repository's root."""
        return {"pretrained": self.model, "dtype": "float32", **self.options}


CASES = {
    "demo": Case("models/demo", ALL_TASKS, {"max_length": 96}),
    "demo-chat": Case(
        "models/demo", ("local_choices", "local_completions"), {"max_length": 200}, chat=True
    ),
    "demo-without-bos": Case("models/demo", ALL_TASKS[:3], {"add_bos_token": False}),
    # As long as the model's table of positions goes, and without BOS: EOS is in its place.
    "opt-characters": Case(
        "tests/models/data/opt-prenorm",
        ALL_TASKS,
        {"tokenizer": "tests/engine/data/lm_eval/characters", "max_length": 127},
    ),
}


class Answers(NamedTuple):
    """What a model answered.

    Attributes:
      metrics: by task and name.
      responses: by task and document: [log-probability, is greedy] of each choice or word,
        [log-probability] of a text, [completion].
    """

    metrics: dict[str, dict[str, float]]
    responses: dict[str, list[list[Any]]]


def evaluate(case: Case, model: Any, **options: Any) -> Answers:
    """Evaluates a model, with further options of `lm_eval.simple_evaluate`.

    It may be the name of one of lm_eval's, which is then made of `model_args`.
    """
    found = lm_eval.simple_evaluate(
        model=model,
        **options,
        tasks=list(case.tasks),
        task_manager=TaskManager(include_path=str(DATA), include_defaults=False),
        apply_chat_template=case.chat,
        bootstrap_iters=0,
    )
    assert found is not None
    metrics: dict[str, dict[str, float]] = {}
    responses: dict[str, list[list[Any]]] = {}
    for task in case.tasks:
        metrics[task] = {
            key.removesuffix(",none"): float(value)
            for key, value in found["results"][task].items()
            if key.endswith(",none") and not key.startswith("alias") and "_stderr" not in key
        }
        samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
        responses[task] = [[_plain(answer) for (answer,) in s["resps"]] for s in samples]
    return Answers(metrics, responses)


def compare(found: Answers, expected: Answers, margins: list[float]) -> float:
    """Asserts that answers are equal, and returns by how much log-probabilities are not.

    Args:
      found: the answers of one model.
      expected: those of the other.
      margins: of each expected completion the least one of its tokens; it may be another one where
        that is below `MIN_MARGIN`, see `serving.same_tokens`.
    """
    largest = 0.0
    for task, wanted in expected.responses.items():
        assert len(found.responses[task]) == len(wanted)
        for number, pair in enumerate(zip(found.responses[task], wanted, strict=True)):
            where = f"{task}, document {number}: {pair[0]} instead of {pair[1]}"
            for one, other in zip(*pair, strict=True):
                if isinstance(other, str):
                    assert one == other or margins[number] < MIN_MARGIN, where
                    continue
                if isinstance(other, list):
                    assert one[1] == other[1], where
                    one, other = one[0], other[0]
                error = abs(one - other)
                assert error <= ABSOLUTE + RELATIVE * abs(other), where
                largest = max(largest, error)
    for task, metrics in expected.metrics.items():
        assert found.metrics[task].keys() == metrics.keys()
        for name, value in metrics.items():
            assert abs(found.metrics[task][name] - value) <= 1e-5 * abs(value), (task, name)
    return largest


def _plain(answer: Any) -> Any:
    return list(answer) if isinstance(answer, tuple) else answer
