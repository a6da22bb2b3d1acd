"""Blocks that outlive their request: found by tokens, evicted leaf first, kept by pins."""

import dataclasses

import numpy as np
import pytest

from pallas_paged.engine import SamplingParams
from pallas_paged.engine.core.request import SequenceGroup, TokenSequence
from pallas_paged.engine.kv.prefix_cache import PrefixCache
from pallas_paged.engine.kv.sharing import FullBlocks
from tests.engine.mock_model import (
    VOCAB_SIZE,
    MockEngine,
    generate_alone,
    make_engine,
    make_mock_llm,
)
from tests.engine.serving import assert_idle, make_llm

PROMPT = tuple(range(1, 15))  # three blocks of 4, and two tokens


def run(engine: MockEngine, prompt: tuple[int, ...] = PROMPT, **options) -> SequenceGroup:
    """Runs a request to its end and checks that it got the tokens of a cold run."""
    group = SequenceGroup(f"request-{next(engine.scheduler._step_ids)}", prompt, 3, **options)
    engine.scheduler.add(group)
    while engine.scheduler.has_unfinished:
        engine.step()
        engine.scheduler.check_invariants()
    engine.drain()
    engine.scheduler.check_invariants()
    for sequence in group.sequences:
        assert_cold(engine, sequence)
    return group


def assert_cold(engine: MockEngine, sequence: TokenSequence) -> None:
    actual = sequence.output_token_ids, sequence.finish_reason, sequence.stop_reason
    assert actual == generate_alone(sequence, engine.scheduler.admission.max_model_len)


def cached_engine(**options) -> MockEngine:
    return make_engine(enable_prefix_caching=True, **options)


def test_what_has_left_a_window_is_found_until_its_memory_is_needed() -> None:
    engine = cached_engine(num_blocks=10, sliding_window=4)
    memory = engine.runner.memory
    long = SequenceGroup("long", PROMPT, 14)
    engine.scheduler.add(long)
    while long.sequences[0].progress.num_computed < 17:
        engine.step()
        engine.scheduler.check_invariants()
    row = long.sequences[0].row
    assert np.flatnonzero(memory.tables[row]).tolist() == [3, 4]  # of which 3 is full
    assert (memory.num_free_blocks, int(memory.state.num_free)) == (7, 4)

    again = SequenceGroup("again", PROMPT, 1)  # finds what the other one has given back
    engine.scheduler.add(again)
    engine.step()
    engine.drain()
    assert again.num_cached_tokens == 12
    engine.scheduler.check_invariants()

    other = SequenceGroup("other", tuple(range(30, 53)), 1)  # takes 6 blocks
    engine.scheduler.add(other)
    engine.step()
    engine.scheduler.check_invariants()
    assert len(memory.match(PROMPT, None)) == 1
    assert not memory.prefix_cache.is_cached[memory.tables[row]].any()
    engine.run()
    assert engine.scheduler.num_preemptions == 0
    for group in (long, again, other):
        sequence = group.sequences[0]
        tokens, *_ = generate_alone(sequence, engine.scheduler.admission.max_model_len, window=4)
        assert sequence.output_token_ids == tokens
    assert memory.num_free_blocks == memory.num_usable_blocks


class TestHits:
    def test_the_second_request_computes_what_is_new(self) -> None:
        engine = cached_engine()
        assert run(engine).num_cached_tokens == 0
        group = SequenceGroup("again", PROMPT, 3)
        engine.scheduler.add(group)
        step = engine.step()
        assert step is not None
        assert [(s.start, s.num_tokens) for s in step.scheduled] == [(12, 2)]
        engine.run()
        assert group.num_cached_tokens == 12
        assert_cold(engine, group.sequences[0])

    def test_the_last_token_is_always_computed(self) -> None:
        engine = cached_engine()
        run(engine, PROMPT[:12])
        assert run(engine, PROMPT[:12]).num_cached_tokens == 8
        assert run(engine, PROMPT[:13]).num_cached_tokens == 12

    def test_a_different_token_ends_the_hit(self) -> None:
        engine = cached_engine()
        run(engine)
        for place, hit in ((0, 0), (3, 0), (4, 4), (11, 8), (12, 12)):
            other = (*PROMPT[:place], 60, *PROMPT[place + 1 :])
            assert run(engine, other).num_cached_tokens == hit

    def test_output_tokens_are_found_too(self) -> None:
        engine = cached_engine()
        first = run(engine)
        longer = (*PROMPT, *first.sequences[0].output_token_ids, 5)
        assert run(engine, longer).num_cached_tokens == 16

    def test_several_completions_start_from_a_hit(self) -> None:
        engine = cached_engine()
        run(engine)
        assert run(engine, num_seqs=5).num_cached_tokens == 12

    def test_salts_and_opting_out(self) -> None:
        engine = cached_engine()
        run(engine, writes_cache=False)
        assert run(engine).num_cached_tokens == 0
        assert run(engine, reads_cache=False).num_cached_tokens == 0
        assert run(engine, cache_salt="a").num_cached_tokens == 0
        assert run(engine, cache_salt="a").num_cached_tokens == 12
        assert run(engine, cache_salt="b").num_cached_tokens == 0
        assert run(engine).num_cached_tokens == 12

    def test_nothing_past_the_committed_length_is_cached(self) -> None:
        """The token that ends a request has a step in flight behind it, which computes it."""
        engine = cached_engine()
        group = run(engine, PROMPT[:6])  # 9 tokens with the output; 8 are computed and committed
        tokens = group.sequences[0].token_ids
        assert len(tokens) == 9
        assert len(engine.scheduler.memory.prefix_cache) == 2
        engine = cached_engine()
        group = run(engine, PROMPT[:5])  # 8 tokens; the last was never committed
        assert len(engine.scheduler.memory.prefix_cache) == 1

    def test_what_a_preempted_request_finds_again_is_not_counted(self) -> None:
        engine = cached_engine(num_blocks=8)
        groups = [SequenceGroup(str(i), tuple(range(i, i + 9)), 8) for i in (1, 20)]
        for group in groups:
            engine.scheduler.add(group)
        starts = []
        while engine.scheduler.has_unfinished:
            step = engine.step()
            shares = step.scheduled if step is not None else ()
            starts += [s.start for s in shares if s.sequence.group is groups[1]]
        assert groups[1].num_preemptions == 1
        assert sorted(starts) != starts  # it began again, and not from the first token
        assert starts.count(0) == 1
        assert [group.num_cached_tokens for group in groups] == [0, 0]
        assert engine.scheduler.memory.prefix_cache.num_queried_tokens == 18

    def test_an_error_forgets_everything(self) -> None:
        engine = cached_engine()
        run(engine)
        assert engine.scheduler.pin(PROMPT, None)
        engine.scheduler.abort_all()
        engine.scheduler.check_invariants()
        assert run(engine).num_cached_tokens == 0


class TestPins:
    def test_a_pinned_prefix_survives_pressure_and_others_do_not(self) -> None:
        engine = cached_engine(num_blocks=12)
        run(engine)
        other = tuple(range(30, 44))
        run(engine, other)
        assert engine.scheduler.pin(PROMPT[:12], None)
        for begin in (15, 20, 25):
            run(engine, tuple(range(begin, begin + 25)))
        assert run(engine).num_cached_tokens == 12
        assert run(engine, other).num_cached_tokens == 0
        assert engine.scheduler.unpin(PROMPT[:12], None)
        assert not engine.scheduler.unpin(PROMPT[:12], None)
        engine.scheduler.check_invariants()
        for begin in (15, 20, 25):
            run(engine, tuple(range(begin, begin + 25)))
        assert run(engine).num_cached_tokens < 12

    def test_what_is_not_cached_cannot_be_pinned(self) -> None:
        engine = cached_engine()
        assert not engine.scheduler.pin(PROMPT, None)
        run(engine)
        assert not engine.scheduler.pin(PROMPT, "salt")

    def test_requests_that_do_not_fit_beside_a_pin_are_refused(self) -> None:
        engine = cached_engine(num_blocks=9)
        run(engine)
        assert engine.scheduler.pin(PROMPT, None)
        with pytest.raises(ValueError, match="has 5 besides 3 pinned for other prompts"):
            engine.scheduler.add(SequenceGroup("big", tuple(range(30, 50)), 4))
        run(engine, (*PROMPT, *range(14)))  # 8 blocks, of which 3 are the pinned ones

    def test_a_pin_that_would_starve_an_admitted_request_is_refused(self) -> None:
        engine = cached_engine(num_blocks=9)
        run(engine)
        big = SequenceGroup("big", tuple(range(30, 50)), 4)
        engine.scheduler.add(big)
        with pytest.raises(ValueError, match="pinning 3 blocks would leave too few of 8"):
            engine.scheduler.pin(PROMPT, None)
        engine.run()
        assert_cold(engine, big.sequences[0])
        engine.scheduler.check_invariants()


class TestEviction:
    def enter(
        self, cache: PrefixCache, blocks: list[int], tokens: list[int], merges: bool = False
    ) -> list[int]:
        full = FullBlocks(0, tokens, 0, len(blocks), None, merges)
        entered, self.replaced = cache.enter(full, blocks)
        return entered

    def test_least_recently_used_first_and_leaves_before_what_they_stand_on(self) -> None:
        cache = PrefixCache(10, 2)
        refs = np.ones(10, np.int32)
        assert self.enter(cache, [3, 4, 5], [1, 2, 3, 4, 5, 6]) == [3, 4, 5]
        assert self.enter(cache, [3, 6], [1, 2, 7, 8]) == [6]
        assert self.enter(cache, [7], [9, 9]) == [7]
        cache.touch([5])
        assert cache.evict(2, refs) == [6, 7]
        cache.check_invariants()
        assert cache.evict(3, refs) == [5, 4, 3]
        assert len(cache) == 0
        cache.check_invariants()

    def test_blocks_in_use_and_kept_ones_stay(self) -> None:
        cache = PrefixCache(10, 1)
        self.enter(cache, [1, 2], [5, 6])
        self.enter(cache, [3], [7])
        refs = np.ones(10, np.int32)
        refs[[1, 2]] = 2
        assert np.flatnonzero(cache.evictable(refs)).tolist() == [3]
        refs[2] = 1
        assert cache.evict(1, refs, keep=[2]) == [3]

    def test_blocks_before_others_in_use_go_last_and_take_those_along(self) -> None:
        cache = PrefixCache(12, 1)
        self.enter(cache, [1, 2, 3, 4], [5, 6, 7, 8])
        self.enter(cache, [1, 2, 9], [5, 6, 1])
        self.enter(cache, [7, 8], [2, 3])
        refs = np.ones(12, np.int32)
        refs[[3, 4, 8]] = 2  # rows have given back 1 and 2, and 7
        cache.touch([7])
        assert np.flatnonzero(cache.evictable(refs)).tolist() == [1, 2, 7, 9]
        assert cache.evict(1, refs) == [9]
        assert sorted(cache.evict(1, refs)) == [2, 3, 4]  # 2 before 1, before which nobody stands
        cache.check_invariants()
        assert cache.match([5, 6], None, 2) == [1]
        assert cache.evict(2, refs) == [1, 8, 7]
        assert len(cache) == 0

    def test_a_row_goes_on_behind_a_block_that_is_forgotten(self) -> None:
        cache = PrefixCache(10, 1)
        self.enter(cache, [1, 2], [5, 6], merges=True)
        refs = np.ones(10, np.int32)
        refs[2] = 2
        assert sorted(cache.evict(1, refs)) == [1, 2]
        assert cache.enter(FullBlocks(0, [5, 6, 7], 2, 3, None, True), [2, 3]) == ([], {})
        cache.check_invariants()

    def test_equal_hashes_of_different_tokens_are_no_hit(self) -> None:
        cache = PrefixCache(10, 1)
        zero = 2**61 - 1  # Python's hash of it is 0
        assert hash((None, (zero,))) == hash((None, (0,)))
        self.enter(cache, [1], [0])
        assert cache.match([zero], None, 1) == []
        assert cache.match([0], None, 1) == [1]

    def test_what_was_found_before_is_brought_up_to_date(self) -> None:
        cache, known = PrefixCache(10, 1), []
        refs = np.ones(10, np.int32)
        tokens = [5, 6, 7, 8]
        assert cache.match(tokens, "s", 4, known) == []
        full = FullBlocks(0, tokens, 0, 3, "s", False)
        cache.enter(full, [1, 2, 3])
        assert cache.match(tokens, None, 4) == []
        assert cache.match(tokens, "s", 4, known) == [1, 2, 3]
        assert cache.match(tokens, "s", 2, known) == [1, 2]
        assert cache.evict(2, refs) == [3, 2]
        assert cache.match(tokens, "s", 4, known) == [1]
        cache.enter(full._replace(end=4), [1, 4, 2, 3])  # others hold the same tokens now
        assert cache.match(tokens, "s", 4, known) == [1, 4, 2, 3]
        assert cache.evict(4, refs) == [3, 2, 4, 1]
        cache.enter(full._replace(token_ids=[6, 5, 7]), [1, 4, 2])  # and the blocks other tokens
        assert cache.match(tokens, "s", 4, known) == []
        cache.clear()
        cache.enter(full, [1, 2, 3])
        assert cache.match(tokens, "s", 4, known) == [1, 2, 3]
        cache.clear()
        assert cache.match(tokens, "s", 4, known) == []

    def test_a_second_copy_and_what_is_behind_it_are_not_entered(self) -> None:
        cache = PrefixCache(10, 1)
        assert self.enter(cache, [1, 2], [5, 6]) == [1, 2]
        assert self.enter(cache, [3, 4, 5], [5, 6, 7]) == []
        assert self.enter(cache, [1, 2, 5], [5, 6, 7]) == [5]
        assert self.replaced == {}

    def test_a_row_that_merges_takes_the_first_copy_and_goes_on_behind_it(self) -> None:
        cache = PrefixCache(10, 1)
        assert self.enter(cache, [1, 2], [5, 6], merges=True) == [1, 2]
        assert self.enter(cache, [3, 4, 5], [5, 6, 7], merges=True) == [5]
        assert self.replaced == {3: 1, 4: 2}
        cache.check_invariants()


def test_a_prefix_that_cannot_be_computed_is_not_tried_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm = make_mock_llm(enable_prefix_caching=True)
    runner = llm.engine.core.executor
    collect = runner.collect
    no_token = np.array([[VOCAB_SIZE]])  # the logits are not finite
    monkeypatch.setattr(runner, "collect", lambda step: collect(step)._replace(tokens=no_token))
    with pytest.raises(RuntimeError, match="was not computed: logits are not finite"):
        llm.pin_prefix({"prompt_token_ids": PROMPT})
    monkeypatch.undo()
    assert llm.pin_prefix({"prompt_token_ids": PROMPT}) == 12


def test_an_engine_finds_pins_and_reports() -> None:
    llm = make_llm(
        "llama-mha-tied",
        max_num_seqs=4,
        max_num_batched_tokens=32,
        block_size=4,
        num_blocks=60,
        deterministic=True,
    )
    greedy = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    system = list(range(5, 25))
    prompts = [{"prompt_token_ids": [*system, 30 + i]} for i in range(4)]
    skipping = dataclasses.replace(
        greedy, skip_reading_prefix_cache=True, skip_writing_prefix_cache=True
    )
    cold = llm.generate(prompts, skipping, use_tqdm=False)
    assert [output.num_cached_tokens for output in cold] == [0] * 4
    assert llm.kv_stats().num_cached_blocks == 0
    assert llm.pin_prefix({"prompt_token_ids": system}) == 20
    warm = llm.generate(prompts, greedy, use_tqdm=False)
    assert [output.num_cached_tokens for output in warm] == [20] * 4
    assert [o.outputs[0].token_ids for o in warm] == [o.outputs[0].token_ids for o in cold]
    salted = llm.generate([p | {"cache_salt": "x"} for p in prompts], greedy, use_tqdm=False)
    assert salted[0].num_cached_tokens == 0
    assert_idle(llm)
    stats = llm.kv_stats()
    assert (stats.num_allocated_blocks, stats.num_pinned_blocks) == (0, 5)
    assert stats.num_cached_blocks + stats.num_free_blocks == stats.num_blocks == 59
    assert 0 < stats.num_hit_tokens < stats.num_queried_tokens
    llm.unpin_prefix({"prompt_token_ids": system})
    assert llm.kv_stats().num_pinned_blocks == 0
    with pytest.raises(ValueError, match="is not pinned"):
        llm.unpin_prefix({"prompt_token_ids": system})
    with pytest.raises(ValueError, match="fills no block of 4"):
        llm.pin_prefix({"prompt_token_ids": [5, 6]})
    with pytest.raises(ValueError, match="cache_salt=3 must be a string"):
        llm.generate([{"prompt_token_ids": [5], "cache_salt": 3}])
