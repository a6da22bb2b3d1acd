"""A plan says all that a device needs, in integers and arrays, and comes out of bytes as it was."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np

from pallas_paged.engine import LLM, BeamSearchParams, SamplingParams
from pallas_paged.engine.core.buckets import Bucket
from pallas_paged.engine.core.grammar import NUM_MASKS
from pallas_paged.engine.core.plan import StepPlan, StepResult
from pallas_paged.engine.device.runner import InFlight, ModelRunner
from pallas_paged.engine.kv.host_pool import BlockMove, SwappedChunk
from pallas_paged.engine.kv.sharing import CopyPairs
from tests.engine.serving import make_llm

I32 = st.integers(-(2**31), 2**31 - 1)
COUNTS = st.integers(0, 2**31 - 1)


@st.composite
def arrays(draw: Any, size: int | None = None) -> np.ndarray:
    bounds = {"max_size": 5} if size is None else {"min_size": size, "max_size": size}
    return np.array(draw(st.lists(I32, **bounds)), np.int32)


MOVES = st.builds(BlockMove, st.builds(SwappedChunk, COUNTS, COUNTS), arrays())
PLANS = st.builds(
    StepPlan,
    step_id=st.integers(0, 2**40),
    bucket=st.builds(
        Bucket,
        *(COUNTS, COUNTS, COUNTS, st.booleans(), st.booleans(), COUNTS, COUNTS),
        *(st.booleans() for _ in range(5)),
    ),
    dropped_chunks=st.lists(COUNTS, max_size=3).map(tuple),
    swap_outs=st.lists(MOVES, max_size=3).map(tuple),
    swap_ins=st.lists(MOVES, max_size=3).map(tuple),
    copies=st.integers(0, 4).flatmap(lambda k: st.builds(CopyPairs, arrays(k), arrays(k))),
    table_edits=st.lists(arrays(8).map(lambda a: a.reshape(2, -1)), max_size=3).map(tuple),
    row_edits=st.lists(arrays(), max_size=3).map(tuple),
    mask_edits=st.lists(
        arrays(2 * NUM_MASKS).map(lambda a: a.reshape(NUM_MASKS, -1)), max_size=2
    ).map(tuple),
    inputs=arrays(),
    wants_logprobs=st.booleans(),
    prompt_targets=st.integers(0, 4)
    .flatmap(lambda p: arrays(3 * p))
    .map(lambda a: a.reshape(3, -1)),
)


def check_same(one: Any, other: Any) -> None:
    """Asserts that two plans, or parts of them, are equal in values, types and shapes."""
    assert type(one) is type(other)
    if isinstance(one, np.ndarray):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    elif isinstance(one, tuple):
        for mine, others in zip(one, other, strict=True):
            check_same(mine, others)
    else:
        assert one == other


@hypothesis.given(PLANS)
def test_a_plan_comes_out_of_bytes_as_it_was(plan: StepPlan) -> None:
    check_same(StepPlan.from_bytes(plan.to_bytes()), plan)


def check_plain(value: Any) -> None:
    """Asserts that there is nothing but integers, truth values, arrays, and tuples of these."""
    if isinstance(value, np.ndarray):
        assert value.dtype in (np.int32, np.uint32, np.float32)
    elif isinstance(value, tuple):
        for part in value:
            check_plain(part)
    elif isinstance(value, Bucket):
        check_plain(dataclasses.astuple(value))
    else:
        assert type(value) in (int, bool), value


class ByBytes:
    """Hands each plan to a runner as another process would get it, and keeps it."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self.plans: list[StepPlan] = []

    def choose(self, best: Bucket, all_that_fit: Callable[[], Sequence[Bucket]]) -> Bucket:
        return self.runner.choose(best, all_that_fit)

    def expect(self, bucket: Bucket) -> None:
        self.runner.expect(bucket)

    def dispatch(self, plan: StepPlan) -> InFlight:
        check_plain(plan)
        self.plans.append(StepPlan.from_bytes(plan.to_bytes()))
        check_same(self.plans[-1], plan)
        return self.runner.dispatch(self.plans[-1])

    def collect(self, in_flight: InFlight) -> StepResult:
        return self.runner.collect(in_flight)

    def recover(self) -> None:
        self.runner.recover()


SAMPLED = SamplingParams(temperature=1.0, seed=7, max_tokens=14, ignore_eos=True)
GREEDY = dataclasses.replace(SAMPLED, temperature=0)
PREFIX = list(range(5, 25))
REQUESTS: list[tuple[list[int], SamplingParams | BeamSearchParams]] = [
    ([*PREFIX, 1], GREEDY),
    ([3, 4, 5, 6, 7], dataclasses.replace(SAMPLED, n=3, logprobs=2)),
    ([*PREFIX, 2, 3], dataclasses.replace(SAMPLED, presence_penalty=0.5, repetition_penalty=1.3)),
    (list(range(40, 85)), dataclasses.replace(GREEDY, prompt_logprobs=3, max_tokens=4)),
    ([8, 9, 10, 11, 12, 13], BeamSearchParams(2, 10, ignore_eos=True)),
    ([*PREFIX, 4], dataclasses.replace(GREEDY, logit_bias={7: 4.0}, min_tokens=3, logprobs=0)),
    ([14, 15], dataclasses.replace(GREEDY, max_tokens=24)),
    (PREFIX, dataclasses.replace(SAMPLED, n=2, max_tokens=24)),
]
BAD_WORDS = {2: [[9, 9], [7]], 5: [[5]]}
ABORTED = 7
"""The request that is aborted as soon as its blocks are in host memory."""


def run(llm: LLM) -> list[Any]:
    """Returns what the outputs of one run over all requests hold, times aside."""
    engine, scheduler = llm.engine, llm.engine.core.scheduler
    intake = engine._parts.intake
    assert llm.reset_prefix_cache()
    groups = []
    for index, (ids, params) in enumerate(REQUESTS):
        groups.append(intake.make_group(ids, params, None, None, BAD_WORDS.get(index, ())))
        engine.add(groups[-1])
    swapped = {groups[i] for i in (1, 4, ABORTED)}
    scheduler._choose_recovery = lambda group: "swap" if group in swapped else "recompute"
    done = {}
    while engine.has_unfinished:
        done |= {output.request_id: output for output in engine.step()}
        if groups[ABORTED].swapped is not None:
            engine.abort(groups[ABORTED].request_id)
    engine.check_idle()
    assert not llm.runner._chunks
    outputs = [done[group.request_id] for group in groups]
    return [(output.prompt_logprobs, output.outputs) for output in outputs]


def test_a_run_of_everything_gives_the_same_over_bytes() -> None:
    llm = make_llm(
        "llama-gqa-llama3",
        num_blocks=22,
        block_size=4,
        max_num_seqs=6,
        max_num_batched_tokens=16,
        preemption_mode="swap",
        swap_space=0.01,
    )
    direct = run(llm)
    before = llm.kv_stats()
    device = llm.engine.core.executor = ByBytes(llm.runner)
    assert run(llm) == direct
    assert direct[ABORTED][1][0].finish_reason == "abort"
    after = llm.kv_stats()
    for name in ("num_swaps", "num_recomputations", "num_hit_tokens"):
        assert getattr(after, name) > getattr(before, name) > 0, name
    plans = device.plans
    seen = {name: sum(bool(getattr(p, name)) for p in plans) for name in StepPlan._fields[2:5]}
    seen |= {
        "copies": sum(len(p.copies.src) > 0 for p in plans),
        "table_edits": sum(len(p.table_edits) > 0 for p in plans),
        "row_edits": sum(len(p.row_edits) > 0 for p in plans),
        "wants_logprobs": sum(p.wants_logprobs for p in plans),
        "prompt_targets": sum(p.prompt_targets.size > 0 for p in plans),
        "decode": sum(p.bucket.is_decode for p in plans),
        "mixed": sum(not p.bucket.is_decode for p in plans),
        "plain": sum(not p.bucket.is_full for p in plans),
    }
    assert all(seen.values()), seen
