"""Where every layer has a sliding window, sequences give back the blocks that have left it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_paged.engine import LLM, BeamSearchParams, SamplingParams
from pallas_paged.engine.core.entries import repeated_blocks
from pallas_paged.engine.core.request import SequenceGroup
from pallas_paged.engine.core.row_columns import Progress, RowColumns
from pallas_paged.engine.kv.host_pool import DROPPED
from pallas_paged.engine.kv.sharing import most_blocks
from tests.engine.mock_model import generate_alone, make_engine
from tests.engine.serving import assert_idle, make_llm

BLOCK_SIZE, WINDOW = 4, 7  # the model's
GREEDY = SamplingParams(temperature=0, max_tokens=14, ignore_eos=True)
SAMPLED = dataclasses.replace(GREEDY, temperature=1.0, seed=3, n=3)
PROMPTS = [
    {"prompt_token_ids": list(range(5 + i, 5 + i + n))}
    for i, n in enumerate((3, 18, 41, 18, 17, 18, 3, 18))
]
PARAMS = [GREEDY, SAMPLED, GREEDY, BeamSearchParams(3, 12, ignore_eos=True)] * 2


def run(*, gives_back: bool = True, **options: Any) -> tuple[list[Any], LLM, int]:
    """Returns all completions, and how many blocks were given back to nobody else.

    Such a block, and the null block, are poisoned at once.
    """
    llm = make_llm(
        "mistral-sliding",
        max_num_seqs=8,
        max_num_batched_tokens=16,
        block_size=BLOCK_SIZE,
        deterministic=True,
        **options,
    )
    memory = llm.engine.memory
    if not gives_back:
        llm.engine.core.scheduler._committer._window_blocks = None
    drop_front, num_poisoned = memory.drop_front, 0

    def drop_and_poison(num_blocks: dict[int, int]) -> None:
        nonlocal num_poisoned
        used = np.asarray(memory.state.ref_counts) > 0
        drop_front(num_blocks)
        freed = np.flatnonzero(used & (np.asarray(memory.state.ref_counts) == 0))
        num_poisoned += len(freed)
        gone = jnp.asarray([0, *freed], jnp.int32)
        llm.runner.kv_caches = jax.tree.map(
            lambda array: array.at[gone].set(jnp.nan), llm.runner.kv_caches
        )

    memory.drop_front = drop_and_poison
    outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    assert_idle(llm)
    return [[c.token_ids for c in output.outputs] for output in outputs], llm, num_poisoned


@pytest.fixture(scope="module")
def expected() -> list[Any]:
    tokens, _, num_poisoned = run(gives_back=False)
    assert num_poisoned == 0
    return tokens


@pytest.mark.parametrize(
    "options",
    [
        {"enable_prefix_caching": False},
        {},
        {"num_blocks": 18, "preemption_mode": "swap", "swap_space": 0.01},
        {"num_blocks": 18, "enable_prefix_caching": False},
    ],
    ids=["uncached", "cached", "swapped", "recomputed"],
)
def test_tokens_are_those_of_sequences_that_keep_everything(
    expected: list[Any], options: dict[str, Any]
) -> None:
    tokens, llm, num_poisoned = run(**options)
    assert tokens == expected
    assert (num_poisoned > 0) == ("enable_prefix_caching" in options or "num_blocks" in options)
    stats = llm.kv_stats()
    assert (stats.num_swaps > 0) == ("swap_space" in options)
    assert (stats.num_recomputations > 0) == (
        options.get("num_blocks") == 18 and not stats.num_swaps
    )


def test_a_sequence_holds_what_its_window_touches() -> None:
    llm = make_llm(
        "mistral-sliding",
        block_size=BLOCK_SIZE,
        enable_prefix_caching=False,
        num_scheduler_steps=1,
    )
    memory, held = llm.engine.memory, []
    append = memory.append

    def append_and_count(*args: Any) -> Any:
        copies = append(*args)
        held.append(memory.num_usable_blocks - memory.num_free_blocks)
        return copies

    memory.append = append_and_count
    llm.generate(PROMPTS[0], dataclasses.replace(GREEDY, max_tokens=80), use_tqdm=False)
    assert len(held) == 79  # no step computes the last token
    assert max(held) == most_blocks(80, WINDOW, BLOCK_SIZE) == 4


@pytest.mark.parametrize(
    ("max_len", "window", "expected"),
    [(80, None, 20), (80, 7, 4), (80, 8, 4), (80, 9, 5), (9, 7, 3)],
)
def test_the_most_blocks_of_a_sequence(max_len: int, window: int | None, expected: int) -> None:
    assert most_blocks(max_len, window, BLOCK_SIZE) == expected


def test_a_layer_that_sees_all_tokens_keeps_the_blocks_of_all() -> None:
    llm = make_llm("qwen2-sliding", block_size=BLOCK_SIZE, enable_prefix_caching=False)
    held = [
        llm.kv_stats().num_allocated_blocks
        for _ in llm.stream(PROMPTS[0], dataclasses.replace(GREEDY, max_tokens=80))
    ]
    assert max(held) == -(-(3 + 80) // BLOCK_SIZE)


@pytest.mark.parametrize("enable_prefix_caching", [False, True])
def test_a_swapped_row_comes_back_as_it_left(enable_prefix_caching: bool) -> None:
    """Without what it gave back, and with its own blocks though others like them are cached."""
    engine = make_engine(
        num_blocks=20,
        num_host_blocks=40,
        sliding_window=WINDOW,
        enable_prefix_caching=enable_prefix_caching,
    )
    group = SequenceGroup("swapped", tuple(range(14)), 20)
    engine.scheduler.add(group)
    sequence = group.sequences[0]
    while sequence.progress.num_computed < 26:
        engine.step()
    engine.drain()
    engine.scheduler._choose_recovery = lambda group: "swap"
    engine.scheduler._preempt(group)
    assert sequence.swapped_slots == (DROPPED,) * 4 + (0, 1, 2)
    engine.scheduler.check_invariants()
    step = engine.step()
    assert step is not None
    assert [np.count_nonzero(move.block_ids) for move in step.swap_ins] == [3]
    table = engine.runner.memory.tables[sequence.row]
    assert (table > 0).tolist() == [False] * 4 + [True] * 3 + [False] * 9
    engine.run()
    assert sequence.output_token_ids == generate_alone(sequence, 64, window=WINDOW)[0]


def test_blocks_behind_those_that_are_gone_are_not_taken_for_equal() -> None:
    """Two rows with the same last tokens, and other ones before, which nobody knows any more."""
    group, columns = SequenceGroup("pair", (1,), 9, num_seqs=2), RowColumns(2)
    for index, sequence in enumerate(group.sequences):
        sequence.token_ids = [index, 1, 2, 3, 4, 5]
        sequence.take_row(columns, index, Progress(6, 6, 6, 0))
    group.is_forked = True
    tables = np.array([[0, 0, 3], [0, 0, 6]], np.int32)
    assert repeated_blocks(group.placed, tables, np.zeros(7, bool), 2) == {}
    tables = np.array([[0, 2, 3], [4, 5, 6]], np.int32)  # one of them is behind
    assert repeated_blocks(group.placed, tables, np.zeros(7, bool), 2) == {}
