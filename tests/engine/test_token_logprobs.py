"""The log-probability of each token alone, `logprobs=0`: in plain steps, as full ones give it."""

import asyncio
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy import special

from pallas_paged.engine import (
    AsyncLLM,
    BeamSearchParams,
    CompletionOutput,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
)
from pallas_paged.engine.core.buckets import Bucket
from pallas_paged.engine.core.speculation import NgramProposer, NgramSettings
from pallas_paged.engine.engine import Engine
from tests.engine import mock_model
from tests.engine.bigram_model import VOCAB_SIZE, make_engine, make_table, run
from tests.engine.mock_model import device_of, made_up_logprob, make_whole_engine
from tests.engine.serving import assert_idle, make_llm, reference_requests
from tests.models.references import DATA

TABLE = make_table()
LOGPROBS = special.log_softmax(TABLE.astype(np.float64), axis=-1)
HELD = RequestOutputKind.FINAL_ONLY
OWN = SamplingParams(
    max_tokens=20, temperature=0, ignore_eos=True, logprobs=0, detokenize=False, output_kind=HELD
)
NAME = "llama-gqa-llama3"


def check(output: RequestOutput) -> None:
    """Asserts that each token has the log-probability and the rank that the table gives it."""
    for completion in output.outputs:
        assert completion.logprobs is not None
        assert len(completion.logprobs) == len(completion.token_ids)
        last = output.prompt_token_ids[-1]
        for token, found in zip(completion.token_ids, completion.logprobs, strict=True):
            assert found[token].logprob == pytest.approx(LOGPROBS[last, token], abs=1e-5)
            order = np.lexsort((np.arange(VOCAB_SIZE), -TABLE[last]))
            assert order[found[token].rank - 1] == token
            last = token
        total = sum(completion.token_logprobs or ())
        assert completion.cumulative_logprob == pytest.approx(total, abs=1e-4)


def figures(output: RequestOutput) -> list[Any]:
    """Returns what an output says of its completions' tokens."""
    return [
        (
            one.token_ids,
            one.finish_reason,
            one.stop_reason,
            one.logprobs
            and [found[token] for token, found in zip(one.token_ids, one.logprobs, strict=True)],
        )
        for one in output.outputs
    ]


def mixture(seed: int, count: int, asked: Sequence[int | None]) -> tuple[list[Any], list[Any]]:
    """Returns prompts, of which many are computed in chunks, and parameters of all kinds."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(1, VOCAB_SIZE, rng.integers(1, 20)).tolist() for _ in range(count)]
    params = [
        dataclasses.replace(
            OWN,
            temperature=float(rng.choice([0.0, 0.8, 2.0])),
            top_k=int(rng.choice([0, 0, 5])),
            top_p=float(rng.choice([1.0, 0.8])),
            seed=i,
            max_tokens=int(rng.integers(1, 24)),
            ignore_eos=bool(rng.integers(2)),
            stop_token_ids=[3, 7] if rng.integers(2) else None,
            logprobs=asked[rng.integers(len(asked))],
            output_kind=[HELD, RequestOutputKind.CUMULATIVE][rng.integers(2)],
        )
        for i in range(count)
    ]
    params = [
        dataclasses.replace(one, n=1 + i % 2) if one.temperature else one
        for i, one in enumerate(params)
    ]
    return prompts, params


@pytest.mark.parametrize(
    "options",
    [
        {"num_scheduler_steps": 8},
        {"num_scheduler_steps": 8, "num_blocks": 20},
        {"num_scheduler_steps": 5, "num_blocks": 20, "num_host_blocks": 40},
        {"num_scheduler_steps": 1, "async_scheduling": False},
        {"num_scheduler_steps": 8, "proposer": True},
        {"num_scheduler_steps": 3, "enable_prefix_caching": True},
    ],
    ids=["plenty", "recompute", "swap", "single steps", "drafts", "cached prefixes"],
)
@pytest.mark.parametrize("asked", [(0,), (0, None), (0, 0, None, 2)], ids=str)
def test_figures_are_those_of_full_steps(options: dict[str, Any], asked: tuple[Any, ...]) -> None:
    prompts, params = mixture(len(asked), 24, asked)
    found: list[list[RequestOutput]] = []
    for token_logprobs in (False, True):
        proposer = NgramProposer(NgramSettings(3)) if "proposer" in options else None
        engine = make_engine(
            TABLE, **options | {"proposer": proposer, "token_logprobs": token_logprobs}
        )
        found.append(run(engine, prompts, params))
    if "num_blocks" in options:
        assert sum(output.metrics.num_preemptions for output in found[1]) > 0
    endings = {one.finish_reason for output in found[1] for one in output.outputs}
    assert endings == {"stop", "length"}
    for full, plain, one in zip(*found, params, strict=True):
        if one.logprobs is None:
            assert figures(plain) == figures(full)
            continue
        check(plain)
        check(full)
        for mine, its in zip(plain.outputs, full.outputs, strict=True):
            assert mine.token_ids == its.token_ids
            assert mine.token_logprobs == pytest.approx(its.token_logprobs, abs=1e-6)


def test_such_steps_are_plain_and_several_in_a_program(ran: list[Bucket]) -> None:
    engine = make_engine(TABLE, num_scheduler_steps=8, token_logprobs=True)
    prompts = [[5, 6, 7], [8], [9, 4]]
    for logprobs in (None, 0):
        ran.clear()
        run(engine, prompts, [dataclasses.replace(OWN, logprobs=logprobs)] * 3)
        assert len(ran) == 1 + 3  # 20 tokens: the first, then 8, 8 and 3
        assert all(bucket.has_logprobs == (logprobs == 0) for bucket in ran)
        assert not any(bucket.is_full for bucket in ran)
        assert [bucket.num_steps for bucket in ran] == [1, 8, 8, 8]
    ran.clear()
    run(engine, [list(range(1, 21))], [OWN])
    assert [bucket.has_logprobs for bucket in ran[:3]] == [False, False, True]  # chunks of 8


def test_steps_are_full_where_somebody_needs_one(ran: list[Bucket]) -> None:
    engine = make_engine(TABLE, num_scheduler_steps=8, token_logprobs=True)
    others = [
        dataclasses.replace(OWN, logprobs=2, max_tokens=3),
        dataclasses.replace(OWN, presence_penalty=0.5, max_tokens=3),
        BeamSearchParams(beam_width=2, max_tokens=3),
    ]
    for other in others:
        ran.clear()
        outputs = run(engine, [[5, 6], [7]], [OWN, other])
        check(outputs[0])
        kinds = [(bucket.is_full, bucket.has_logprobs) for bucket in ran]
        assert kinds[0] == (True, False)
        assert kinds.count((True, False)) >= 3
        assert all(is_full != has_logprobs for is_full, has_logprobs in kinds)
        assert kinds[-1] == (False, True)
    ran.clear()
    (output,) = run(engine, [list(range(1, 12))], [dataclasses.replace(OWN, prompt_logprobs=0)])
    check(output)
    assert [bucket.is_full for bucket in ran] == [True, True] + [False] * (len(ran) - 2)


def test_without_their_programs_all_such_steps_are_full(ran: list[Bucket]) -> None:
    engine = make_engine(TABLE, num_scheduler_steps=8)
    (output,) = run(engine, [[5, 6]], [OWN])
    check(output)
    assert [bucket.is_full for bucket in ran] == [True] * 20


def test_nothing_compiles_after_warm_up() -> None:
    engine = make_engine(TABLE, num_scheduler_steps=8, token_logprobs=True)
    engine.core.executor.warm_up()
    before = dict(engine.core.executor.programs.num_traces)
    assert any(bucket.has_logprobs for bucket in before)
    run(engine, *mixture(1, 12, (0, None)))
    assert engine.core.executor.programs.num_traces == before


def test_an_aborted_request_has_them_for_the_tokens_it_has() -> None:
    engine = make_engine(TABLE, num_scheduler_steps=4, token_logprobs=True)
    group = engine.make_group([5, 6], dataclasses.replace(OWN, n=2, temperature=1, seed=1))
    engine.add(group)
    for _ in range(4):
        assert engine.step() == []
    engine.abort(group.request_id)
    (output,) = engine.step()
    assert [one.finish_reason for one in output.outputs] == ["abort"] * 2
    assert all(len(one.token_ids) > 4 for one in output.outputs)
    check(output)


def fails_at_step(engine: Engine, number: int) -> None:
    """Lets the engine's device fail once, when it is asked for the results of that step."""
    device, collect = engine.core.executor, engine.core.executor.collect
    left = iter(range(number))

    def failing(in_flight: Any) -> Any:
        if next(left, None) is None:
            device.collect = collect
            raise RuntimeError("lost")
        return collect(in_flight)

    device.collect = failing


def test_a_failed_engine_gives_them_for_the_tokens_it_gives() -> None:
    engine = make_engine(TABLE, num_scheduler_steps=4, token_logprobs=True)
    engine.add(engine.make_group([5, 6], dataclasses.replace(OWN, n=2, temperature=1, seed=1)))
    fails_at_step(engine, 3)
    with pytest.raises(RuntimeError, match="lost"):
        engine.drain()
    (output,) = engine.step()
    assert [one.stop_reason for one in output.outputs] == ["RuntimeError: lost"] * 2
    assert all(len(one.token_ids) > 4 for one in output.outputs)
    check(output)


def test_tokens_before_one_that_is_none_have_theirs() -> None:
    """Behind one of them no token is possible, in the middle of a program."""
    table = TABLE.copy()
    tokens = run(make_engine(table), [[5, 6]], [OWN])[0].outputs[0].token_ids
    place = next(i for i in range(3, 9) if tokens[i] not in tokens[:i])
    table[tokens[place]] = -np.inf
    engine = make_engine(table, num_scheduler_steps=8, token_logprobs=True)
    (output,) = run(engine, [[5, 6]], [OWN])
    assert output.outputs[0].finish_reason == "abort"
    assert output.outputs[0].token_ids == tokens[: place + 1]
    check(output)


def test_late_results_of_a_preempted_sequence_have_theirs() -> None:
    """Of a device whose figures can be told by hand, in all orders that memory forces."""
    params = dataclasses.replace(OWN, temperature=1, seed=1, max_tokens=18)
    for num_blocks in (8, 9, 11):
        engine = make_whole_engine(
            num_blocks=num_blocks, block_size=4, num_scheduler_steps=3, max_num_seqs=3
        )
        groups = [engine.make_group([i, 1, 2], params) for i in range(3)]
        for group in groups:
            engine.add(group)
        outputs = {}
        while engine.has_unfinished:
            outputs |= {output.request_id: output for output in engine.step()}
        assert sum(group.num_preemptions for group in groups) > 0
        for group in groups:
            (completion,) = outputs[group.request_id].outputs
            wanted, _, _ = mock_model.generate_alone(group.sequences[0], 64)
            assert completion.token_ids == tuple(wanted)
            assert completion.token_logprobs == pytest.approx(list(map(made_up_logprob, wanted)))
        assert not device_of(engine).queue


def test_deltas_have_those_of_their_tokens() -> None:
    llm = make_llm(NAME, max_num_seqs=4, max_num_batched_tokens=32, deterministic=True)
    params = dataclasses.replace(OWN, temperature=1, n=2, seed=3, max_tokens=9)
    prompts = reference_requests(NAME)[:2]
    whole = [output.outputs for output in llm.generate(prompts, params, use_tqdm=False)]
    delta = dataclasses.replace(params, output_kind=RequestOutputKind.DELTA)
    found: dict[tuple[str, int], list[float]] = {}
    for output in llm.stream(prompts, delta):
        for one in output.outputs:
            assert one.token_logprobs is not None
            assert len(one.token_logprobs) == len(one.token_ids) > 0
            found.setdefault((output.request_id, one.index), []).extend(one.token_logprobs)
    assert_idle(llm)
    assert [tuple(values) for _, values in sorted(found.items())] == [
        one.token_logprobs for outputs in whole for one in outputs
    ]


def test_an_async_engine_gives_the_same() -> None:
    options: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 32}
    prompts = reference_requests(NAME)[:4]
    llm = make_llm(NAME, **options)
    expected = [o.outputs[0] for o in llm.generate(prompts, OWN, use_tqdm=False)]

    async def last(llm: AsyncLLM, prompt: Any, kind: RequestOutputKind) -> CompletionOutput:
        params = dataclasses.replace(OWN, output_kind=kind)
        outputs = [output async for output in llm.generate(prompt, params)]
        return outputs[-1].outputs[0]

    async def main() -> list[list[CompletionOutput]]:
        fixed = {"num_blocks": 400, "compilation_cache_dir": None, "background_compilation": False}
        async with AsyncLLM(DATA / NAME, **fixed | options) as llm:
            return [
                await asyncio.gather(*(last(llm, prompt, kind) for prompt in prompts))
                for kind in (HELD, RequestOutputKind.CUMULATIVE)
            ]

    for outputs in asyncio.run(main()):
        for found, one in zip(outputs, expected, strict=True):
            assert found.token_ids == one.token_ids
            assert found.token_logprobs == pytest.approx(one.token_logprobs, abs=1e-5)


def test_a_model_gives_what_its_full_steps_give(ran: list[Bucket]) -> None:
    """Greedy and sampled; with one kind of steps, with the other, and in company."""
    prompts = reference_requests(NAME)[:8]
    params = [dataclasses.replace(OWN, temperature=i % 2, seed=i, max_tokens=30) for i in range(8)]
    llms = [
        make_llm(NAME, max_num_seqs=8, max_num_batched_tokens=64, token_logprobs=token_logprobs)
        for token_logprobs in (False, True)
    ]
    full = llms[0].generate(prompts, params, use_tqdm=False)
    assert {bucket.is_full for bucket in ran} == {True}
    ran.clear()
    plain = llms[1].generate(prompts, params, use_tqdm=False)
    assert not any(bucket.is_full for bucket in ran)
    assert max(bucket.num_steps for bucket in ran) > 1
    more = [dataclasses.replace(one, logprobs=3 if i < 2 else 0) for i, one in enumerate(params)]
    mixed = llms[1].generate(prompts, more, use_tqdm=False)
    for outputs in (plain, mixed):
        for output, reference in zip(outputs, full, strict=True):
            (one,), (other,) = output.outputs, reference.outputs
            assert one.token_ids == other.token_ids
            assert one.token_logprobs == pytest.approx(other.token_logprobs, abs=1e-5)
            ranks = [
                [found[token].rank for token, found in zip(c.token_ids, c.logprobs, strict=True)]
                for c in (one, other)
            ]
            assert ranks[0] == ranks[1]


def test_a_completion_tells_its_tokens_figures() -> None:
    engine = make_engine(TABLE, token_logprobs=True)
    outputs = run(engine, [[5, 6]] * 2, [dataclasses.replace(OWN, logprobs=k) for k in (2, None)])
    (asked,), (bare,) = (output.outputs for output in outputs)
    assert bare.token_logprobs is None
    assert asked.token_logprobs == tuple(
        found[token].logprob for token, found in zip(asked.token_ids, asked.logprobs, strict=True)
    )
