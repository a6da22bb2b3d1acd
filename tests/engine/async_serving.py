"""What the tests of `AsyncLLM` share: engines over the mock device, callers, what must be left."""

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from typing import Any, NamedTuple

from pallas_paged.engine import BeamSearchParams, SamplingParams
from pallas_paged.engine.async_llm import AsyncLLM
from pallas_paged.engine.outputs import RequestOutput
from pallas_paged.engine.request_stream import RequestStream
from pallas_paged.engine.sampling_params import RequestOutputKind
from tests.engine.mock_model import MockDevice, device_of, make_mock_async_llm, make_mock_llm
from tests.engine.test_interrupts import Letters

CUMULATIVE, DELTA, FINAL_ONLY = RequestOutputKind
PATIENCE_S = 20.0
"""Far longer than anything here takes; what is not there then never comes."""
OPTIONS: dict[str, Any] = {
    "num_blocks": 65,
    "block_size": 4,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 32,
    "max_model_len": 64,
}

Answer = list[tuple[int, str | None, tuple[int, ...], str | None, int | str | None]]
"""Of each completion its index, text, tokens, and how it ended."""
Request = tuple[Sequence[int], SamplingParams | BeamSearchParams]


def run[T](coroutine: Coroutine[Any, Any, T]) -> T:
    """Runs a test's coroutine; fails if it does not end, or leaves a task behind."""

    async def watched() -> T:
        async with asyncio.timeout(PATIENCE_S):
            result = await coroutine
        await asyncio.sleep(0)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, f"tasks are left: {left}"
        return result

    return asyncio.run(watched())


def make(**options: Any) -> AsyncLLM:
    """Returns an engine whose tokens are letters."""
    return make_mock_async_llm(**{"tokenizer": Letters()} | OPTIONS | options)


def params(max_tokens: int = 8, kind: RequestOutputKind = DELTA, **fields: Any) -> SamplingParams:
    """Returns what a request asks for."""
    return SamplingParams(temperature=1, max_tokens=max_tokens, output_kind=kind, **fields)


def offline(requests: Sequence[Request], **options: Any) -> list[Answer]:
    """Returns what the requests get alone, one after the other, from an `LLM`."""
    llm = make_mock_llm(**{"tokenizer": Letters()} | OPTIONS | options)
    return [
        answer_of(llm.generate({"prompt_token_ids": list(prompt)}, one, use_tqdm=False)[0])
        for prompt, one in requests
    ]


def answer_of(output: RequestOutput) -> Answer:
    """Returns what is compared of a whole output."""
    assert output.finished
    return [
        (one.index, one.text, one.token_ids, one.finish_reason, one.stop_reason)
        for one in output.outputs
    ]


async def whole(stream: RequestStream, kind: RequestOutputKind) -> RequestOutput:
    """Reads a stream to its end; returns its last output, or all deltas as one."""
    result: RequestOutput | None = None
    try:
        async for output in stream:
            assert result is None or not result.finished, "an output comes behind the last one"
            is_delta = result is not None and kind is DELTA
            result = result.merged_with(output) if is_delta else output
    finally:
        stream.close()
    assert result is not None
    assert result.finished
    return result


async def ask(llm: AsyncLLM, request: Request, name: str | None = None) -> Answer:
    """Returns the answer to a request."""
    prompt, one = request
    kind = one.output_kind if isinstance(one, SamplingParams) else FINAL_ONLY
    stream = await llm.submit({"prompt_token_ids": list(prompt)}, one, name)
    return answer_of(await whole(stream, kind))


async def submit_together(
    llm: AsyncLLM, requests: Sequence[Request], **options: Any
) -> list[RequestStream]:
    """Submits requests so that one and the same step is the first after all of them."""
    may_go = threading.Event()
    llm.engine._loop.call(may_go.wait)
    tasks = [
        asyncio.create_task(llm.submit({"prompt_token_ids": list(prompt)}, one, **options))
        for prompt, one in requests
    ]
    await asyncio.sleep(0)  # all are on their way
    may_go.set()
    return await asyncio.gather(*tasks)


async def assert_idle(llm: AsyncLLM) -> None:
    """Asserts that nothing is left of any request, in either thread."""
    engine, parts = llm.engine, llm.engine.parts

    def check_core() -> None:
        assert not parts.core.scheduler.queues.unfinished
        parts.core.scheduler.check_invariants()
        free = parts.memory.num_free_blocks + len(parts.memory.pins)
        assert free == parts.memory.num_usable_blocks, "blocks are lost"

    await engine.call(check_core)
    assert not engine.num_open_requests
    assert not parts.processor.request_ids
    assert not engine._leaving
    assert engine._loop.num_waiting == 0


class Threads(NamedTuple):
    """The threads of an engine."""

    steps: threading.Thread
    readers: set[threading.Thread]

    @property
    def are_gone(self) -> bool:
        """Whether all of them have ended."""
        return not any(thread.is_alive() for thread in (self.steps, *self.readers))


def threads_of(llm: AsyncLLM) -> Threads:
    """Returns the threads that work for an engine now."""
    return Threads(llm.engine._loop._thread, set(llm._readers._threads))


def device(llm: AsyncLLM) -> MockDevice:
    """Returns the engine's device."""
    return device_of(llm.engine.parts)


class Gate:
    """Holds the thread of the steps before a device's event, from `close` to `open`."""

    def __init__(self, llm: AsyncLLM, event: str = "collect") -> None:
        """Holds it at once."""
        self._event = event
        self._is_reached, self._is_open = threading.Event(), threading.Event()
        device(llm).before = self._pass

    def _pass(self, event: str) -> None:
        if event.startswith(self._event):
            self._is_reached.set()
            assert self._is_open.wait(PATIENCE_S)

    async def reached(self) -> None:
        """Waits until the thread stands before the gate."""
        while not self._is_reached.is_set():
            await asyncio.sleep(1e-3)

    def open(self) -> None:
        """Lets it pass from now on."""
        self._is_open.set()
