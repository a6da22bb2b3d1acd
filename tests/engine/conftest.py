"""Fixtures of the engine's tests."""

import functools
from collections.abc import Iterator

import jax
import pytest


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
