"""One server for all tests of a process that only ask it something."""

from collections.abc import Iterator

import openai
import pytest

from tests.engine.serve.exact import Exact, exact_pair
from tests.engine.serve.live import Live, live_server


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """A server of the demo model; a test leaves no request behind."""
    with live_server() as running:
        yield running
        running.assert_idle()


@pytest.fixture(scope="session")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exact]:
    """A server of a model that chats, and an engine that gives the same."""
    with exact_pair(tmp_path_factory.mktemp("chatty")) as pair:
        yield pair


@pytest.fixture
def client(exact: Exact) -> Iterator[openai.OpenAI]:
    """The official client of that server; a test leaves no request behind."""
    with exact.client() as client:
        yield client
    exact.live.assert_idle()
