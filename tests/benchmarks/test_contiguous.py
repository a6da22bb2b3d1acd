"""The baselines' memory keeps the scheduler's contract, and one piece per sequence."""

import collections
import random

import numpy as np
import pytest

from benchmarks import drive
from benchmarks.buddies import Buddies, order_of
from benchmarks.contiguous import RESERVES, ContiguousMemory
from benchmarks.workloads import Request, Workload
from pallas_paged.engine import SamplingParams
from pallas_paged.engine.kv.interface import Need
from pallas_paged.engine.kv.sharing import RowPlan, blocks_for
from tests.engine.serving import make_llm


def make_memory(reserve: str = "max", **sizes: int) -> ContiguousMemory:
    defaults = {"num_blocks": 30, "block_size": 4, "max_num_seqs": 8, "max_model_len": 22}
    return ContiguousMemory(**defaults | sizes, reserve=reserve)


def need(num_tokens: int, max_length: int, num_rows: int = 1) -> Need:
    return Need(blocks_for(num_tokens, 4), num_rows, num_tokens, max_length)


def plans(num_tokens: list[int], max_length: int = 0) -> list[RowPlan]:
    """Rows that share nothing; a piece has blocks of its own, whatever is named here."""
    return [RowPlan(count, (), max_length) for count in num_tokens]


def test_the_pool_is_cut_into_pieces_of_the_longest_length():
    memory = make_memory()  # 22 tokens are 6 blocks; 29 blocks hold 4 such pieces
    assert memory.max_places == 4
    assert memory.num_usable_blocks == memory.num_free_blocks == 24
    assert memory.blocks_taken(need(1, 2)) == memory.blocks_taken(need(21, 22)) == 6
    assert memory.blocks_taken(need(25, 25)) > memory.num_usable_blocks
    assert make_memory(max_num_seqs=3).max_places == 3


def test_what_is_reserved():
    """By hand, in tokens and blocks of 4: 5 tokens that will be 12, then 14."""
    for reserve, length, tokens, blocks in (
        ("max", 12, 22, 6),
        ("pow2", 12, 13, 4),  # 7 more are rounded to 8
        ("pow2", 14, 21, 8),  # 9 more to 16; 6 blocks are a piece of 8
        ("oracle", 12, 12, 4),  # 3 blocks are a piece of 4
        ("oracle", 14, 14, 4),
    ):
        memory = make_memory(reserve)
        assert memory.num_reserved_for(5, length) == tokens
        assert memory.blocks_taken(need(5, length)) == blocks
        (row,) = memory.admit(plans([5], length))
        assert memory.num_free_blocks == memory.num_usable_blocks - blocks
        assert memory.append([row], [length - 5]) is not None
    assert make_memory("pow2").num_reserved_for(5, 22) == 22  # and never more than the longest


def test_shares_add_up_to_the_pool():
    """The parts of the paper's Fig. 2, by hand: 116 slots, of which 8 + 9 tokens are computed."""
    memory = make_memory("pow2")
    rows = memory.admit(plans([8], 14) + plans([9], 10))
    shares = memory.shares(dict(zip(rows, (8, 9), strict=True)))
    reserved = (8 + 8) + (9 + 1)
    parts = [17, 24 - 17, reserved - 24, 116 - reserved]
    np.testing.assert_allclose(shares, np.array(parts) / 116)


def test_space_takes_pieces_in_their_order_and_changes_nothing():
    """29 blocks are pieces of 16, 8, 4 and 1: there is one of 16, and two of 8 beside it."""
    memory = make_memory("oracle", max_model_len=64)
    space = memory.space()
    assert space.take(need(5, 40), 0)  # 10 blocks: the piece of 16
    assert not space.take(need(5, 40), 0)
    assert space.take(need(5, 20), 0)  # 5 blocks: the piece of 8
    assert not space.take(need(5, 20), 0)
    assert not space.take(need(5, 16, num_rows=2), 0)  # one piece of 4 is left
    assert space.take(need(5, 16), 0)
    assert memory.num_free_blocks == memory.num_usable_blocks == 29
    assert memory.space().take(need(5, 40), 0)


def test_free_blocks_in_small_pieces_hold_no_long_sequence():
    """External fragmentation: 16 blocks are free, and no piece of them has more than 4."""
    memory = make_memory("oracle", num_blocks=33, max_model_len=64)
    rows = memory.admit(plans([9] * 8, 16))
    memory.free(rows[::2])
    assert memory.num_free_blocks == 16
    assert not memory.space().take(need(17, 20), 0)
    memory.free(rows[1:2])
    assert memory.space().take(need(17, 20), 0)  # buddies have become one


def test_a_short_sequence_reserves_a_whole_piece():
    memory = make_memory()
    rows = memory.admit(plans([1, 10]))
    assert rows == [0, 1]
    assert memory.num_free_blocks == 12
    assert (memory.num_tokens, memory.num_reserved_slots) == (11, 48)
    np.testing.assert_array_equal(memory.state.tables[:2].ravel(), np.arange(1, 13))
    assert memory.append([0], [23]) is not None
    assert memory.append([0, 1], [1, 1]) is None
    assert memory.num_tokens == 34
    memory.check_invariants({0: 24, 1: 10})


def test_a_pool_without_room_for_one_is_refused():
    with pytest.raises(ValueError, match="no room for one sequence of max_model_len=22"):
        make_memory(num_blocks=6)


def test_nothing_is_shared():
    memory = make_memory()
    memory.admit(plans([3]))
    with pytest.raises(NotImplementedError, match="let each sample be a request"):
        memory.fork([0])


@pytest.mark.parametrize("reserve", RESERVES)
def test_pieces_never_overlap_whatever_comes_and_goes(reserve: str):
    rng = random.Random(5)
    memory = make_memory(reserve, num_blocks=64, max_num_seqs=12)
    lens: dict[int, int] = {}
    for _ in range(300):
        if rng.random() < 0.5:
            wanted = [(rng.randint(1, 20), rng.randint(21, 22)) for _ in range(rng.randint(1, 4))]
            space = memory.space()
            taken = [pair for pair in wanted if space.take(need(*pair), 0)]
            rows = memory.admit([RowPlan(count, (), longest) for count, longest in taken])
            lens |= dict(zip(rows, (count for count, _ in taken), strict=True))
        elif lens and rng.random() < 0.5:
            rows = rng.sample(sorted(lens), rng.randint(1, len(lens)))
            memory.free(rows)
            for row in rows:
                del lens[row]
        elif lens and memory.append(list(lens), [1] * len(lens)):
            lens = {row: count + 1 for row, count in lens.items()}
        memory.check_invariants(lens)
        used = memory.state.tables[sorted(lens)].ravel()
        assert max(collections.Counter(used[used > 0].tolist()).values(), default=1) == 1
    memory.free_all()
    memory.check_invariants({})
    assert memory.num_free_blocks == memory.num_usable_blocks


def test_buddies_join_to_what_they_were():
    """Against a plain count of units: pieces never overlap, and in the end all is whole again."""
    rng = random.Random(3)
    buddies = Buddies(53)
    held: list[tuple[int, int]] = []
    for _ in range(500):
        size = rng.choice((1, 2, 3, 5, 9))
        if rng.random() < 0.55:
            begin = buddies.take(size)
            if begin is not None:
                held.append((begin, size))
        elif held:
            buddies.give_back(*held.pop(rng.randrange(len(held))))
        pieces = [(begin, 1 << order_of(size)) for begin, size in held]
        units = [unit for begin, size in pieces for unit in range(begin, begin + size)]
        assert len(set(units)) == len(units)
        assert max(units, default=0) < 53
        assert buddies.num_free == 53 - len(units)
    for begin, size in held:
        buddies.give_back(begin, size)
    assert [buddies.take(size) for size in (32, 16, 4, 1)] == [0, 32, 48, 52]
    assert buddies.num_free == 0


@pytest.fixture(scope="module")
def llm():
    return make_llm(
        "llama-mha-tied",
        max_num_seqs=6,
        max_num_batched_tokens=32,
        num_blocks=17,
        block_size=8,
        max_model_len=40,
        deterministic=True,  # one program
    )


def workload(llm, count: int) -> Workload:
    rng = np.random.default_rng(11)
    vocab_size = llm.model_config.vocab_size
    return Workload(
        [
            Request(tuple(rng.integers(0, vocab_size, 3 + 3 * i).tolist()), 2 + 3 * i)
            for i in range(count)
        ],
        "test",
    )


def test_baselines_finish_every_request(llm):
    requests = workload(llm, 6)
    wanted = [request.num_output_tokens for request in requests.requests]
    paged = drive.drive(llm.engine, requests, [0.0] * 6)
    engine, num_places = drive.baseline_engine(llm)
    continuous = drive.drive(engine, requests, [0.0] * 6)
    knowing = [
        drive.drive(drive.baseline_engine(llm, reserve)[0], requests, [0.0] * 6)
        for reserve in ("pow2", "oracle")
    ]
    engine, _ = drive.baseline_engine(llm)
    static = drive.drive(engine, requests, [0.0] * 6, static_batch_size=num_places)
    for run in (paged, continuous, static, *knowing):
        assert [len(times.token_times_s) for times in run.times] == wanted
        assert not any(times.failed for times in run.times)
        assert run.num_preemptions == 0
    assert num_places < 6
    assert continuous.peak_running == static.peak_running == num_places
    assert paged.peak_running == 6
    assert paged.kv_used_share > max(run.kv_used_share for run in (continuous, *knowing))


def test_an_engine_goes_on_after_another_one_has_used_its_device(llm):
    prompts = [
        {"prompt_token_ids": list(one.prompt_token_ids)} for one in workload(llm, 6).requests
    ]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    before, after = [], []
    for tokens in (before, after):
        llm.engine.core.reset()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        tokens += [output.outputs[0].token_ids for output in outputs]
        engine, _ = drive.baseline_engine(llm)
        for index, prompt in enumerate(prompts):
            group = engine.make_group(prompt["prompt_token_ids"], params, request_id=str(index))
            engine.add(group)
        found = {}
        while engine.has_unfinished:
            found |= {output.request_id: output.outputs[0].token_ids for output in engine.step()}
        assert [found[str(index)] for index in range(6)] == tokens
    assert before == after


def test_a_static_batch_waits_for_the_one_before(llm):
    requests = workload(llm, 6)
    engine, num_places = drive.baseline_engine(llm)
    times = drive.drive(engine, requests, [0.0] * 6, static_batch_size=num_places).times
    for start in range(num_places, 6, num_places):
        ended = max(one.token_times_s[-1] for one in times[start - num_places : start])
        assert all(one.token_times_s[0] > ended for one in times[start : start + num_places])


def test_requests_start_after_they_arrive(llm):
    llm.engine.core.reset()  # other engines have used its device
    drive.drive(llm.engine, workload(llm, 1), [0.0])  # compiles
    arrivals = [0.0, 0.0, 0.3, 0.6]
    run = drive.drive(llm.engine, workload(llm, 4), arrivals)
    assert [times.arrival_s for times in run.times] == arrivals
    assert all(times.ttft_s > 0 for times in run.times)
    assert run.duration_s > 0.6
