"""The shapes of steps: few, one for every step, and tables as wide as the longest row needs."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest

from pallas_paged.engine import SamplingParams
from pallas_paged.engine.config import CPU_SCHEDULER_STEPS, EngineConfig
from pallas_paged.engine.core import buckets as buckets_module
from pallas_paged.engine.core.buckets import MIN_TABLE_WIDTH, Bucket, Buckets
from pallas_paged.engine.core.plan import StepPlan
from pallas_paged.engine.device.pool_size import buckets_for
from tests.engine.serving import assert_idle, make_llm


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 8, 9, 64, 100])
@pytest.mark.parametrize("max_num_batched_tokens", [100, 128, 512])
@pytest.mark.parametrize("deterministic", [False, True])
def test_every_step_fits_a_bucket_that_is_compiled_ahead(
    max_num_seqs: int, max_num_batched_tokens: int, deterministic: bool
) -> None:
    config = EngineConfig(
        "m",
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        deterministic=deterministic,
        compile_ahead=True,
    )
    buckets = buckets_for(config, 40, "cpu", ())
    every = buckets.all()
    assert len(every) == len(set(every)) <= 56
    assert len(every) == 2 or not deterministic
    for num_seqs in range(1, max_num_seqs + 1):
        for num_tokens in range(num_seqs, max_num_batched_tokens + 1, 7):
            bucket = buckets.pick(num_tokens, num_seqs, 9, is_decode=num_tokens == num_seqs)
            assert bucket in every
            assert bucket.num_seqs >= num_seqs
            assert bucket.num_tokens >= num_tokens
            assert bucket.table_width == 40
            assert bucket.is_decode == (num_tokens == num_seqs and not deterministic)
            assert bucket.num_steps == (CPU_SCHEDULER_STEPS if bucket.is_decode else 1)


@pytest.mark.parametrize(
    ("limits", "decode_seqs", "mixed_tokens"),
    [
        ((64, 512), (1, 2, 4, 8, 12, 16, 24, 32, 48, 64), (32, 64, 128, 256, 512)),
        ((100, 100), (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 100), (32, 64, 100)),
        (
            (256, 8192),
            (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256),
            (32, 64, 128, 256, 512, 2048, 8192),
        ),
        ((3, 20), (1, 2, 3), (20,)),
        ((1, 1), (1,), (1,)),
    ],
)
def test_sizes(
    limits: tuple[int, int], decode_seqs: tuple[int, ...], mixed_tokens: tuple[int, ...]
) -> None:
    buckets = Buckets.for_limits(*limits, 40)
    assert buckets.decode_seqs == decode_seqs
    assert buckets.mixed_tokens == mixed_tokens


def test_buckets_are_the_smallest_that_fit() -> None:
    buckets = Buckets((1, 2, 4), (8, 32), (2, 4), (5, 50))
    assert buckets.pick(3, 3, 6, is_decode=True) == Bucket(4, 4, 50, is_decode=True)
    assert buckets.pick(8, 2, 5, is_decode=False) == Bucket(8, 2, 5, is_decode=False)
    assert buckets.pick(9, 3, 50, is_decode=False) == Bucket(32, 4, 50, is_decode=False)
    with pytest.raises(AssertionError, match="largest bucket 32"):
        buckets.pick(33, 1, 1, is_decode=False)


CPU, GPU = (64, 512, 40, 16), (64, 8192, 40, 256)


@pytest.mark.parametrize(
    ("limits", "num_tokens", "num_fixed", "expected"),
    [
        (CPU, 20, 0, 20),  # no bucket is full
        (CPU, 64, 0, 64),
        (CPU, 70, 0, 64),  # and 6 in the bucket of 32: better than 58 of padding
        (CPU, 100, 0, 100),  # 64 and 64 again would be more than 128
        (CPU, 130, 2, 128),
        (CPU, 300, 8, 128),  # one prompt after the other
        (CPU, 512, 0, 128),
        (CPU, 400, 60, 256),  # a step of 128 would be half of tokens that decode
        (CPU, 512, 200, 512),
        (CPU, 40, 33, 40),  # all 33 have to be in it
        (GPU, 160, 0, 160),  # a step costs more than the padding
        (GPU, 200, 8, 200),
        (GPU, 600, 8, 512),
        (GPU, 1500, 8, 1500),
        (GPU, 3000, 8, 2048),
        (GPU, 8192, 64, 2048),
    ],
)
def test_a_step_with_prompts_computes_what_is_worth_while(
    limits: tuple[int, int, int, int], num_tokens: int, num_fixed: int, expected: int
) -> None:
    buckets = Buckets.for_limits(*limits[:3], step_cost=limits[3])
    assert buckets.worth_while(num_tokens, num_fixed) == expected


def test_what_is_worth_while_costs_no_more_than_all_at_once() -> None:
    """But for the steps themselves, and for those that have another token in each."""
    for limits in (CPU, GPU):
        buckets = Buckets.for_limits(*limits[:3], step_cost=limits[3])
        assert not Buckets.for_limits(*limits[:3], deterministic=True).worth_while(9, 3) - 9
        for num_tokens in range(1, limits[1] + 1, 7):
            for num_fixed in range(0, min(num_tokens, limits[0] + 1), 9):
                left, cost, num_steps = num_tokens, 0, 0
                while left > num_fixed or not num_steps:
                    now = buckets.worth_while(left, num_fixed)
                    assert num_fixed < now <= left
                    cost += buckets.pick(now, 1, 1, is_decode=False).num_tokens
                    num_steps, left = num_steps + 1, left - now + num_fixed
                at_once = buckets.pick(num_tokens, 1, 1, is_decode=False).num_tokens
                assert cost <= 1.5 * at_once + num_steps * (limits[3] + num_fixed)


def widths(max_blocks_per_seq: int, *, deterministic: bool = False) -> tuple[int, ...]:
    buckets = Buckets.for_limits(8, 64, max_blocks_per_seq, deterministic=deterministic)
    found = {bucket.table_width for bucket in buckets.all()}
    assert sorted(found) == list(buckets.table_widths)
    return buckets.table_widths


@pytest.mark.parametrize(
    ("max_blocks_per_seq", "expected"),
    [(1, (1,)), (128, (128,)), (256, (256,)), (257, (128, 257)), (8192, (128, 1024, 8192))],
)
def test_tables_have_few_widths_the_last_of_which_takes_all(
    max_blocks_per_seq: int, expected: tuple[int, ...]
) -> None:
    assert MIN_TABLE_WIDTH == 128
    assert widths(max_blocks_per_seq) == expected
    assert widths(max_blocks_per_seq, deterministic=True) == (max_blocks_per_seq,)


@pytest.mark.parametrize(
    ("longest", "width"), [(1, 128), (128, 128), (129, 1024), (1024, 1024), (1025, 8192)]
)
@pytest.mark.parametrize("is_decode", [True, False])
def test_the_width_is_the_least_that_holds_the_longest_row(
    longest: int, width: int, is_decode: bool
) -> None:
    buckets = Buckets.for_limits(8, 64, 8192)
    assert buckets.pick(8, 8, longest, is_decode=is_decode).table_width == width


PROMPTS = [{"prompt_token_ids": list(range(5, 5 + length))} for length in (3, 10, 27)]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def run(min_width: int, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Sequence[int]], list[int]]:
    """Returns the tokens, and the width of each step's tables in blocks of 4 tokens."""
    monkeypatch.setattr(buckets_module, "MIN_TABLE_WIDTH", min_width)
    llm = make_llm(
        "llama-gqa-llama3",
        max_num_seqs=4,
        max_num_batched_tokens=32,
        max_model_len=96,
        block_size=4,
        async_scheduling=False,
    )
    dispatch, steps = llm.runner.dispatch, []

    def note(plan: StepPlan) -> object:
        steps.append(plan.bucket.table_width)
        return dispatch(plan)

    monkeypatch.setattr(llm.runner, "dispatch", note)
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert_idle(llm)
    return [output.outputs[0].token_ids for output in outputs], steps


def test_rows_that_grow_into_a_wider_table_get_the_same_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The longest row has 32 tokens, 8 blocks, in its sixth step; the first chunk has 32 in all."""
    one_width, steps = run(96, monkeypatch)
    assert set(steps) == {24}
    tokens, steps = run(8, monkeypatch)
    assert tokens == one_width
    grown = steps.index(24)
    assert 0 < grown < len(steps) - 1
    assert steps == [8] * grown + [24] * (len(steps) - grown)


def test_a_prompt_of_one_token_is_no_prompt_only() -> None:
    """Its one query token is decode's, whatever it is called."""
    buckets = Buckets.for_limits(4, 32, 8, specialised=True)
    kind = {"is_decode": False}
    assert not buckets.pick(9, 2, 3, **kind, has_decodes=False).has_decodes
    assert buckets.pick(9, 2, 3, **kind, has_decodes=True).has_decodes
    assert buckets.pick(9, 2, 3, **kind, has_decodes=False, is_full=True).has_decodes


def test_variants_are_few_and_each_step_fits_one() -> None:
    looking = Buckets.for_limits(256, 8192, 512)
    others = Buckets.for_limits(256, 8192, 512, specialised=True)
    assert others.decode_seqs == (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256)
    assert len(others.all()) < 1.2 * len(looking.all())
    extra = set(others.all()) - set(looking.all())
    num_decode = len(others.decode_seqs) * len(others.table_widths)
    assert sum(not bucket.filters for bucket in extra) == num_decode
    few = len(looking.mixed_tokens) * len(looking.table_widths)
    assert sum(not bucket.has_decodes for bucket in extra) == few
    for filters in (False, True):
        best = others.pick(3, 3, 9, is_decode=True, filters=filters)
        assert best in others.all()
        fits = others.holding(3, 3, 9, is_decode=True, filters=filters)
        assert all(bucket.filters or not filters for bucket in fits)
        assert best in fits


@pytest.mark.parametrize(
    ("options", "has_logprobs"),
    [
        ({}, True),
        ({"deterministic": True}, True),
        ({"compile_ahead": True}, False),
        ({"bundle": "folder"}, False),
        ({"compile_ahead": True, "token_logprobs": True}, True),
        ({"token_logprobs": False}, False),
    ],
)
def test_who_has_programs_for_the_logprobs_of_tokens(
    options: dict[str, Any], has_logprobs: bool
) -> None:
    buckets = buckets_for(EngineConfig("m", **options), 40, "cpu", ())
    assert any(bucket.has_logprobs for bucket in buckets.all()) == has_logprobs


@pytest.mark.parametrize(
    "options",
    [{}, {"specialised": True, "shares_prefix": True}, {"deterministic": True}, {"num_drafts": 2}],
)
def test_each_plain_shape_has_one_with_logprobs(options: dict[str, Any]) -> None:
    without = Buckets.for_limits(64, 512, 40, num_steps=4, **options)
    buckets = dataclasses.replace(without, has_logprobs=True)
    every = buckets.all()
    assert len(every) == len(set(every))
    new = set(every) - set(without.all())
    plain = {bucket for bucket in without.all() if not bucket.is_full}
    assert new == {dataclasses.replace(bucket, has_logprobs=True) for bucket in plain}
    assert {bucket for bucket in every if bucket.is_common} == plain
    for is_decode in (True, False):
        kind = {"is_decode": is_decode, "filters": False, "shares_prefix": is_decode}
        step = (20, 20 if is_decode else 3, 9)
        best = buckets.pick(*step, **kind, has_logprobs=True)
        assert best in new
        assert dataclasses.replace(best, has_logprobs=False) == without.pick(*step, **kind)
        fits = buckets.holding(*step, **kind, has_logprobs=True)
        assert best in fits
        assert all(bucket.has_logprobs for bucket in fits)
        # Who asks for none may have them, and rather does without.
        fits = buckets.holding(*step, **kind)
        assert fits[0] == without.holding(*step, **kind)[0]
        assert best in fits
        full = buckets.pick(*step, **kind, is_full=True, has_logprobs=True)
        assert full == without.pick(*step, **kind, is_full=True)
        assert full in buckets.holding(*step, **kind, is_full=True, has_logprobs=True)
    if buckets.num_drafts:
        best = buckets.pick(20, 3, 9, is_decode=False, has_drafts=True, has_logprobs=True)
        assert best in new


def test_few_sizes_share_a_prefix() -> None:
    buckets = Buckets.for_limits(256, 8192, 512, specialised=True, shares_prefix=True)
    assert buckets.sharing_seqs == (16, 64, 256)
    assert Buckets.for_limits(48, 512, 8, shares_prefix=True).sharing_seqs == (12, 48)
    assert Buckets.for_limits(7, 512, 8, shares_prefix=True).sharing_seqs == ()
    assert Buckets.for_limits(256, 8192, 512, specialised=True).sharing_seqs == ()
    every = buckets.all()
    assert len(every) == len(set(every))
    sharing = [bucket for bucket in every if bucket.shares_prefix]
    assert len(sharing) == 3 * len(buckets.table_widths)
    assert all(b.is_decode and b.filters and not b.is_full for b in sharing)
    for count in (8, 17, 200):
        step = (count, count, 9)
        best = buckets.pick(*step, is_decode=True, filters=False, shares_prefix=True)
        assert best in sharing
        fits = buckets.holding(*step, is_decode=True, filters=False, shares_prefix=True)
        assert best in fits
        without = buckets.pick(*step, is_decode=True, filters=False)
        assert without in fits  # until the best is compiled
        alone = buckets.holding(*step, is_decode=True, filters=False)
        assert without in alone
        assert not any(bucket.shares_prefix for bucket in alone)
    assert not buckets.pick(9, 9, 9, is_decode=True, is_full=True, shares_prefix=True).shares_prefix
    few = Buckets.for_limits(4, 32, 8, shares_prefix=True)
    assert not few.pick(4, 4, 3, is_decode=True, shares_prefix=True).shares_prefix
