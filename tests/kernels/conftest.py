"""Fixtures of the kernels' tests."""

import jaxtyping
import pytest


@pytest.fixture
def unchecked_types():
    """Lets wrong arguments reach the errors that users, without jaxtyping's checks, see."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
