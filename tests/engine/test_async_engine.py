"""Concurrent callers of an `AsyncLLM` get what they get alone, and leave nothing behind."""

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from pallas_paged.engine import BeamSearchParams, SamplingParams
from pallas_paged.engine.async_llm import AsyncLLM
from pallas_paged.engine.core.policies import PriorityOrder
from pallas_paged.engine.core.speculation import make_proposer, speculation_settings
from pallas_paged.engine.engine_loop import MAX_BEHIND
from pallas_paged.engine.errors import (
    DeadlineExceededError,
    EngineDeadError,
    EngineDrainingError,
    EngineError,
    EngineOverloadedError,
)
from pallas_paged.engine.outputs import RequestOutput
from tests.engine.async_serving import (
    CUMULATIVE,
    DELTA,
    FINAL_ONLY,
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

BEAMS = BeamSearchParams(beam_width=3, max_tokens=6)
LONG = params(50)
REQUESTS: list[Request] = [
    ([5], params()),
    ([5, 8], params(12, CUMULATIVE)),
    ([7, 1, 2], params(12, FINAL_ONLY)),
    ([9, 4, 3, 3, 1], params(10, DELTA, n=3)),
    ([9, 4], params(10, FINAL_ONLY, n=4)),
    ([9, 4], params(10, CUMULATIVE, n=2)),
    ([1, 2, 3], BEAMS),
    ([3] * 20, params(20, DELTA, stop=["cb", "PQ"])),
    ([4] * 9, params(20, FINAL_ONLY, stop="v^", n=2)),
    ([6, 6], params(20, DELTA, stop_token_ids=list(range(0, 61, 7)))),
    ([2, 3], params(5, DELTA, logprobs=2)),
    ([2, 3, 4], params(5, FINAL_ONLY, logprobs=1)),
    ([8, 8], params(6, DELTA, detokenize=False)),
    ([30, 31], params(None, FINAL_ONLY)),
]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_blocks": 22, "enable_prefix_caching": True},
        {"async_scheduling": False},
        {"num_scheduler_steps": 4},
        {"num_blocks": 22, "num_host_blocks": 40, "choose_recovery": lambda group: "swap"},
    ],
    ids=["roomy", "tiny", "serial", "multi-step", "swap"],
)
def test_many_callers_get_what_they_get_alone(options: dict[str, Any]) -> None:
    requests = REQUESTS * 4
    expected = offline(REQUESTS) * 4

    async def main() -> None:
        async with make(**options) as llm:
            answers = await asyncio.gather(*(ask(llm, request) for request in requests))
            assert answers == expected
            await assert_idle(llm)

    run(main())


def test_guessed_tokens_change_nothing() -> None:
    proposer = make_proposer(speculation_settings({"method": "ngram", "num_speculative_tokens": 3}))
    requests = [
        ([5, 8, 5, 8, 5, 8, i], params(20, kind)) for i in range(5) for kind in (DELTA, FINAL_ONLY)
    ]

    async def main() -> None:
        async with make(proposer=proposer) as llm:
            answers = await asyncio.gather(*(ask(llm, request) for request in requests))
            assert answers == offline(requests)
            await assert_idle(llm)

    run(main())


def test_generate_yields_each_output_as_it_comes() -> None:
    async def main() -> None:
        async with make() as llm:
            outputs = [o async for o in llm.generate([5], params(6, CUMULATIVE), "mine")]
            assert {output.request_id for output in outputs} == {"mine"}
            lengths = [len(output.outputs[0].token_ids) for output in outputs]
            assert lengths == sorted(set(lengths))
            assert answer_of(outputs[-1]) == offline([([5], params(6))])[0]
            (only,) = [o async for o in llm.generate([1, 2, 3], BEAMS)]
            assert answer_of(only) == offline([([1, 2, 3], BEAMS)])[0]
            await assert_idle(llm)

    run(main())


class TestRefusals:
    @pytest.mark.parametrize(
        ("prompt", "one", "field"),
        [
            ([61], params(), "prompt_token_ids holds 61"),
            ([], params(), "the prompt is empty"),
            ([5] * 70, params(), "max_model_len=64"),
            ([5], params(64), "max_tokens=64"),
            ([5], params(n=9), "9"),
            ([5], BeamSearchParams(beam_width=9, max_tokens=2), "9"),
            ([5], params(stop_token_ids=[61]), "stop_token_ids holds 61"),
            ([5], "params", "sampling_params='params'"),
            ({"ids": [5]}, params(), "a prompt is"),
            ({"prompt_token_ids": [5], "cache_salt": 3}, params(), "cache_salt"),
        ],
    )
    def test_a_request_that_cannot_be_is_refused_and_nothing_is_left(
        self, prompt: Any, one: Any, field: str
    ) -> None:
        async def main() -> None:
            async with make() as llm:
                with pytest.raises(ValueError, match=field):
                    await llm.submit(prompt, one, "bad")
                await assert_idle(llm)
                assert await ask(llm, REQUESTS[0], "bad") == offline(REQUESTS[:1])[0]

        run(main())

    @pytest.mark.parametrize(
        ("options", "field"),
        [
            ({"priority": 1}, "priority"),
            ({"timeout_s": 0}, "timeout_s=0"),
            ({"timeout_s": float("nan")}, "timeout_s=nan"),
            ({"request_id": 3}, "request_id=3"),
        ],
    )
    def test_options_are_checked(self, options: dict[str, Any], field: str) -> None:
        async def main() -> None:
            async with make() as llm:
                with pytest.raises(ValueError, match=field):
                    await llm.submit([5], params(), **options)
                await assert_idle(llm)

        run(main())

    def test_a_name_is_of_one_request_at_a_time(self) -> None:
        async def main() -> None:
            async with make() as llm:
                first = await llm.submit([5], LONG, "a")
                with pytest.raises(ValueError, match="request_id='a' is in use"):
                    await llm.submit([5], LONG, "a")
                assert (await whole(first, DELTA)).finished
                await ask(llm, ([5], LONG), "a")
                await assert_idle(llm)

        run(main())

    def test_a_request_without_a_name_gets_one_that_is_free(self) -> None:
        async def main() -> None:
            async with make() as llm:
                mine = await llm.submit([5], LONG, "async-1")
                other = await llm.submit([5], LONG)
                assert other.request_id not in ("async-1", None)
                mine.close()
                other.close()
                await assert_idle(llm)

        run(main())

    def test_more_than_may_wait_are_refused_and_come_again(self) -> None:
        async def main() -> None:
            async with make(max_queued_requests=3) as llm:
                gate = Gate(llm, "dispatch")  # nobody leaves the queue
                first = asyncio.create_task(ask(llm, ([5], params(2))))
                await gate.reached()
                # Of the requests that come at once, 3 may wait; the first one runs.
                tasks = [asyncio.create_task(ask(llm, ([5], params(2)))) for _ in range(8)]
                refused = [task for task in tasks if await ends_soon(task)]
                assert len(refused) == 5
                for task in refused:
                    with pytest.raises(
                        EngineOverloadedError, match="max_queued_requests=3"
                    ) as info:
                        await task
                    assert info.value.retry_after_s >= 1
                gate.open()
                answers = await asyncio.gather(first, *(set(tasks) - set(refused)))
                assert answers == offline([([5], params(2))]) * 4
                await ask(llm, ([5], params(2)))
                await assert_idle(llm)

        run(main())


async def ends_soon(task: asyncio.Task[Any]) -> bool:
    await asyncio.wait([task], timeout=0.01)
    return task.done()


class TestLeaving:
    @pytest.mark.parametrize("one", [LONG, params(50, CUMULATIVE), params(50, FINAL_ONLY)])
    def test_an_aborted_request_has_a_last_output_with_all_its_tokens(
        self, one: SamplingParams
    ) -> None:
        ((_, text, tokens, *_),) = offline([([5], one)])[0]
        assert text is not None

        async def main() -> None:
            async with make() as llm:
                gate = Gate(llm, "collect 9")
                stream = await llm.submit([5], one, "a")
                await gate.reached()
                await llm.abort(["a", "unknown"])
                await llm.abort("a")
                gate.open()
                output = await whole(stream, one.output_kind)
                ((_, had, got, reason, _),) = answer_of(output)
                # With one step in flight, the tokens of the steps 0 to 9 are there.
                assert (got, reason) == (tokens[:10], "abort")
                assert had is not None
                assert text.startswith(had)
                await llm.abort("a")
                await assert_idle(llm)
                assert llm.engine.parts.counts.num_finished["abort"] == 1

        run(main())

    def test_an_aborted_beam_search_has_its_best_beams(self) -> None:
        async def main() -> None:
            async with make() as llm:
                gate = Gate(llm, "collect 3")
                stream = await llm.submit([5], BEAMS, "a")
                await gate.reached()
                await llm.abort("a")
                gate.open()
                (output,) = [output async for output in stream]
                assert len(output.outputs) == 3
                for beam in output.outputs:
                    assert (beam.finish_reason, len(beam.token_ids)) == ("abort", 4)
                await assert_idle(llm)

        run(main())

    def test_a_request_that_is_aborted_before_its_first_step(self) -> None:
        async def main() -> None:
            async with make() as llm:
                gate = Gate(llm, "dispatch")
                running = await llm.submit([5], LONG)
                await gate.reached()
                task = asyncio.create_task(llm.submit([6], LONG, "a"))
                await asyncio.sleep(0)  # it is on its way
                await llm.abort("a")
                gate.open()
                output = await whole(await task, DELTA)
                assert answer_of(output) == [(0, "", (), "abort", None)]
                assert answer_of(await whole(running, DELTA)) == offline([([5], LONG)])[0]
                await assert_idle(llm)

        run(main())

    def test_some_of_several_completions_have_ended_when_it_is_aborted(self) -> None:
        one = params(40, DELTA, n=4, stop="kh")
        ends = offline([([6], one)])[0]
        early = [index for index, _, tokens, *_ in ends if len(tokens) < 8]
        assert 0 < len(early) < 4

        async def main() -> None:
            async with make() as llm:
                gate = Gate(llm, "collect 12")
                stream = await llm.submit([6], one, "a")
                await gate.reached()
                await llm.abort("a")
                gate.open()
                answer = answer_of(await whole(stream, DELTA))
                assert [answer[index] for index in early] == [ends[index] for index in early]
                assert {end[3] for end in answer} == {"stop", "abort"}
                await assert_idle(llm)

        run(main())

    @pytest.mark.parametrize("steps", [0, 1, 5])
    def test_the_blocks_of_a_cancelled_caller_are_free_after_two_steps(self, steps: int) -> None:
        async def main() -> None:
            async with make() as llm:
                core, seen = llm.engine.parts.core, list[tuple[int, bool]]()
                task: asyncio.Task[Any]

                def note(event: str) -> None:
                    if event.startswith("dispatch"):
                        seen.append((core.num_steps, "b" in core.scheduler.queues.unfinished))

                device(llm).before = note
                other = await llm.submit([5], LONG)
                task = asyncio.create_task(ask(llm, ([6], LONG), "b"))
                while not (steps == 0 or (len(seen) > steps and seen[-1][1])):
                    await asyncio.sleep(0)
                await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                cancelled_at = core.num_steps
                assert answer_of(await whole(other, DELTA)) == offline([([5], LONG)])[0]
                late = [step for step, has in seen if has and step > cancelled_at + 2]
                assert not late, f"cancelled after step {cancelled_at}, and still in {late}"
                await assert_idle(llm)

        run(main())

    def test_who_leaves_the_iteration_early_aborts(self) -> None:
        async def main() -> None:
            async with make() as llm:
                iteration = llm.generate([5], LONG, "a")
                async for _ in iteration:
                    break
                await iteration.aclose()  # type: ignore[attr-defined]
                assert "a" not in llm.engine
                await assert_idle(llm)

        run(main())

    @pytest.mark.parametrize("waits", [False, True])
    def test_a_closed_stream_is_over(self, waits: bool) -> None:
        async def main() -> None:
            async with make() as llm:
                gate = Gate(llm)
                stream = await llm.submit([5], LONG, "a")
                reader = asyncio.create_task(read(stream)) if waits else None
                await gate.reached()
                await asyncio.sleep(0)
                await stream.aclose()
                stream.close()
                assert stream.is_over
                if reader is not None:
                    assert await reader == []
                assert await read(stream) == []
                gate.open()
                await assert_idle(llm)

        run(main())

    def test_a_stream_has_one_reader(self) -> None:
        async def main() -> None:
            async with make() as llm:
                gate = Gate(llm)
                stream = await llm.submit([5], params(4))
                reader = asyncio.create_task(read(stream))
                await gate.reached()
                await asyncio.sleep(0)
                with pytest.raises(RuntimeError, match="another reader"):
                    await anext(stream)
                gate.open()
                assert (await reader)[-1].finished

        run(main())

    def test_a_reader_who_is_cancelled_may_read_on(self) -> None:
        async def main() -> None:
            async with make() as llm:
                gate = Gate(llm)
                stream = await llm.submit([5], params(4))
                reader = asyncio.create_task(anext(stream))
                await gate.reached()
                reader.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await reader
                gate.open()
                assert answer_of(await whole(stream, DELTA)) == offline([([5], params(4))])[0]

        run(main())

    def test_a_name_is_free_as_soon_as_its_request_has_ended_or_was_left(self) -> None:
        """The core may not know of the end yet, and outputs of the first may be on their way."""
        stopping = params(30, DELTA, stop="cb")
        expected = offline([([6], params(9)), ([3] * 20, stopping)])
        assert expected[1][0][3] == "stop"

        async def main() -> None:
            async with make() as llm:
                for num_steps in range(12):
                    stream = await llm.submit([5], LONG, "a")
                    # Outputs that a slow reader has not taken are joined: there may be fewer.
                    outputs = [await anext(stream, None) for _ in range(num_steps)]
                    if None in outputs:
                        pass  # it has ended
                    elif num_steps % 3 == 0:
                        await llm.abort("a")
                        await whole(stream, DELTA)
                    elif num_steps % 3 == 1:
                        stream.close()
                    else:
                        task = asyncio.create_task(llm.submit([7], LONG, "b"))
                        await asyncio.sleep(0)
                        task.cancel()
                        task = asyncio.create_task(ask(llm, ([6], params(9)), "b"))
                        stream.close()
                        assert await task == expected[0]
                    assert await ask(llm, ([6], params(9)), "a") == expected[0]
                    assert await ask(llm, ([3] * 20, stopping), "a") == expected[1]
                await assert_idle(llm)

        run(main())

    def test_a_refusal_that_comes_late_is_not_the_next_ones(self) -> None:
        async def main() -> None:
            async with make() as llm:
                gate = Gate(llm, "dispatch")
                other = await llm.submit([5], params(3))
                await gate.reached()
                for bad in ([5] * 70, [7]):
                    task = asyncio.create_task(llm.submit(bad, LONG, "a"))
                    await asyncio.sleep(0)
                    task.cancel()
                    await asyncio.wait([task])
                good = asyncio.create_task(ask(llm, ([6], params(9)), "a"))
                await asyncio.sleep(0)
                gate.open()
                assert await good == offline([([6], params(9))])[0]
                await whole(other, DELTA)
                await assert_idle(llm)

        run(main())


async def read(stream: AsyncIterator[RequestOutput]) -> list[RequestOutput]:
    return [output async for output in stream]


class TestDeadlines:
    def test_it_ends_a_request_that_runs_and_one_that_waits(self) -> None:
        async def main() -> None:
            async with make(max_num_seqs=1) as llm:
                gate = Gate(llm, "collect 4")
                running, waiting = await submit_together(
                    llm, [([5], LONG), ([6], LONG)], timeout_s=0.03
                )
                await gate.reached()
                coming = asyncio.create_task(llm.submit([7], LONG, "c", timeout_s=0.01))
                for stream in (running, waiting):
                    name = stream.request_id
                    with pytest.raises(DeadlineExceededError, match=f"'{name}'.* 0.03 s"):
                        await read(stream)
                    assert isinstance(stream.error, TimeoutError)
                with pytest.raises(DeadlineExceededError, match=r"0\.01 s"):
                    await coming
                gate.open()
                await assert_idle(llm)
                assert await ask(llm, REQUESTS[0], "a") == offline(REQUESTS[:1])[0]

        run(main())

    def test_one_that_is_kept_leaves_no_timer(self) -> None:
        async def main() -> None:
            async with make() as llm:
                stream = await llm.submit([5], params(3), timeout_s=60)
                assert (await whole(stream, DELTA)).finished
                timers = asyncio.get_running_loop()._scheduled  # type: ignore[attr-defined]
                # One is the test's own.
                assert len([timer for timer in timers if not timer.cancelled()]) == 1

        run(main())


class TestSlowReaders:
    def test_who_never_reads_slows_nobody_and_holds_one_delta(self) -> None:
        async def main() -> None:
            async with make() as llm:
                slow = [await llm.submit([9, i], params(40)) for i in range(4)]
                for _ in range(5):
                    assert await ask(llm, ([5], params(8))) == offline([([5], params(8))])[0]
                while not all(stream.is_over for stream in slow):
                    await asyncio.sleep(1e-3)
                await assert_idle(llm)  # although nobody has read
                for i, stream in enumerate(slow):
                    (only,) = await read(stream)
                    assert answer_of(only) == offline([([9, i], params(40))])[0]

        run(main())

    def test_an_event_loop_that_is_blocked_holds_the_steps_up(self) -> None:
        async def main() -> None:
            async with make() as llm:
                stream = await llm.submit([5], LONG)
                before = llm.engine.parts.core.num_steps
                time.sleep(0.1)
                assert llm.engine.parts.core.num_steps <= before + MAX_BEHIND + 2
                assert answer_of(await whole(stream, DELTA)) == offline([([5], LONG)])[0]
                await assert_idle(llm)

        run(main())

    @pytest.mark.parametrize("kind", [CUMULATIVE, DELTA])
    def test_who_pauses_gets_what_has_come_meanwhile_at_once(self, kind: Any) -> None:
        one = params(30, kind, n=2, logprobs=1)

        async def main() -> None:
            async with make() as llm:
                stream, outputs = await llm.submit([5], one), list[RequestOutput]()
                async for output in stream:
                    outputs.append(output)
                    await asyncio.sleep(5e-3)
                assert len(outputs) < 30
                merged = outputs[-1]
                if kind is DELTA:
                    merged = outputs[0]
                    for output in outputs[1:]:
                        merged = merged.merged_with(output)
                assert answer_of(merged) == offline([([5], one)])[0]
                for completion in merged.outputs:
                    assert completion.logprobs is not None
                    assert len(completion.logprobs) == 30

        run(main())


class TestOrder:
    def test_the_more_urgent_one_is_first(self) -> None:
        async def main() -> None:
            async with make(max_num_seqs=1, order=PriorityOrder()) as llm:
                llm.config = dataclasses.replace(llm.config, scheduling_policy="priority")
                ends = list[str]()

                def note(outputs: Sequence[RequestOutput], _: float) -> None:
                    ends.extend(output.request_id for output in outputs if output.finished)

                # Not in the order of the readers: several of them may wake at a time.
                llm.engine.on_outputs = note

                async def one(rank: int) -> None:
                    async for _ in llm.generate([5], params(3), f"{rank}", priority=rank):
                        pass

                gate = Gate(llm, "dispatch")
                first = asyncio.create_task(one(0))
                await gate.reached()
                others = [asyncio.create_task(one(rank)) for rank in (3, 1, 2)]
                await asyncio.sleep(0)
                gate.open()
                await asyncio.gather(first, *others)
                assert ends == ["0", "1", "2", "3"]

        run(main())


class TestState:
    def test_it_is_seen_between_two_steps(self) -> None:
        async def main() -> None:
            async with make(enable_prefix_caching=True) as llm:
                await llm.check_health()
                assert llm.is_running
                assert not llm.errored
                stream = await llm.submit([5] * 9, LONG)
                await anext(stream)
                assert (await llm.kv_stats()).num_allocated_blocks >= 3
                figures = {metric.name: metric.value for metric in await llm.get_metrics()}
                assert figures["vllm:num_requests_running"] == 1
                assert figures["vllm:prompt_tokens"] == 9
                await whole(stream, DELTA)
                assert (await llm.kv_stats()).num_allocated_blocks == 0
                figures = {metric.name: metric.value for metric in await llm.get_metrics()}
                assert figures["vllm:generation_tokens"] == 50
                assert await llm.reset_prefix_cache()
                await assert_idle(llm)

        run(main())

    def test_calls_run_in_the_thread_of_the_steps_and_may_raise_or_be_cancelled(self) -> None:
        async def main() -> None:
            async with make() as llm:
                calls = list[str]()
                assert await llm.engine.call(lambda: 3) == 3
                with pytest.raises(ZeroDivisionError):
                    await llm.engine.call(lambda: 1 // 0)
                gate = Gate(llm)
                stream = await llm.submit([5], params(3))
                await gate.reached()
                task = asyncio.create_task(llm.engine.call(lambda: calls.append("cancelled")))
                await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                gate.open()
                await whole(stream, DELTA)
                await assert_idle(llm)
                assert not calls

        run(main())

    def test_on_outputs_has_each_output_and_may_fail(self, caplog: Any) -> None:
        async def main() -> None:
            async with make() as llm:
                noted, times = list[RequestOutput](), list[float]()

                def note(outputs: Any, now: float) -> None:
                    noted.extend(outputs)
                    times.append(now)
                    raise ZeroDivisionError

                llm.engine.on_outputs = note
                assert await ask(llm, REQUESTS[0]) == offline(REQUESTS[:1])[0]
                stream = await llm.submit([5], LONG)
                stream.close()
                merged = noted[0]
                for output in noted[1:]:
                    if output.request_id == merged.request_id:
                        merged = merged.merged_with(output)
                assert answer_of(merged) == offline(REQUESTS[:1])[0]
                assert noted[-1].outputs[0].finish_reason == "abort"
                assert times == sorted(times)
                await assert_idle(llm)

        run(main())
        assert "on_outputs failed" in caplog.text

    def test_prompts_are_read_in_other_threads_if_they_are_long(self) -> None:
        class Reader:
            def read(self, prompt: str) -> tuple[str, list[int]]:
                return prompt, [len(prompt) % 61]

            def from_chat(self, messages: Any) -> list[int]:
                return [5]

        async def main() -> None:
            llm = make()
            llm._prompts = Reader()  # type: ignore[assignment]
            async with llm:
                one = params(4)
                long, short = "x" * 5000, "xyz"
                streams = [await llm.submit(prompt, one) for prompt in (long, short) * 4]
                outputs = [await whole(stream, DELTA) for stream in streams]
                assert {output.prompt for output in outputs} == {long, short}
                assert threads_of(llm).readers
                assert await llm.chat_prompt([{"role": "user", "content": "x"}]) == [5]
            assert threads_of(llm).are_gone
            with pytest.raises(EngineDeadError, match="shut down"):
                await llm.chat_prompt([{"role": "user", "content": "x"}])

        run(main())


class TestTheEnd:
    def test_draining_ends_what_runs_and_takes_nothing_new(self) -> None:
        async def main() -> None:
            llm = make()
            streams = [await llm.submit([5, i], params(20)) for i in range(12)]
            drained = asyncio.create_task(llm.drain())
            await asyncio.sleep(0)
            with pytest.raises(EngineDrainingError):
                await llm.submit([5], LONG)
            assert llm.is_running
            assert await drained
            expected = offline([([5, i], params(20)) for i in range(12)])
            assert [answer_of(await whole(stream, DELTA)) for stream in streams] == expected
            await assert_idle(llm)
            await llm.shutdown()

        run(main())

    def test_draining_may_take_too_long(self) -> None:
        async def main() -> None:
            async with make() as llm:
                gate = Gate(llm)
                stream = await llm.submit([5], LONG)
                assert not await llm.drain(0.01)
                gate.open()
                assert (await whole(stream, DELTA)).finished

        run(main())

    @pytest.mark.parametrize("drain_s", [0, 1e-3])
    def test_a_shutdown_ends_requests_in_every_state(self, drain_s: float) -> None:
        async def main() -> None:
            llm = make(max_num_seqs=2)
            gate = Gate(llm, "collect 3")
            streams = await submit_together(llm, [([5, i], LONG) for i in range(6)])
            readers = [asyncio.create_task(read(stream)) for stream in streams[:4]]
            await gate.reached()
            coming = asyncio.create_task(llm.submit([7], LONG))
            call = asyncio.create_task(llm.engine.call(lambda: 3))
            await asyncio.sleep(0)
            threads = threads_of(llm)
            twice = [asyncio.create_task(llm.shutdown(drain_s)) for _ in range(2)]
            await asyncio.sleep(0.02)
            gate.open()
            await asyncio.gather(*twice)
            assert threads.are_gone
            await llm.shutdown()
            for task in (*readers, coming, *(asyncio.create_task(read(s)) for s in streams[4:])):
                with pytest.raises(EngineDrainingError, match="shut down"):
                    await task
            assert await call == 3  # it came before the end
            assert not llm.is_running
            assert not llm.errored
            for calling in (llm.kv_stats(), llm.submit([5], LONG), llm.check_health()):
                with pytest.raises(EngineDeadError, match="has been shut down"):
                    await calling
            await llm.abort("async-1")
            assert await llm.drain(0)
            assert not llm.engine.num_open_requests

        run(main())

    def test_an_interrupted_shutdown_may_be_begun_again(self) -> None:
        async def main() -> None:
            llm = make()
            gate = Gate(llm)
            stream = await llm.submit([5], LONG)
            await gate.reached()
            task = asyncio.create_task(llm.shutdown(drain_s=9))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            assert llm.is_running
            task = asyncio.create_task(llm.shutdown())
            await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.wait([task])
            gate.open()
            await llm.shutdown()
            assert threads_of(llm).are_gone
            with pytest.raises(EngineError):
                await anext(stream)

        run(main())

    def test_max_queued_requests_is_checked(self) -> None:
        with pytest.raises(ValueError, match="max_queued_requests=0"):
            AsyncLLM("nowhere", max_queued_requests=0)
