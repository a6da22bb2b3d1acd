"""Prefixes that many sequences share: how they are found, and steps that read them at once."""

from typing import Any, NamedTuple

import numpy as np
import pytest

from pallas_paged.engine import LLM, SamplingParams
from pallas_paged.engine.config import EngineConfig
from pallas_paged.engine.core import shared_prefix
from pallas_paged.engine.core.buckets import Bucket
from pallas_paged.engine.core.shared_prefix import PrefixFinder, find_prefix
from pallas_paged.engine.core.step_inputs import packed_size, views
from pallas_paged.engine.resolved import resolve_cascade
from tests.engine.serving import assert_idle, make_llm, nothing_compiles


@pytest.fixture(autouse=True)
def little_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_prefix, "MIN_SAVED", 1)


# ---- how they are found ------------------------------------------------------------------------


def tables_of(*rows: tuple[int, int]) -> np.ndarray:
    """Returns i32[R, 64]: of each row the prefix that it has, by number, and its length.

    The blocks behind it are the row's own, and those of prefix 0, of none.
    """
    tables = 10_000 + np.arange(len(rows) * 64, dtype=np.int32).reshape(len(rows), 64)
    for row, (number, length) in enumerate(rows):
        tables[row, :length] = number * 100 + np.arange(1, length + 1)
    return tables


def found(tables: np.ndarray, whole: Any = 64) -> tuple[int, list[int]] | None:
    """Returns the prefix's length, and who has it."""
    rows = np.arange(len(tables))
    prefix = find_prefix(tables, rows, np.broadcast_to(whole, len(tables)))
    if prefix is None:
        return None
    members = np.flatnonzero(prefix.is_shared)
    first = tables[prefix.row, : prefix.num_blocks]
    assert (tables[members, : prefix.num_blocks] == first).all()
    return prefix.num_blocks, members.tolist()


def test_eight_sequences_with_eight_blocks() -> None:
    assert found(tables_of(*[(1, 8)] * 8)) == (8, list(range(8)))
    assert found(tables_of(*[(1, 8)] * 7)) is None
    assert found(tables_of(*[(1, 7)] * 8)) is None
    assert found(tables_of(*[(1, 64)] * 8)) == (64, list(range(8)))
    assert found(tables_of((1, 20), *[(1, 30)] * 7)) == (20, list(range(8)))


def test_what_is_saved_has_to_be_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_prefix, "MIN_SAVED", 256)
    assert found(tables_of(*[(1, 32)] * 8)) is None
    assert found(tables_of(*[(1, 37)] * 8)) == (37, list(range(8)))
    assert found(tables_of(*[(1, 9)] * 28)) is None
    assert found(tables_of(*[(1, 9)] * 30)) == (9, list(range(30)))


def test_others_run_beside_them() -> None:
    rows = [(0, 0), *[(2, 30)] * 4, (0, 0), (3, 30), *[(2, 30)] * 5, (0, 0)]
    assert found(tables_of(*rows)) == (30, [1, 2, 3, 4, 7, 8, 9, 10, 11])


def test_the_one_that_saves_the_most() -> None:
    few_long, many_short = [(1, 60)] * 8, [(2, 9)] * 20
    assert found(tables_of(*few_long, *many_short)) == (60, list(range(8)))
    assert found(tables_of(*[(1, 9)] * 8, *many_short)) == (9, list(range(8, 28)))


def test_some_share_more_than_all() -> None:
    """Of 24 that have 10 blocks in common, 9 go on together; 23 x 10 is less than 8 x 50."""
    tables = tables_of(*[(1, 10)] * 15, *[(1, 50)] * 9)
    assert found(tables) == (50, list(range(15, 24)))
    tables = tables_of(*[(1, 10)] * 60, *[(1, 50)] * 9)
    assert found(tables) == (10, list(range(69)))


def test_blocks_in_front_of_the_next_token_alone() -> None:
    tables = tables_of(*[(1, 40)] * 9)
    assert found(tables, whole=40) == (40, list(range(9)))
    assert found(tables, whole=[40] * 8 + [3]) == (40, list(range(8)))
    assert found(tables, whole=[40] * 8 + [11]) == (40, list(range(8)))
    assert found(tables, whole=[40] * 7 + [11] * 2) == (11, list(range(9)))
    assert found(tables, whole=7) is None


def test_the_null_block_is_no_prefix() -> None:
    """It stands for blocks that have left every window."""
    tables = tables_of(*[(1, 40)] * 9)
    tables[:, :2] = 0
    assert found(tables) is None
    tables = tables_of(*[(0, 0)] * 9)
    tables[:, :30] = 0
    assert found(tables) is None


def test_equal_blocks_behind_different_ones() -> None:
    tables = tables_of(*[(1, 40)] * 9)
    tables[4, 2] = 7
    assert found(tables) is None


class Tables(NamedTuple):
    """What the finder reads of a memory."""

    tables: np.ndarray
    versions: np.ndarray
    block_size: int = 4


class Step(NamedTuple):
    """What it reads of a batch."""

    rows: np.ndarray
    numbers: np.ndarray
    starts: np.ndarray


def test_looks_at_what_has_changed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    search = find_prefix

    def count(*args: Any) -> Any:
        calls.append(1)
        return search(*args)

    monkeypatch.setattr(shared_prefix, "find_prefix", count)
    memory: Any = Tables(tables_of(*[(1, 20)] * 9, (0, 0)), np.zeros(10, np.int64))
    finder = PrefixFinder(memory)

    def length(rows: np.ndarray, numbers: Any, start: int) -> int:
        step: Any = Step(rows, np.asarray(numbers), np.full(len(rows), start))
        prefix = finder.find(step)
        return 0 if prefix is None else prefix.num_blocks

    rows, numbers = np.arange(10), np.arange(10)
    assert [length(rows, numbers, start) for start in (80, 81, 90)] == [20] * 3
    assert len(calls) == 1
    memory.versions[3] += 1  # it has begun a block of its own
    memory.tables[3, 20] = 7
    assert length(rows, numbers, 91) == 20
    assert len(calls) == 1
    memory.versions[3] += 1  # a block of the prefix has been copied for it
    memory.tables[3, 15] = 8
    assert length(rows, numbers, 92) == 20
    assert len(calls) == 2
    assert not finder.find(Step(rows, numbers, np.full(10, 93))).is_shared[3]  # type: ignore
    assert length(rows[1:], numbers[1:], 93) == 15  # seven have 20, and that one has 15 of them
    assert length(rows, numbers, 94) == 20
    assert length(rows, numbers[::-1], 95) == 20  # others in the same rows
    assert len(calls) == 5
    assert length(rows, numbers, 50) == 12  # of what is shared, 12 blocks are before the token


def test_a_prefix_that_comes_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that repeat others are replaced by those while their sequences run."""
    memory: Any = Tables(tables_of(*[(0, 0)] * 9), np.zeros(9, np.int64))
    finder = PrefixFinder(memory)
    step: Any = Step(np.arange(9), np.arange(9), np.full(9, 90))
    assert finder.find(step) is None
    memory.tables[:, :20] = memory.tables[0, :20]
    memory.versions[1:] += 1
    found_now = finder.find(step)
    assert found_now is not None
    assert found_now.num_blocks == 20


# ---- steps -------------------------------------------------------------------------------------

OPTIONS: dict[str, Any] = {
    "max_num_seqs": 16,
    "block_size": 4,
    "max_num_batched_tokens": 64,
    "num_scheduler_steps": 1,
}
MODEL = "llama-mqa-linear"
COMMON = np.random.default_rng(1).integers(3, 60, 50).tolist()


def prompts_of(count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    rng = np.random.default_rng(seed)
    return [
        {"prompt_token_ids": COMMON + rng.integers(3, 60, 3 + i % 4).tolist()} for i in range(count)
    ]


def both(**options: Any) -> tuple[LLM, LLM]:
    """Returns an engine that reads shared prefixes at once, and one that does not."""
    on, off = (
        make_llm(MODEL, **OPTIONS | {"disable_cascade_attn": disabled} | options)
        for disabled in (False, True)
    )
    return on, off


def tokens_of(llm: LLM, prompts: Any, params: Any) -> list[list[tuple[int, ...]]]:
    llm.generate(prompts_of(1), SamplingParams(max_tokens=1))  # so that the prefix is cached
    done = llm.generate(prompts, params)
    assert_idle(llm)
    return [[tuple(one.token_ids) for one in request.outputs] for request in done]


def sharing(ran: list[Bucket]) -> int:
    return sum(bucket.shares_prefix for bucket in ran)


@pytest.mark.parametrize(
    "options",
    [
        {"attention_implementation": "xla"},
        {"num_scheduler_steps": 4, "kv_cache_dtype": "int8"},
    ],
    ids=str,
)
def test_the_same_tokens(options: dict[str, Any], ran: list[Bucket]) -> None:
    params = [
        SamplingParams(temperature=i % 2, top_p=0.9, seed=i, max_tokens=20 + i, ignore_eos=True)
        for i in range(14)
    ]
    on, off = both(**options)
    found_on = tokens_of(on, prompts_of(14), params)
    assert sharing(ran) >= (20 if options.get("num_scheduler_steps") is None else 4)
    ran.clear()
    assert found_on == tokens_of(off, prompts_of(14), params)
    assert not sharing(ran)


def test_samples_of_one_prompt(ran: list[Bucket]) -> None:
    params = SamplingParams(n=9, seed=3, max_tokens=12, ignore_eos=True)
    on, off = both()
    found_on = tokens_of(on, prompts_of(1), params)
    assert sharing(ran) >= 8
    assert found_on == tokens_of(off, prompts_of(1), params)


def test_others_beside_them_that_come_and_go(ran: list[Bucket]) -> None:
    rng = np.random.default_rng(5)
    prompts = prompts_of(20)
    for place in range(0, 20, 3):
        prompts[place] = {"prompt_token_ids": rng.integers(3, 60, 5 + place).tolist()}
    params = [
        SamplingParams(temperature=0, max_tokens=4 + 3 * (i % 5), ignore_eos=True)
        for i in range(20)
    ]
    on, off = both()
    found_on = tokens_of(on, prompts, params)
    assert sharing(ran) >= 3
    assert any(bucket.is_decode and not bucket.shares_prefix for bucket in ran)
    assert found_on == tokens_of(off, prompts, params)


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_too_little_memory(mode: str, ran: list[Bucket]) -> None:
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    options = {"num_blocks": 90, "swap_space": float(mode == "swap"), "preemption_mode": mode}
    on, off = both(**options)
    found_on = tokens_of(on, prompts_of(16), params)
    assert sharing(ran) >= 5
    assert on.engine.core.scheduler.num_preemptions > 0
    assert found_on == tokens_of(off, prompts_of(16), params)


def test_full_steps_and_few_sequences_have_none(ran: list[Bucket]) -> None:
    on, _ = both()
    tokens_of(on, prompts_of(12), SamplingParams(max_tokens=6, ignore_eos=True, logprobs=1))
    tokens_of(on, prompts_of(7), SamplingParams(max_tokens=6, ignore_eos=True))
    assert not sharing(ran)


def test_all_is_compiled_ahead() -> None:
    on, _ = both(num_scheduler_steps=4)
    on.warm_up()
    with nothing_compiles(on.runner):
        tokens_of(on, prompts_of(12), SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))


def test_its_place_in_the_inputs() -> None:
    bucket = Bucket(16, 16, 32, True, shares_prefix=True)
    plain = Bucket(16, 16, 32, True)
    assert packed_size(bucket) == packed_size(plain) + 18
    x = views(np.zeros(packed_size(bucket), np.int32), bucket)
    assert x.prefix is not None
    assert x.prefix.shares_prefix.shape == (16,)
    assert views(np.zeros(packed_size(plain), np.int32), plain).prefix is None
    assert str(bucket).endswith(", sharing a prefix")


def test_who_has_it() -> None:
    for disabled, platform, expected in (
        (None, "gpu", True),
        (None, "cpu", False),
        (False, "cpu", True),
        (True, "gpu", False),
    ):
        assert (
            resolve_cascade(EngineConfig("x", disable_cascade_attn=disabled), platform) == expected
        )
        config = EngineConfig("x", disable_cascade_attn=disabled, deterministic=True)
        assert not resolve_cascade(config, platform)
    with pytest.raises(ValueError, match="disable_cascade_attn='no' must be True, False or None"):
        EngineConfig("x", disable_cascade_attn="no")  # type: ignore
