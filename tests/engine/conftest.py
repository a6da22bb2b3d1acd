"""Fixtures of the engine's tests."""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import pytest

from pallas_paged.engine.core.buckets import Bucket, Buckets
from pallas_paged.engine.device.programs import StepPrograms

ALL_SHAPES = ("test_buckets", "test_full_step", "test_smoke")
"""Modules whose engines have steps of all the shapes that a user's have."""


@pytest.fixture(autouse=True, scope="module")
def few_shapes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Gives the engines of most modules few shapes of steps: the largest, and the fewest tokens.

    To compile a program takes far longer than to run it, and what is tested is which requests a
    step holds, not how far it is padded.
    """
    if request.module.__name__.rpartition(".")[2] in ALL_SHAPES:
        yield
        return
    every = Buckets.for_limits

    def few(*args: int, **options: bool) -> Buckets:
        buckets = every(*args, **options)
        tokens = sorted({buckets.mixed_tokens[0], buckets.mixed_tokens[-1]})
        return dataclasses.replace(
            buckets,
            decode_seqs=buckets.decode_seqs[-1:],
            mixed_tokens=tuple(tokens),
            mixed_seqs=buckets.mixed_seqs[-1:],
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Buckets, "for_limits", few)
        yield


@pytest.fixture(scope="module")
def optimised() -> Iterator[None]:
    """Lets LLVM make an engine's programs fast, for modules that run them hundreds of times.

    Elsewhere it takes longer than what it saves, see tests/conftest.py.
    """
    options = {"xla_backend_optimization_level": 1}
    with pytest.MonkeyPatch.context() as patch:
        compiled = functools.partialmethod(jax.stages.Lowered.compile, compiler_options=options)
        patch.setattr(jax.stages.Lowered, "compile", compiled)
        yield


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Bucket]:
    """The buckets of the steps, as they run."""
    buckets: list[Bucket] = []
    run_program = StepPrograms.__call__

    def call(programs: StepPrograms, bucket: Bucket, *args: object) -> object:
        buckets.append(bucket)
        return run_program(programs, bucket, *args)

    monkeypatch.setattr(StepPrograms, "__call__", call)
    return buckets
