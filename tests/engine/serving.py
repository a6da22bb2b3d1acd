"""What the engine's tests share: small engines, their requests, and the rule of equal tokens."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from pallas_paged.engine import LLM
from pallas_paged.engine.device.runner import ModelRunner
from tests.models.references import DATA, load_reference

MIN_MARGIN = 1e-3


def make_llm(name: str, **options: Any) -> LLM:
    """Returns an engine over one of the recorded checkpoints."""
    fixed = {"num_blocks": 400, "compilation_cache_dir": None, "background_compilation": False}
    return LLM(DATA / name, **fixed | options)


def reference_requests(name: str) -> list[dict[str, list[int]]]:
    """Returns the prompts that transformers' tokens were recorded for."""
    return [{"prompt_token_ids": list(prompt)} for prompt in load_reference(name).prompts]


def same_tokens(actual: Sequence[Sequence[int]], expected: np.ndarray, margins: np.ndarray) -> None:
    """Asserts that tokens are equal up to where the reference's top two are as good as equal.

    Rows may be shorter than the reference's. Under 1 % of them may part at such a place.
    """
    parted = 0
    for row, (tokens, wanted, margin) in enumerate(zip(actual, expected, margins, strict=True)):
        wanted = wanted[: len(tokens)].tolist()
        different = [
            i for i, pair in enumerate(zip(tokens, wanted, strict=True)) if pair[0] != pair[1]
        ]
        if different:
            close = np.flatnonzero(margin < MIN_MARGIN)
            assert close.size, f"row {row}: {list(tokens)} instead of {wanted}"
            assert close[0] <= different[0], f"row {row}: {list(tokens)} instead of {wanted}"
            parted += 1
    assert parted <= 0.01 * len(expected)


def assert_idle(llm: LLM) -> None:
    """Asserts that nothing is left of any request."""
    assert llm.kv_cache_usage == 0
    llm.engine.check_idle()


@contextlib.contextmanager
def nothing_compiles(runner: ModelRunner) -> Iterator[None]:
    """Fails when a program is traced or compiled inside, and names what was."""
    before = dict(runner.programs.num_traces)
    compiled: list[str] = []

    def listen(event: str, _: float, **details: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(str(details))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield
    jax.monitoring.unregister_event_duration_listener(listen)
    traces = runner.programs.num_traces
    new = {b: n - before.get(b, 0) for b, n in traces.items() if n != before.get(b)}
    assert not new, f"these buckets were traced after the warm-up: {new}"
    assert not compiled, f"compiled after the warm-up: {compiled}"
