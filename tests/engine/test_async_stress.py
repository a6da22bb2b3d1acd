"""Hundreds of random callers of an `AsyncLLM` over a pool that is far too small for them."""

import asyncio
import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest

from pallas_paged.engine import BeamSearchParams, SamplingParams
from pallas_paged.engine.async_llm import AsyncLLM
from pallas_paged.engine.errors import DeadlineExceededError, EngineOverloadedError, StepFailedError
from pallas_paged.engine.request_stream import RequestStream
from pallas_paged.engine.sampling_params import RequestOutputKind
from tests.engine.async_serving import (
    FINAL_ONLY,
    Answer,
    Request,
    answer_of,
    assert_idle,
    device,
    make,
    offline,
    run,
    threads_of,
    whole,
)

OPTIONS: dict[str, Any] = {
    "num_blocks": 17,
    "max_num_seqs": 6,
    "max_num_batched_tokens": 16,
    "max_model_len": 48,
    "enable_prefix_caching": True,
    "num_host_blocks": 10,
    "choose_recovery": lambda group: ("recompute", "swap")[len(group.prompt_token_ids) % 2],
}
NUM_CALLERS = 200
NUM_KINDS = 30
ACTIONS = ("read",) * 5 + ("abort", "cancel", "leave", "deadline", "bad", "late", "slow")


def random_request(rng: random.Random) -> Request:
    prompt = [rng.choice((3, 5))] * rng.randrange(9) + [rng.randrange(61)]
    if rng.random() < 0.1:
        return prompt, BeamSearchParams(beam_width=rng.randint(1, 3), max_tokens=rng.randint(1, 6))
    return prompt, SamplingParams(
        temperature=1,
        n=rng.choice((1, 1, 1, 2, 3)),
        max_tokens=rng.randint(1, 16),
        output_kind=rng.choice(list(RequestOutputKind)),
        stop=rng.choice((None, None, "k", ["s", "pq"])),
        stop_token_ids=rng.choice((None, None, [7, 19, 23])),
        logprobs=rng.choice((None, None, 1)),
    )


class Caller:
    """Does one of the things that callers do, and knows what must come of it."""

    def __init__(self, llm: AsyncLLM, request: Request, expected: Answer, seed: int) -> None:
        self._llm, self._expected = llm, expected
        self._prompt, self._params = request
        self._rng = random.Random(seed)
        self._name = f"caller {self._rng.randrange(NUM_CALLERS // 4)}"  # used by others
        self._stream: RequestStream | None = None
        self.action = self._rng.choice(ACTIONS)

    async def call(self) -> str:
        """Returns what became of it."""
        await asyncio.sleep(self._rng.random() * 0.2)
        work = asyncio.create_task(self._work())
        if self.action in ("cancel", "abort"):
            await asyncio.sleep(self._rng.random() * 0.1)
            if self.action == "cancel":
                work.cancel()
            elif self._stream is not None and not self._stream.is_over:
                await self._llm.abort(self._name)  # else it may be another one's name by now
        await asyncio.wait([work])
        if work.cancelled():
            return "cancelled"
        error = work.exception()
        if error is None:
            return work.result()
        allowed: dict[str, type[Exception]] = {"bad": ValueError, "deadline": DeadlineExceededError}
        assert isinstance(
            error,
            (allowed.get(self.action, StepFailedError), StepFailedError, EngineOverloadedError),
        ), repr(error)
        return type(error).__name__

    async def _work(self) -> str:
        prompt: Sequence[int] = [99] if self.action == "bad" else self._prompt
        timeout_s = self._rng.random() * 0.1 if self.action == "deadline" else None
        while self._name in self._llm.engine:
            self._name += "+"
        self._stream = stream = await self._llm.submit(
            {"prompt_token_ids": list(prompt)}, self._params, self._name, timeout_s=timeout_s
        )
        params = self._params
        kind = params.output_kind if isinstance(params, SamplingParams) else FINAL_ONLY
        try:
            if self.action == "leave":
                await anext(stream)
                return "left"
            if self.action == "late":
                while not stream.is_over:
                    await asyncio.sleep(0.02)
            answer = answer_of(await whole(stream, kind))
        finally:
            stream.close()
        if any(end[3] == "abort" for end in answer):
            assert self.action == "abort"
            self._check_cut(answer)
            return "aborted"
        assert answer == self._expected
        return "answered"

    def _check_cut(self, answer: Answer) -> None:
        if isinstance(self._params, BeamSearchParams):
            return  # beams go other ways
        assert [end[0] for end in answer] == [end[0] for end in self._expected]
        for (_, text, tokens, reason, _), all_ in zip(answer, self._expected, strict=True):
            assert tokens == all_[2][: len(tokens)]
            assert text is not None
            assert all_[1] is not None
            assert reason != "abort" or all_[1].startswith(text) or self._params.stop


@pytest.mark.parametrize(("seed", "fails"), [(0, False), (1, False), (2, True)])
def test_random_callers(seed: int, fails: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(60)
    rng = random.Random(seed)
    requests = [random_request(rng) for _ in range(NUM_KINDS)]
    expected = offline(requests, **OPTIONS)

    async def main() -> dict[str, int]:
        llm = make(max_queued_requests=NUM_CALLERS - 20 * fails, **OPTIONS)
        if fails:
            events = itertools.count(1)

            def fail(event: str) -> None:
                if next(events) % 200 == 0:
                    raise RuntimeError(event)

            device(llm).before = fail
        callers = []
        for number in range(NUM_CALLERS):
            index = rng.randrange(NUM_KINDS)
            callers.append(Caller(llm, requests[index], expected[index], number))
        results = await asyncio.gather(*(caller.call() for caller in callers))
        device(llm).before = lambda event: None
        await assert_idle(llm)
        assert llm.is_running
        threads = threads_of(llm)
        await llm.shutdown()
        assert threads.are_gone
        return {result: results.count(result) for result in results}

    counts = run(main())
    wanted = {"answered", "aborted", "cancelled", "left", "DeadlineExceededError", "ValueError"}
    assert counts.keys() >= (wanted if not fails else {"answered", "StepFailedError"}), counts
    assert counts["answered"] > NUM_CALLERS // 20, counts
