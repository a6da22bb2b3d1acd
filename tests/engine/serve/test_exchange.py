"""What becomes of a request whose client goes while its prompts are taken in."""

import asyncio
from typing import Any

from pallas_paged.engine import SamplingParams
from pallas_paged.engine.request_stream import RequestStream
from pallas_paged.engine.serve.exchange import Exchange


class HalfSlow:
    """An engine that takes in the first prompt at once, and no other one."""

    def __init__(self) -> None:
        self.left: list[str] = []

    async def submit(self, prompt: Any, params: Any, name: str, **_: Any) -> RequestStream:
        if prompt != "first":
            await asyncio.sleep(60)
        return RequestStream(name, is_delta=False, leave=self.left.append)


def test_what_was_taken_in_is_left_when_the_client_goes() -> None:
    async def go() -> None:
        llm: Any = HalfSlow()
        exchange = Exchange("id", "/v1/completions")
        submitting = exchange.submit(
            llm, ["first", "second"], SamplingParams(), priority=None, timeout_s=None
        )
        task = asyncio.ensure_future(submitting)
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait({task})
        exchange.close()
        assert len(llm.left) == 1
        assert llm.left[0].startswith("id-")

    asyncio.run(go())
