"""Several engines as one: who gets a request, and what becomes of the others when one ends."""

import asyncio
import dataclasses
import pathlib
import time
from collections.abc import Awaitable
from typing import Any

import jax
import pytest
import zmq

from pallas_paged.engine import LLM, EngineConfig, EngineDeadError, EngineOverloadedError
from pallas_paged.engine.errors import EngineDrainingError
from pallas_paged.engine.kv_events import endpoint_of_rank
from pallas_paged.engine.metrics import Counter
from pallas_paged.engine.parts import EngineParts
from pallas_paged.engine.replicas import ReplicatedLLM, config_of_rank, device_groups
from pallas_paged.engine.sampling_params import RequestOutputKind, SamplingParams
from pallas_paged.engine.structured_outputs import StructuredOutputsParams
from pallas_paged.models.demo import DEMO_MODEL
from tests.engine.async_serving import (
    PATIENCE_S,
    Request,
    answer_of,
    assert_idle,
    device,
    make,
    offline,
    params,
    run,
    whole,
)
from tests.engine.serve.live import SMALL
from tests.engine.test_kv_events import replay

SHORT, LONG = params(4), params(40, ignore_eos=True)


def replicas(number: int = 2, **options: Any) -> ReplicatedLLM:
    """Returns engines over mock devices; blocks have 4 tokens."""
    engines = [make(**options) for _ in range(number)]
    return ReplicatedLLM.of_replicas(engines[0].config, engines)


def slow(llm: ReplicatedLLM) -> None:
    """Lets steps take so long that no request ends while others are submitted."""

    def wait(event: str) -> None:
        if event.startswith("dispatch"):
            time.sleep(0.02)

    for replica in llm.replicas:
        device(replica).before = wait


def fast(llm: ReplicatedLLM) -> None:
    for replica in llm.replicas:
        device(replica).before = lambda event: None


async def error_of(calling: Awaitable[Any]) -> BaseException | None:
    (result,) = await asyncio.gather(calling, return_exceptions=True)
    return result if isinstance(result, BaseException) else None


def num_open(llm: ReplicatedLLM) -> list[int]:
    return [replica.engine.num_open_requests for replica in llm.replicas]


def prompt(first: int, length: int = 12) -> dict[str, Any]:
    return {"prompt_token_ids": [first % 20] * 4 + list(range(length - 4))}


def kill(llm: ReplicatedLLM, rank: int) -> None:
    """Lets the thread of a replica end at its next step."""

    def fail(event: str) -> None:
        raise SystemExit("killed")

    device(llm.replicas[rank]).before = fail


async def dead(llm: ReplicatedLLM, rank: int) -> None:
    """Kills a replica by a request of its own, and waits for its end."""
    kill(llm, rank)
    stream = await llm.replicas[rank].submit({"prompt_token_ids": [7]}, SHORT)
    with pytest.raises(EngineDeadError, match="SystemExit: killed"):
        await whole(stream, RequestOutputKind.DELTA)


async def idle(llm: ReplicatedLLM) -> None:
    for replica in llm.replicas:
        if replica.is_running:
            await assert_idle(replica)
    assert not llm._coming


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(60)


def test_load_spreads_and_the_answers_are_those_of_one_engine() -> None:
    requests: list[Request] = [
        (prompt(i)["prompt_token_ids"], dataclasses.replace(LONG, seed=i)) for i in range(16)
    ]

    async def main() -> None:
        async with replicas() as llm:
            slow(llm)
            submitted = [llm.submit({"prompt_token_ids": ids}, one) for ids, one in requests]
            streams = await asyncio.gather(*submitted)
            assert num_open(llm) == [8, 8]
            fast(llm)
            outputs = await asyncio.gather(*(whole(s, RequestOutputKind.DELTA) for s in streams))
            assert [answer_of(output) for output in outputs] == offline(requests)
            await idle(llm)

    run(main())


def test_a_common_prefix_goes_to_one_replica_until_it_has_far_more_to_do() -> None:
    async def main() -> None:
        async with replicas() as llm:
            slow(llm)
            await llm.submit(prompt(1), LONG, "first")
            other = await llm.submit(prompt(2), LONG, "other")
            assert num_open(llm) == [1, 1]
            for index in range(11):
                await llm.submit(prompt(1, 13 + index % 3), LONG, f"like-{index}")
            assert num_open(llm) == [12, 1]
            await llm.submit(prompt(1), LONG)  # the first one has 11 more
            assert num_open(llm) == [12, 2]
            await llm.submit({**prompt(1), "cache_salt": "mine"}, LONG)
            assert num_open(llm) == [12, 3]
            other.close()
            await llm.abort(["first", "like-3", "nobody"])
            fast(llm)
            while num_open(llm) != [10, 2]:
                await asyncio.sleep(1e-3)
            await llm.shutdown()
            await idle_after_shutdown(llm)

    run(main())


async def idle_after_shutdown(llm: ReplicatedLLM) -> None:
    assert num_open(llm) == [0, 0]
    assert not llm.is_running
    assert not llm.errored
    with pytest.raises(EngineDeadError, match="shut down"):
        await llm.submit(prompt(1), SHORT)


def test_a_name_is_in_use_wherever_the_request_is() -> None:
    async def main() -> None:
        async with replicas() as llm:
            slow(llm)
            results = await asyncio.gather(
                *(llm.submit(prompt(i), LONG, "mine") for i in range(3)), return_exceptions=True
            )
            refused = [one for one in results if isinstance(one, ValueError)]
            assert len(refused) == 2
            assert "'mine' is in use" in str(refused[0])
            fast(llm)
            await llm.abort("mine")

    run(main())


def test_requests_on_their_way_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a grammar is compiled first, others are submitted meanwhile."""
    monkeypatch.setattr(EngineParts, "grammar", lambda *_: time.sleep(0.01))
    form = StructuredOutputsParams(choice=["a"])
    one = dataclasses.replace(LONG, ignore_eos=False, structured_outputs=form)

    async def main() -> None:
        async with replicas() as llm:
            slow(llm)
            short = [{"prompt_token_ids": [i]} for i in range(6)]  # no block, which would count too
            await asyncio.gather(*(llm.submit(each, one) for each in short))
            assert num_open(llm) == [3, 3]
            results = await asyncio.gather(
                *(llm.submit(prompt(i), one, "mine") for i in range(3)), return_exceptions=True
            )
            assert sum(isinstance(result, ValueError) for result in results) == 2
            assert not llm._coming

    run(main())


def test_the_one_that_is_full_is_passed_over() -> None:
    async def main() -> None:
        async with replicas(max_num_seqs=1, max_queued_requests=2) as llm:
            slow(llm)
            for rank in range(2):
                for num_waiting in range(3):
                    await llm.submit(prompt(1), LONG)
                    while llm.replicas[rank].engine._loop.num_waiting != num_waiting:
                        await asyncio.sleep(1e-3)
                assert num_open(llm) == [3, 3 * rank]
            for calling in (llm.submit(prompt(1), LONG), llm.submit(prompt(5), LONG)):
                with pytest.raises(EngineOverloadedError, match="max_queued_requests=2"):
                    await calling
            with pytest.raises(EngineOverloadedError):
                llm.check_accepts()
            fast(llm)
            assert await llm.drain(PATIENCE_S)
            with pytest.raises(EngineDrainingError):
                await llm.submit(prompt(1), LONG)
            await idle(llm)

    run(main())


@pytest.mark.usefixtures("quiet")
class TestDeath:
    def test_the_others_go_on(self) -> None:
        async def main() -> None:
            async with replicas(3) as llm:
                await llm.check_health()
                await dead(llm, 1)
                for _ in range(2):
                    slow(llm)
                    streams = [await llm.submit(prompt(i), LONG) for i in range(6)]
                    assert num_open(llm) == [3, 0, 3]
                    fast(llm)
                    for stream in streams:
                        output = await whole(stream, RequestOutputKind.DELTA)
                        assert len(output.outputs[0].token_ids) == 40
                assert llm.is_running
                assert llm.errored
                said = "replica 1 of 3: the engine has ended: SystemExit: killed"
                with pytest.raises(EngineDeadError, match=said):
                    llm.check_accepts()
                assert isinstance(await error_of(llm.check_health()), EngineDeadError)
                labels = {one.labels["engine"] for one in await llm.get_metrics()}
                assert labels == {"0", "2"}
                assert await llm.reset_prefix_cache()
                await idle(llm)
            assert not llm.is_running

        run(main())

    def test_its_requests_fail_and_no_other(self) -> None:
        async def main() -> None:
            async with replicas() as llm:
                slow(llm)
                streams = [await llm.submit(prompt(i), LONG) for i in range(6)]
                assert num_open(llm) == [3, 3]
                is_of_first = [s.request_id in llm.replicas[0].engine for s in streams]
                kill(llm, 0)
                ends = await asyncio.gather(
                    *(whole(s, RequestOutputKind.DELTA) for s in streams), return_exceptions=True
                )
                assert [isinstance(end, EngineDeadError) for end in ends] == is_of_first
                assert num_open(llm) == [0, 0]
                await idle(llm)

        run(main())

    def test_when_none_is_left_all_is_refused(self) -> None:
        async def main() -> None:
            async with replicas() as llm:
                for rank in range(2):
                    await dead(llm, rank)
                assert not llm.is_running
                for calling in (
                    llm.submit(prompt(1), SHORT),
                    llm.submit("a" * 5000, SHORT),
                    llm.get_metrics(),
                    llm.check_health(),
                    llm.chat_prompt([]),
                ):
                    assert isinstance(await error_of(calling), EngineDeadError)

        run(main())


def test_figures_have_the_replica_as_a_label() -> None:
    async def main() -> None:
        async with replicas() as llm:
            for index in range(3):
                await whole(await llm.submit(prompt(1), SHORT), RequestOutputKind.DELTA)
                assert index < 3
            found = await llm.get_metrics()
            counts = {
                one.labels["engine"]: one.value
                for one in found
                if one.name == "vllm:prompt_tokens" and isinstance(one, Counter)
            }
            assert counts == {"0": 36, "1": 0}
            llm.router.clear()
            assert await llm.reset_prefix_cache()

    run(main())


def test_each_has_what_two_cannot_share() -> None:
    config = EngineConfig(
        str(DEMO_MODEL),
        seed=5,
        kv_events_endpoint="tcp://*:5557",
        kv_events_replay_endpoint="ipc:///tmp/replay",
        step_log="steps",
        profile_dir="traces",
        profile_steps=(2, 4),
    )
    first, second = (config_of_rank(config, rank) for rank in range(2))
    assert first == dataclasses.replace(config, step_log="steps.0")
    assert second.kv_events_endpoint == "tcp://*:5558"
    assert second.kv_events_replay_endpoint == "ipc:///tmp/replay_dp1"
    assert (second.step_log, second.profile_dir, second.seed) == ("steps.1", None, 6)
    dummy = dataclasses.replace(config, load_format="dummy")
    assert config_of_rank(dummy, 1).seed == 5
    assert endpoint_of_rank("tcp://*:*", 3) == "tcp://*:*"
    assert endpoint_of_rank("tcp://[::]:70", 3) == "tcp://[::]:73"
    assert endpoint_of_rank(None, 3) is None


def test_devices_are_enough_or_it_is_said() -> None:
    devices = jax.devices("cpu")[:2]
    assert device_groups(devices, 2, 1) == [devices[:1], devices[1:2]]
    assert device_groups(devices, 1, 2) == [devices[:2]]
    said = (
        "data_parallel_size=2 with tensor_parallel_size=2 needs 4 devices, and JAX sees 2 .cpu.; "
        "use fewer replicas, or set XLA_FLAGS=--xla_force_host_platform_device_count=4"
    )
    with pytest.raises(ValueError, match=said):
        device_groups(devices, 2, 2)
    with pytest.raises(ValueError, match="data_parallel_size=0 must be at least 1"):
        device_groups(devices, 0, 1)
    with pytest.raises(ValueError, match="needs 99 devices"):
        ReplicatedLLM(DEMO_MODEL, data_parallel_size=99)


TEXTS = ["def main():", "class Stack:\n    ", "import os\n", "for i in range(", "#" * 300]


def ranks_of_batches(endpoint: str) -> set[int]:
    """Returns the data parallel ranks in all batches of events that a replica has published."""
    context = zmq.Context()
    try:
        socket = context.socket(zmq.DEALER)
        socket.rcvtimeo, socket.linger = 1000 * int(PATIENCE_S), 0
        socket.connect(endpoint)
        return {payload[2] for _, payload in replay(socket, 0)}
    finally:
        context.destroy(linger=0)


def test_a_model_on_two_devices_answers_as_on_one(tmp_path: pathlib.Path) -> None:
    options: dict[str, Any] = SMALL | {"dtype": "float32", "deterministic": True}
    one = SamplingParams(temperature=0, max_tokens=12)
    outputs = LLM(DEMO_MODEL, **options).generate(TEXTS, one, use_tqdm=False)
    expected = [output.outputs[0].text for output in outputs] * 2
    last = dataclasses.replace(one, output_kind=RequestOutputKind.FINAL_ONLY)

    async def text_of(llm: ReplicatedLLM, text: str) -> str | None:
        (output,) = [each async for each in llm.generate(text, last)]
        return output.outputs[0].text

    options["kv_events_endpoint"] = f"ipc://{tmp_path}/events"
    options["kv_events_replay_endpoint"] = f"ipc://{tmp_path}/replays"

    async def main() -> None:
        async with ReplicatedLLM(DEMO_MODEL, data_parallel_size=2, **options) as llm:
            for rank, replica in enumerate(llm.replicas):
                runner: Any = replica.engine.parts.core.executor
                arrays = jax.tree.leaves((runner.kv_caches, runner.programs.params))
                assert {d for array in arrays for d in array.devices()} == {jax.devices()[rank]}
            assert await asyncio.gather(*(text_of(llm, text) for text in TEXTS * 2)) == expected
            served = [m.value for m in await llm.get_metrics() if m.name == "vllm:prompt_tokens"]
            assert min(served) > 0
            for rank, suffix in enumerate(("", "_dp1")):
                endpoint = f"ipc://{tmp_path}/replays{suffix}"
                assert await asyncio.to_thread(ranks_of_batches, endpoint) == {rank}
            messages = [{"role": "user", "content": "x"}]
            read: Any = await llm.chat_prompt(messages, chat_template="{{ messages[0].content }}")
            assert read == {
                "prompt": "x",
                "prompt_token_ids": await llm.token_ids("x", add_special_tokens=False),
            }
            outputs = [each async for each in llm.generate(TEXTS[0], one)]
            assert outputs[0].prompt == TEXTS[0]
            for wrong in ({"prompt": "a", "cache_salt": 3}, {"prompts": "a"}):
                assert isinstance(await error_of(llm.submit(wrong, one)), ValueError)  # type: ignore[arg-type]
            assert (
                llm.get_default_sampling_params()
                == LLM(DEMO_MODEL, **options).get_default_sampling_params()
            )
            await idle(llm)

    run(main())


def test_each_replica_may_have_several_devices() -> None:
    options: dict[str, Any] = SMALL | {"dtype": "float32"}
    one = SamplingParams(temperature=0, max_tokens=8, output_kind=RequestOutputKind.FINAL_ONLY)
    outputs = LLM(DEMO_MODEL, **options).generate(TEXTS[:4], one, use_tqdm=False)

    async def answers(llm: ReplicatedLLM) -> list[str | None]:
        streams = [await llm.submit(text, one) for text in TEXTS[:4]]
        return [[each async for each in stream][-1].outputs[0].text for stream in streams]

    async def main() -> None:
        options["tensor_parallel_size"] = 2
        async with ReplicatedLLM(DEMO_MODEL, data_parallel_size=2, **options) as llm:
            for rank, replica in enumerate(llm.replicas):
                runner: Any = replica.engine.parts.core.executor
                own = set(jax.devices()[2 * rank : 2 * rank + 2])
                for array in jax.tree.leaves((runner.kv_caches, runner.programs.params)):
                    assert array.devices() == own
            assert await answers(llm) == [output.outputs[0].text for output in outputs]

    asyncio.run(main())  # two engines compile: longer than others may take
