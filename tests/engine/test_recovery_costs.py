"""What a recovery costs is measured, harmlessly, and decides how preempted requests come back."""

import dataclasses
import logging
import math
from typing import Any

import jax
import numpy as np
import pytest

from pallas_paged.engine import LLM, SamplingParams
from pallas_paged.engine.core.policies import CheaperRecovery, RecoveryCosts
from pallas_paged.engine.core.request import SequenceGroup
from pallas_paged.engine.core.row_columns import Progress, RowColumns
from pallas_paged.engine.core.step_inputs import views
from pallas_paged.engine.core.swapping import num_blocks_to_swap
from pallas_paged.engine.device import recovery_costs
from pallas_paged.engine.device.block_programs import BlockPrograms
from pallas_paged.engine.kv.host_pool import HostPool
from tests.engine.serving import assert_idle, make_llm
from tests.models.references import DATA

NAME = "llama-mqa-linear"
LIMITS = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 80, "block_size": 4}
HOST = {"swap_space": 0.01}
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
RULED = dataclasses.replace(GREEDY, presence_penalty=0.5, logprobs=1)
PROMPTS = [{"prompt_token_ids": list(range(3, 3 + length))} for length in (70, 9, 33)]
DRAFT = {"method": "draft_model", "model": str(DATA / NAME), "num_speculative_tokens": 3}
ENGINES: dict[str, dict[str, Any]] = {
    "plain": {},
    "int8": {"kv_cache_dtype": "int8"},
    "deterministic": {"deterministic": True},
    "draft model": {"speculative_config": DRAFT},
    "ngram": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}},
    "one step at a time": {"num_scheduler_steps": 1},
    "background": {"background_compilation": True},
    "xla": {"attention_implementation": "xla", "cache_implementation": "xla"},
}


def make(mode: str = "auto", **options: Any) -> LLM:
    return make_llm(NAME, **LIMITS | HOST | {"num_blocks": 99, "preemption_mode": mode} | options)


def tokens(llm: LLM, params: SamplingParams = GREEDY) -> list[tuple[int, ...]]:
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    assert_idle(llm)
    return [output.outputs[0].token_ids for output in outputs]


def device_state(llm: LLM) -> list[np.ndarray]:
    """Returns all that the device keeps, but for the null block and the row of padding."""
    runner = llm.runner
    runner.programs.wait_for_background()
    kept = [array[1:] for array in jax.tree.leaves(runner.kv_caches)]
    kept += [array[:-1] for array in (*runner.rows, *(runner.row_state or ()))]
    return [np.array(array) for array in kept]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name == "xla" else ()) for name in ENGINES],
)
def test_measuring_gives_times_and_changes_nothing(name: str) -> None:
    llm = make("swap", **ENGINES[name])
    params = RULED if name == "plain" else GREEDY
    expected = tokens(llm, params)  # what is cached now is read below
    before = device_state(llm)
    assert (llm.runner.row_state is not None) == (name == "plain")
    assert before[0].any()
    costs = recovery_costs.measured_costs(llm.runner, 1000)
    assert 0 < costs.seconds_per_token < 1
    assert min(costs) >= 0
    assert 0 < costs.swap_s(8) < 1
    for length in (1, 33, recovery_costs.longest_prompt(llm.runner)):
        assert 0 < recovery_costs.recompute_s(llm.runner, length) < 10
    assert 0 < recovery_costs.swap_s(llm.runner, 98) < 1
    for old, new in zip(before, device_state(llm), strict=True):
        np.testing.assert_array_equal(new, old)
    assert tokens(llm, params) == expected


@pytest.mark.parametrize("name", ["plain", "draft model", "deterministic", "background"])
def test_auto_measures_with_programs_that_requests_use(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        llm = make(**ENGINES[name])
    (line,) = [one for one in caplog.messages if one.startswith("preemption")]
    policy = llm.engine.core.scheduler._choose_recovery
    assert isinstance(policy, CheaperRecovery)
    assert line == f"preemption: {policy.costs} (measured)"
    assert all(map(math.isfinite, policy.costs))
    (bucket,) = llm.runner.programs.num_traces
    assert bucket in llm.runner.buckets.all()
    blocks = llm.runner.block_programs
    assert set(blocks.num_traces) == {(k, n) for k in ("gather", "scatter") for n in (8, 32)}
    assert set(blocks.num_traces) <= set(blocks.names())
    dispatch, used = llm.runner.dispatch, set()
    llm.runner.dispatch = lambda plan: used.add(plan.bucket) or dispatch(plan)
    tokens(llm)
    assert bucket in used
    assert llm.runner.programs.num_traces[bucket] == 1


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_other_modes_measure_nothing(mode: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        llm = make(mode)
    assert not llm.runner.programs.num_traces
    assert not llm.runner.block_programs.num_traces
    assert "measured" not in caplog.text


def test_nothing_is_measured_without_room_for_any_swap(caplog: pytest.LogCaptureFixture) -> None:
    assert not make(swap_space=0).runner.programs.num_traces
    assert not caplog.messages
    assert not make(swap_space=1e-9).runner.programs.num_traces
    (said,) = [one for one in caplog.messages if "swap_space" in one]
    assert "holds 0 blocks, and the smallest swap takes 8" in said


def test_what_cannot_be_measured_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no pinned memory")

    monkeypatch.setattr(BlockPrograms, "swap_out", fail)
    with pytest.raises(RuntimeError, match="no pinned memory"):
        make()


@pytest.mark.parametrize(("limit", "length"), [(32, 9), (32, 70), (64, 34), (256, 60)])
def test_a_prompt_is_cut_as_the_scheduler_does(limit: int, length: int) -> None:
    llm = make("recompute", max_num_batched_tokens=limit)
    dispatch, used = llm.runner.dispatch, []
    llm.runner.dispatch = lambda plan: used.append(plan) or dispatch(plan)
    prompt = {"prompt_token_ids": list(range(3, 3 + length))}
    llm.generate(prompt, dataclasses.replace(GREEDY, max_tokens=1), use_tqdm=False)
    plans = recovery_costs._steps_of_prompt(llm.runner, length)
    assert [plan.bucket for plan in plans] == [plan.bucket for plan in used]
    for ours, theirs in zip(plans, used, strict=True):
        ours, theirs = (views(plan.inputs, plan.bucket) for plan in (ours, theirs))
        for field in ("positions", "seq_lens", "query_start_loc", "logits_indices"):
            np.testing.assert_array_equal(getattr(ours, field), getattr(theirs, field))


def test_prompts_shorter_than_a_step_fill_it_together() -> None:
    llm = make("recompute", deterministic=True, max_model_len=24)
    plan = recovery_costs._step_of_prompts(llm.runner)
    x = views(plan.inputs, plan.bucket)
    assert x.seq_lens.tolist() == [24, 24, 16, 0]
    assert x.query_start_loc.tolist() == [0, 24, 48, 64, 64]
    assert x.positions.max() == 23
    llm = make("recompute", deterministic=True, max_model_len=24, max_num_seqs=2)
    plan = recovery_costs._step_of_prompts(llm.runner)
    assert views(plan.inputs, plan.bucket).query_start_loc.tolist() == [0, 24, 48]


@pytest.mark.parametrize(
    ("points", "per_block", "per_swap"),
    [
        ([(8, 3.0), (16, 5.0)], 0.125, 1.0),
        ([(8, 1.0), (16, 4.0)], 0.125, 0.0),  # it would begin at -2
        ([(8, 3.0), (16, 2.0)], 0.0, 2.0),  # it would fall
        ([(8, 4.0)], 0.25, 0.0),
    ],
)
def test_the_line_through_two_sizes(
    points: list[tuple[int, float]], per_block: float, per_swap: float
) -> None:
    assert recovery_costs._line(points) == (per_block, per_swap)


def test_the_sizes_that_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make("recompute")  # of 98 blocks; a sequence has 20 of them at most
    sizes = recovery_costs._sizes_to_measure
    assert sizes(llm.runner, 1000) == [8, 32]
    assert sizes(llm.runner, 31) == [8, 16]
    assert sizes(llm.runner, 8) == [8]
    with pytest.raises(ValueError, match="7 blocks of host memory hold no chunk"):
        sizes(llm.runner, 7)
    monkeypatch.setattr(recovery_costs, "_MAX_CHUNK_BYTES", 0)
    assert sizes(llm.runner, 1000) == [8, 16]


@pytest.mark.parametrize(
    ("costs", "swapped"),
    [
        # Of 40, 160 and 640 tokens in blocks of 4: copies of 16, 64 and 256 blocks.
        (RecoveryCosts(1.0, 0.5, 100.0), [False, False, True]),  # 116, 164, 356 s
        (RecoveryCosts(1.0, 0.5, 90.0), [False, True, True]),  # 106, 154, 346 s
        (RecoveryCosts(1.0, 0.5, 20.0), [True, True, True]),  # 36, 84, 276 s
        (RecoveryCosts(1.0, 1.25, 0.0), [False, False, False]),  # 40, 160, 640 s
        (RecoveryCosts(0.1, 0.5, 20.0), [False, False, False]),
    ],
)
def test_long_requests_are_swapped_and_short_ones_computed_again(
    costs: RecoveryCosts, swapped: list[bool]
) -> None:
    host_pool = HostPool(1000, 1000)
    tables = np.arange(1, 1001, dtype=np.int32)[None]
    found = []
    for length in (40, 160, 640):
        # The last token is never kept.
        (sequence,) = SequenceGroup("a", (1,) * (length + 1), 8).sequences
        sequence.take_row(RowColumns(1), 0, Progress(length, length, length, length // 4))
        choose = CheaperRecovery(
            costs, lambda group: host_pool.padded(num_blocks_to_swap(group, tables, 4))
        )
        found.append(choose(sequence.group) == "swap")
    assert found == swapped


def test_as_many_blocks_are_counted_as_are_swapped_out() -> None:
    """Those that samples share once, and the padding of chunks."""
    llm = make(num_blocks=24)
    policy, counted, copied = llm.engine.core.scheduler._choose_recovery, [], []
    assert isinstance(policy, CheaperRecovery)

    def choose(group: SequenceGroup) -> str:
        counted.append(policy.num_copied(group))
        return "swap"

    llm.engine.core.scheduler._choose_recovery = choose
    swap_out = llm.runner.block_programs.swap_out
    llm.runner.block_programs.swap_out = lambda caches, move: (
        copied.append(move.chunk.num_blocks) or swap_out(caches, move)
    )
    params = dataclasses.replace(GREEDY, temperature=1.0, seed=1, n=2, max_tokens=16)
    llm.generate(PROMPTS[1:] * 2, params, use_tqdm=False)
    assert_idle(llm)
    assert counted
    assert counted == copied
