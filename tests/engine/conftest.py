"""Fixtures of the engine's tests."""

import functools
from collections.abc import Iterator

import jax
import jaxtyping
import pytest


@pytest.fixture(autouse=True, scope="module")
def unchecked_shapes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Checks shapes in `test_smoke` alone: other folders have tests of the functions one by one.

    It would be much of the time of the engine's tests, four fifths of it with the mock model.
    """
    jaxtyping.config.update("jaxtyping_disable", not request.module.__name__.endswith("test_smoke"))
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


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
