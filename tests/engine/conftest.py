"""Fixtures of the engine's tests."""

from collections.abc import Iterator

import jaxtyping
import pytest


@pytest.fixture(autouse=True, scope="module")
def unchecked_shapes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Shapes are checked by the tests of what has them, and here by those of `test_smoke`.

    Elsewhere here that would take much of the time, of the mock model's four fifths.
    """
    jaxtyping.config.update("jaxtyping_disable", not request.module.__name__.endswith("test_smoke"))
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
