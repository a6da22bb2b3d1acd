"""Fixtures of the engine's tests."""

from collections.abc import Iterator

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
