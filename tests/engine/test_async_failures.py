"""What becomes of an `AsyncLLM`'s requests when a step, a text or an event loop fails."""

import asyncio
import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Awaitable
from typing import Any

import pytest

from pallas_paged.engine.async_llm import AsyncLLM
from pallas_paged.engine.engine_loop import MAX_FAILURES
from pallas_paged.engine.errors import EngineDeadError, EngineError, StepFailedError
from pallas_paged.engine.outputs import RequestOutput
from pallas_paged.engine.request_stream import RequestStream
from pallas_paged.engine.text.detokenizer import Detokenizer, WindowDetokenizer
from tests.engine.async_serving import (
    DELTA,
    FINAL_ONLY,
    PATIENCE_S,
    Gate,
    Request,
    answer_of,
    ask,
    assert_idle,
    device,
    make,
    offline,
    params,
    run,
    submit_together,
    threads_of,
    whole,
)
from tests.engine.test_interrupts import Letters

LONG = params(50)
SHORT: Request = ([5], params(6))


async def end_of(stream: RequestStream) -> BaseException | RequestOutput:
    """Returns what a stream ends with: an error, or its last output."""
    try:
        return await whole(stream, DELTA)
    except EngineError as error:
        return error


async def raised(calling: Awaitable[Any]) -> None:
    """Raises what is returned or raised."""
    result = await calling
    if isinstance(result, BaseException):
        raise result


class Failing:
    """Fails when a device gets to chosen events, each time that it does."""

    def __init__(self, llm: AsyncLLM, begin: str, error: BaseException | None = None) -> None:
        self.begin, self.error, self.times = begin, error or RuntimeError("out of order"), 0
        device(llm).before = self.check

    def check(self, event: str) -> None:
        if event.startswith(self.begin):
            self.times += 1
            raise self.error


@pytest.mark.usefixtures("quiet")
class TestSteps:
    @pytest.fixture
    def quiet(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(60)

    @pytest.mark.parametrize("event", ["dispatch 5", "collect 5"])
    @pytest.mark.parametrize("async_scheduling", [False, True])
    def test_one_that_fails_ends_all_requests_and_the_engine_goes_on(
        self, event: str, async_scheduling: bool
    ) -> None:
        async def main() -> None:
            async with make(max_num_seqs=3, async_scheduling=async_scheduling) as llm:
                failing = Failing(llm, event)
                one = params(50, FINAL_ONLY)
                requests = [([5, i], (LONG, one)[i % 2]) for i in range(6)]
                streams = await submit_together(llm, requests)
                ends = await asyncio.gather(*map(end_of, streams))
                for end in ends:
                    assert isinstance(end, StepFailedError)
                    assert "RuntimeError: out of order" in str(end)
                    assert end.__cause__ is failing.error
                assert len({id(end) for end in ends}) == 6  # each has a traceback of its own
                device(llm).before = lambda event: None
                await assert_idle(llm)
                assert llm.is_running
                assert await ask(llm, SHORT) == offline([SHORT])[0]

        run(main())

    def test_requests_that_come_while_it_fails_are_not_lost(self) -> None:
        async def main() -> None:
            async with make() as llm:
                is_there, may_go = threading.Event(), threading.Event()

                def fail(event: str) -> None:
                    if event == "collect 2":
                        is_there.set()
                        assert may_go.wait(PATIENCE_S)
                        raise RuntimeError

                device(llm).before = fail
                streams = await submit_together(llm, [([5, i], LONG) for i in range(3)])
                while not is_there.is_set():
                    await asyncio.sleep(1e-3)
                later = [asyncio.create_task(ask(llm, SHORT)) for _ in range(5)]
                streams[0].close()
                await llm.abort(streams[1].request_id)
                await asyncio.sleep(0)
                may_go.set()
                assert await asyncio.gather(*later) == offline([SHORT]) * 5
                assert isinstance(await end_of(streams[1]), StepFailedError)
                assert isinstance(await end_of(streams[2]), StepFailedError)
                await assert_idle(llm)

        run(main())

    def test_what_came_before_is_read_before_the_error(self) -> None:
        async def main() -> None:
            async with make() as llm:
                Failing(llm, "collect 5")
                stream = await llm.submit([5], LONG)
                while not stream.is_over:
                    await asyncio.sleep(1e-3)
                output = await anext(stream)
                assert len(output.outputs[0].token_ids) == 5
                with pytest.raises(StepFailedError):
                    await anext(stream)
                with pytest.raises(StopAsyncIteration):
                    await anext(stream)

        run(main())

    @pytest.mark.parametrize("event", ["dispatch", "collect"])
    def test_several_that_fail_without_a_token_end_the_engine(self, event: str) -> None:
        async def main() -> None:
            llm = make()
            failing = Failing(llm, event)
            for number in range(MAX_FAILURES):
                assert llm.is_running
                error = await end_of(await llm.submit([5], LONG))
                is_last = number + 1 == MAX_FAILURES
                assert isinstance(error, EngineDeadError if is_last else StepFailedError)
            assert failing.times == MAX_FAILURES
            assert llm.errored
            for calling in (llm.submit([5], LONG), llm.check_health(), llm.kv_stats()):
                with pytest.raises(EngineDeadError, match="RuntimeError: out of order"):
                    await calling
            assert llm.dead_error.__cause__ is failing.error
            await llm.shutdown()
            assert threads_of(llm).are_gone
            assert not llm.engine.num_open_requests
            assert llm.errored

        run(main())

    def test_some_that_fail_now_and_then_do_not(self) -> None:
        async def main() -> None:
            async with make() as llm:
                for _ in range(2 * MAX_FAILURES):
                    failing = Failing(llm, "collect")
                    assert isinstance(await end_of(await llm.submit([5], LONG)), StepFailedError)
                    assert failing.times == 1
                    device(llm).before = lambda event: None
                    assert await ask(llm, SHORT) == offline([SHORT])[0]
                await assert_idle(llm)

        run(main())

    def test_one_that_fails_twice_ends_the_engine(self) -> None:
        """Once at the step, and once when the engine is emptied; nobody waits for ever."""

        async def main() -> None:
            async with make() as llm:
                Failing(llm, "collect 3")
                llm.engine.parts.core.reset = 0  # type: ignore[assignment, method-assign]
                streams = await submit_together(llm, [([5, i], LONG) for i in range(3)])
                for end in await asyncio.gather(*map(end_of, streams)):
                    assert isinstance(end, EngineDeadError)
                    assert isinstance(end.__cause__, TypeError)
                    assert str(end.__cause__.__context__) == "out of order"

        run(main())

    def test_an_error_that_is_none_ends_the_engine(self) -> None:
        async def main() -> None:
            async with make() as llm:
                Failing(llm, "collect 3", SystemExit("now"))
                stream = await llm.submit([5], LONG)
                reader = asyncio.create_task(end_of(stream))
                while not reader.done():  # also who comes while it ends
                    await asyncio.wait([asyncio.create_task(ask(llm, SHORT))])
                for calling in (reader, ask(llm, SHORT)):
                    with pytest.raises(EngineDeadError, match="SystemExit: now"):
                        await raised(calling)

        run(main())

    def test_a_change_that_fails_ends_all_requests_and_no_name_is_lost(self) -> None:
        async def main() -> None:
            async with make() as llm:
                core, abort = llm.engine.parts.core, llm.engine.parts.core.abort

                def fail(request_id: str) -> Any:
                    core.abort = abort  # type: ignore[method-assign]
                    abort(request_id)
                    raise RuntimeError("half done")

                core.abort = fail  # type: ignore[method-assign]
                gate = Gate(llm)
                other, mine = await submit_together(llm, [([5], LONG), ([6], LONG)])
                await gate.reached()
                mine.close()
                gate.open()
                assert isinstance(await end_of(other), StepFailedError)
                await assert_idle(llm)
                assert await ask(llm, SHORT, mine.request_id) == offline([SHORT])[0]

        run(main())


class BadLetters(Letters):
    """Has no text for one token."""

    def __init__(self, bad: int) -> None:
        self.bad = bad

    def decode(self, token_ids: Any, *, skip_special_tokens: bool) -> str:
        if self.bad in token_ids:
            raise RuntimeError("no such letter")
        return super().decode(token_ids, skip_special_tokens=skip_special_tokens)

    def detokenizer(self, context: Any, *, skip_special_tokens: bool) -> Detokenizer:
        return WindowDetokenizer(self, context, skip_special_tokens=skip_special_tokens)


@pytest.mark.parametrize("kind", [DELTA, FINAL_ONLY])
def test_a_fault_in_the_text_of_a_request_ends_that_one(
    kind: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(60)
    bad, good = ([5], params(20, kind)), ([6], params(20, kind))
    tokens, others = (offline([one])[0][0][2] for one in (bad, good))
    letter = next(token for token in tokens[5:] if token not in others)

    async def main() -> None:
        async with make(tokenizer=BadLetters(letter)) as llm:
            for _ in range(3):
                answers = await asyncio.gather(
                    ask(llm, bad, "a"), *(ask(llm, good) for _ in range(5))
                )
                ((_, _, got, reason, why),) = answers[0]
                assert reason == "abort"
                assert why == "RuntimeError: no such letter"
                assert got == (tokens[: len(got)] if kind is DELTA else tokens)
                assert answers[1:] == offline([good]) * 5
            await assert_idle(llm)
            if kind is DELTA:  # it ends long before its last token
                await ask(llm, (bad[0], params(50)), "a")
                unfinished = llm.engine.parts.core.scheduler.queues.unfinished
                assert "a" not in await llm.engine.call(lambda: list(unfinished))

    run(main())


class TestEventsThatFail:
    @pytest.fixture(autouse=True)
    def quiet(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(60)

    def test_outputs_that_are_lost_end_the_requests(self) -> None:
        async def main() -> None:
            async with make() as llm:
                processor = llm.engine.parts.processor
                process = processor.process

                def fail(*args: Any) -> Any:
                    processor.process = process  # type: ignore[method-assign]
                    process(*args)
                    raise RuntimeError("lost")

                streams = [await llm.submit([5, i], LONG) for i in range(3)]
                await anext(streams[0])
                processor.process = fail  # type: ignore[method-assign]
                for end in await asyncio.gather(*map(end_of, streams)):
                    assert isinstance(end, StepFailedError)
                await assert_idle(llm)
                assert await ask(llm, SHORT) == offline([SHORT])[0]

        run(main())

    def test_a_request_that_cannot_be_opened_ends_alone(self) -> None:
        async def main() -> None:
            async with make() as llm:
                other = await llm.submit([6], LONG)
                add = llm.engine.parts.processor.add
                llm.engine.parts.processor.add = 0  # type: ignore[assignment, method-assign]
                with pytest.raises(StepFailedError, match="TypeError"):
                    await llm.submit([5], LONG, "a")
                llm.engine.parts.processor.add = add  # type: ignore[method-assign]
                assert await ask(llm, SHORT, "a") == offline([SHORT])[0]
                assert answer_of(await whole(other, DELTA)) == offline([([6], LONG)])[0]
                await assert_idle(llm)

        run(main())


class TestEventLoops:
    def test_one_may_follow_another(self) -> None:
        llm = make()
        for _ in range(3):
            assert asyncio.run(ask(llm, SHORT)) == offline([SHORT])[0]

        async def end() -> None:
            await assert_idle(llm)
            await llm.shutdown()

        run(end())

    def test_requests_that_one_left_open_end_with_it(self) -> None:
        llm = make(max_queued_requests=4)
        gate = Gate(llm, "collect 3")
        streams: list[RequestStream] = []

        async def leave() -> None:
            requests = [([5, i], LONG) for i in range(3)]
            streams.extend(await submit_together(llm, requests, timeout_s=3600))
            await gate.reached()
            # Nobody will see that these are taken in.
            coming = [asyncio.create_task(llm.submit([7], LONG)) for _ in range(4)]
            await asyncio.sleep(0)
            assert not any(task.done() for task in coming)

        async def use() -> None:
            await llm.engine.call(lambda: None)  # the queue is empty then, to whoever looks
            assert await ask(llm, SHORT, "async-1") == offline([SHORT])[0]
            for stream in streams:
                assert "the event loop of the request was closed" in str(await end_of(stream))
            await assert_idle(llm)
            await llm.shutdown()

        asyncio.run(leave())
        gate.open()
        run(use())

    def test_a_pending_reader_of_a_closed_one_keeps_nobody(self) -> None:
        """Not even where nobody has cancelled it, as `asyncio.run` would have."""
        llm = make()
        gate = Gate(llm)
        closed = asyncio.new_event_loop()
        closed.set_exception_handler(lambda loop, context: None)  # it says that tasks are pending
        stream = closed.run_until_complete(llm.submit([5], LONG, "a"))
        reader = closed.create_task(anext(stream))  # type: ignore[arg-type]
        opening = closed.create_task(llm.submit([6], LONG, "b"))
        closed.run_until_complete(asyncio.sleep(0))
        closed.close()
        gate.open()

        async def use() -> None:
            assert await ask(llm, SHORT, "a") == offline([SHORT])[0]
            assert await ask(llm, SHORT, "b") == offline([SHORT])[0]
            await assert_idle(llm)
            await llm.shutdown()

        run(use())
        reader.get_coro().close()  # type: ignore[union-attr]
        opening.get_coro().close()  # type: ignore[union-attr]

    def test_two_at_once_are_refused(self) -> None:
        llm = make()
        gate = Gate(llm)
        first = asyncio.new_event_loop()
        stream = first.run_until_complete(llm.submit([5], LONG))

        async def other() -> None:
            with pytest.raises(RuntimeError, match="another event loop"):
                await llm.submit([6], LONG)
            with pytest.raises(RuntimeError, match="another event loop"):
                await llm.drain()
            llm.engine._is_draining = False

        run(other())
        gate.open()
        output = first.run_until_complete(whole(stream, DELTA))
        assert answer_of(output) == offline([([5], LONG)])[0]
        first.close()

        async def then() -> None:
            assert await ask(llm, SHORT) == offline([SHORT])[0]
            await llm.shutdown()

        run(then())


class TestNobodyShutsItDown:
    @pytest.mark.parametrize("is_open", [False, True])
    def test_it_ends_with_the_last_reference(self, is_open: bool) -> None:
        async def main() -> weakref.ref[Any]:
            llm = make()
            await ask(llm, SHORT)
            if is_open:
                await llm.submit([5], LONG)
                await llm.submit([6], LONG, timeout_s=0.02)
            threads.append(threads_of(llm).steps)
            return weakref.ref(llm.engine)

        threads: list[threading.Thread] = []
        engine = run(main())
        gc.collect()
        assert engine() is None
        threads[0].join(PATIENCE_S)
        assert not threads[0].is_alive()

    def test_a_process_ends_in_silence(self) -> None:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


PROGRAM = """
import asyncio, os, sys, warnings
from pallas_paged.engine.errors import EngineDeadError
from tests.engine.async_serving import ask, make, offline, params

async def begin(llm):
    await anext(await llm.submit([5], params(4000)))

warnings.simplefilter("ignore")  # JAX says that forks are dangerous: they are
llm, request = make(), ([5], params(6))
asyncio.run(ask(llm, request))
child = os.fork()
if child == 0:
    try:
        asyncio.run(ask(llm, request))
    except EngineDeadError as error:
        os._exit("forked child" not in str(error))
    os._exit(3)
status = os.waitpid(child, 0)[1]
assert os.waitstatus_to_exitcode(status) == 0, status
assert asyncio.run(ask(llm, request)) == offline([request])[0]

left = make(max_model_len=4096, num_blocks=2000)
asyncio.run(begin(left))  # and never comes back

async def main():
    llm = make(max_model_len=4096, num_blocks=2000)
    await begin(llm)
    print("done")
    sys.exit(0)

asyncio.run(main())
"""
