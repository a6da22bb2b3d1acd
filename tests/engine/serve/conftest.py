"""One server for all tests of a process that only ask it something."""

from collections.abc import Iterator

import pytest

from tests.engine.serve.live import Live, live_server


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """A server of the demo model; a test leaves no request behind."""
    with live_server() as running:
        yield running
        running.assert_idle()
