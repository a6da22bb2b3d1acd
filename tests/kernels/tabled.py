"""Which of the interpreted cases `make test` runs, and which it leaves to the tables."""

import pytest


def tabled_but(names, few):
    """Returns cases by their names, all but a few marked `tabled`, for `parametrize`."""
    assert set(few) <= set(names)
    return [
        pytest.param(name, marks=() if name in few else pytest.mark.tabled, id=str(name))
        for name in names
    ]
