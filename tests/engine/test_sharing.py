"""Equal full blocks become one, and what is shared, or swapped away, comes back at any abort."""

import itertools

import numpy as np
import pytest

from benchmarks import workloads
from pallas_paged.engine.core.beam_search import BeamSearch
from pallas_paged.engine.core.entries import repeated_blocks
from pallas_paged.engine.core.policies import ChooseRecovery, always_recompute, always_swap
from pallas_paged.engine.core.request import SequenceGroup, SequenceStatus
from pallas_paged.engine.core.row_columns import Progress, RowColumns
from pallas_paged.engine.kv.stats import kv_stats
from tests.engine.mock_model import (
    VOCAB_SIZE,
    MockEngine,
    generate_alone,
    make_engine,
    search_alone,
)
from tests.engine.sharing_oracle import check_sharing

PROMPT = tuple(range(1, 11))  # two blocks of 4, and two tokens


def run(engine: MockEngine, *groups: SequenceGroup) -> list[int]:
    """Runs the groups to their ends and returns, step by step, how many blocks are in use."""
    for group in groups:
        engine.scheduler.add(group)
    memory, used = engine.scheduler.memory, []
    while engine.scheduler.has_unfinished:
        engine.step()
        engine.scheduler.check_invariants()
        check_sharing(engine.scheduler, groups)
        used.append(memory.num_usable_blocks - memory.num_free_blocks)
    engine.drain()
    engine.scheduler.check_invariants()
    for sequence in (s for group in groups for s in group.sequences):
        actual = sequence.output_token_ids, sequence.finish_reason, sequence.stop_reason
        assert actual == generate_alone(sequence, engine.scheduler.admission.max_model_len)
    return used


class TestEqualBlocks:
    def test_prompts_computed_at_the_same_time_share_them_when_they_are(self) -> None:
        engine = make_engine(enable_prefix_caching=True)
        a, b = (SequenceGroup(name, PROMPT, 4) for name in "ab")
        assert run(engine, a, b)[:2] == [6, 4]  # 2 x 3, then the full two are one's
        assert a.num_cached_tokens == b.num_cached_tokens == 0

    @pytest.mark.parametrize(
        "options",
        [{"cache_salt": "a"}, {"reads_cache": False}, {"writes_cache": False}],
        ids=lambda options: next(iter(options)),
    )
    def test_not_with_another_salt_or_without_the_cache(self, options: dict) -> None:
        engine = make_engine(enable_prefix_caching=True)
        assert run(engine, SequenceGroup("a", PROMPT, 4), SequenceGroup("b", PROMPT, 4, **options))[
            :2
        ] == [6, 6]

    @pytest.mark.parametrize("cached", [True, False])
    @pytest.mark.parametrize("reads", [True, False])
    @pytest.mark.parametrize("writes", [True, False])
    def test_completions_that_draw_the_same_share_them_in_any_case(
        self, cached: bool, reads: bool, writes: bool
    ) -> None:
        """The mock model's first two completions part at 11, 22 and 33 tokens."""
        engine = make_engine(enable_prefix_caching=cached)
        options = {"num_seqs": 2, "reads_cache": reads, "writes_cache": writes}
        group = SequenceGroup("a", PROMPT[:2], 30, **options)
        used = run(engine, group)
        first, second = (sequence.token_ids for sequence in group.sequences)
        assert first[:11] == second[:11]
        assert first[11] != second[11]
        assert max(used) == 2 * 8 - 2  # the blocks of tokens 0-3 and 4-7

    @pytest.mark.parametrize("told", [0, 1])
    def test_the_block_that_the_memory_knows_is_kept(self, told: int) -> None:
        sequences = SequenceGroup("a", PROMPT[:9], 8, num_seqs=2).sequences
        columns = RowColumns(2)
        for row, sequence in enumerate(sequences):
            sequence.take_row(columns, row, Progress(8, 8, 8, 2 if row == told else 0))
        tables = np.array([[5, 6, 1], [7, 8, 2]])
        old, kept = tables[1 - told].tolist(), tables[told].tolist()
        is_cached = np.isin(np.arange(9), kept[:2])
        repeated = repeated_blocks(sequences, tables, is_cached, 4)
        assert repeated == dict(zip(old[:2], kept[:2], strict=True))

    @pytest.mark.parametrize("ahead", [0, 1])
    def test_each_block_that_the_memory_knows_is_kept(self, ahead: int) -> None:
        """Of a sequence that is ahead, which has a new one behind it, too."""
        sequences = SequenceGroup("a", PROMPT[:13], 8, num_seqs=2).sequences
        columns = RowColumns(2)
        for row, sequence in enumerate(sequences):
            progress = Progress(12, 12, 12, 2) if row == ahead else Progress(8, 8, 8, 1)
            sequence.take_row(columns, row, progress)
        tables = np.array([[5, 6, 1], [5, 8, 2]])
        old, kept = tables[1 - ahead][1], tables[ahead][1]
        is_cached = np.isin(np.arange(9), [5, kept])
        assert repeated_blocks(sequences, tables, is_cached, 4) == {old: kept}

    def test_what_was_told_of_and_is_not_cached_gives_way(self) -> None:
        """Another request's equal block was cached, and is not any more; then came a new one."""
        sequences = SequenceGroup("a", PROMPT[:9], 8, num_seqs=2, reads_cache=False).sequences
        columns = RowColumns(2)
        for row, sequence in enumerate(sequences):
            sequence.take_row(columns, row, Progress(8, 8, 8, 2 - row))
        tables = np.array([[5, 6, 1], [5, 8, 2]])
        is_cached = np.isin(np.arange(9), [5, 8])
        assert repeated_blocks(sequences, tables, is_cached, 4) == {6: 8}

    def test_what_is_behind_an_equal_block_is_found(self) -> None:
        """The row's own block is not cached, the one in its place is."""
        engine = make_engine(enable_prefix_caching=True)
        a, b = SequenceGroup("a", PROMPT[:8], 1), SequenceGroup("b", PROMPT, 4)
        run(engine, a, b)
        again = SequenceGroup("again", b.sequences[0].token_ids[:13], 1)
        run(engine, again)
        assert again.num_cached_tokens == 12

    def test_what_a_step_in_flight_reads_is_still_there(self) -> None:
        """`b`'s step over the old block runs after its blocks were given to `c`."""
        engine = make_engine(num_blocks=8, enable_prefix_caching=True)
        a, b = (SequenceGroup(name, PROMPT[:8], 6) for name in "ab")
        c = SequenceGroup("c", tuple(range(30, 37)), 1)
        assert max(run(engine, a, b, c)) <= 7


def mixed_requests() -> list[SequenceGroup]:
    """One of each kind."""
    return [
        SequenceGroup("plain", PROMPT, 12),
        SequenceGroup("samples", PROMPT, 5, num_seqs=3),
        SequenceGroup("same prompt", PROMPT, 4),
        SequenceGroup("salted pair", PROMPT[:7], 6, num_seqs=2, cache_salt="a"),
        SequenceGroup("long", tuple(range(20, 33)), 3, writes_cache=False),
        SequenceGroup(
            "beams", PROMPT, 5, num_seqs=3, beams=BeamSearch(width=3, num_results=2, max_tokens=5)
        ),
    ]


@pytest.mark.parametrize("recovery", [always_recompute, always_swap])
def test_an_abort_at_any_step_returns_every_block(recovery: ChooseRecovery) -> None:
    """Each of the requests is aborted before each of the steps of its life."""
    statuses = set()
    for overlap, place in itertools.product((True, False), range(len(mixed_requests()))):
        for turn in itertools.count():
            status = abort_at(turn, place, overlap, recovery)
            statuses.add(status.name)
            if status is SequenceStatus.FINISHED:
                break
    swapped = {"SWAPPED"} if recovery is always_swap else set()
    assert statuses == {"WAITING", "RUNNING", "FINISHED"} | swapped


def abort_at(turn: int, place: int, overlap: bool, recovery: ChooseRecovery) -> SequenceStatus:
    """Aborts the request at `place` before a turn; returns what it was doing."""
    engine = make_engine(
        num_blocks=13,
        max_num_batched_tokens=8,
        enable_prefix_caching=True,
        num_host_blocks=24,
        choose_recovery=recovery,
    )
    groups = mixed_requests()
    for group in groups:
        engine.scheduler.add(group)
    for _ in range(turn):
        engine.step(overlap)
    victim, memory = groups[place], engine.scheduler.memory
    status = victim.status
    rows = [s.row for s in victim.live if s.row is not None]
    engine.scheduler.abort(victim.request_id)
    engine.scheduler.check_invariants()
    check_sharing(engine.scheduler, groups)
    assert not memory.state.seq_lens[rows].any()
    engine.run(overlap)
    engine.scheduler.check_invariants()
    assert memory.num_free_blocks == memory.num_usable_blocks
    assert engine.scheduler.host_pool.num_used == 0
    for group in groups:
        if group.beams is not None and group is not victim:
            tokens = [ended.tokens for ended in search_alone(group)]
            assert [tuple(s.output_token_ids) for s in group.sequences] == tokens
        elif group is not victim:
            for sequence in group.sequences:
                assert sequence.output_token_ids == generate_alone(sequence, 64)[0]
    return status


def test_a_full_pool_holds_hardly_anything_but_tokens() -> None:
    """Lengths as ShareGPT's, blocks of 16: the paper's Fig. 2, and its figure for paging."""
    requests = workloads.draw(
        "sharegpt", 40, scale=1.0, max_model_len=2048, vocab_size=VOCAB_SIZE, seed=0
    ).requests
    engine = make_engine(
        num_blocks=257, block_size=16, max_num_seqs=64, max_model_len=2048, watermark_blocks=None
    )
    scheduler, memory = engine.scheduler, engine.runner.memory
    for i, (prompt, num_output_tokens) in enumerate(requests):
        scheduler.add(SequenceGroup(str(i), prompt, num_output_tokens))
    num_tokens = num_slots = 0
    while scheduler.has_unfinished:
        step = scheduler.schedule()
        stats = kv_stats(memory, scheduler)
        if stats.num_allocated_blocks >= 0.9 * stats.num_blocks:
            num_tokens += stats.num_token_slots
            num_slots += stats.num_allocated_blocks * 16
        if step is not None:
            scheduler.commit(step, [0] * len(step.scheduled))
    assert num_slots > 1000 * 256, "the pool was never full"
    assert 0.963 <= num_tokens / num_slots < 1
