"""The baseline's memory keeps the scheduler's contract, and one piece per sequence."""

import collections
import random

import numpy as np
import pytest

from benchmarks import offline
from benchmarks.contiguous import ContiguousMemory
from benchmarks.workloads import Request, Workload
from pallas_paged.engine import SamplingParams
from pallas_paged.engine.kv.sharing import RowPlan
from tests.engine.serving import make_llm


def make_memory(**sizes: int) -> ContiguousMemory:
    defaults = {"num_blocks": 30, "block_size": 4, "max_num_seqs": 8, "max_model_len": 22}
    return ContiguousMemory(**defaults | sizes)


def plans(num_tokens: list[int]) -> list[RowPlan]:
    """Rows that share nothing; a place has blocks of its own, whatever is named here."""
    return [RowPlan(count, ()) for count in num_tokens]


def test_the_pool_is_cut_into_places_of_the_longest_length():
    memory = make_memory()  # 22 tokens are 6 blocks; 29 blocks hold 4 such places
    assert memory.num_places == 4
    assert memory.num_usable_blocks == memory.num_free_blocks == 24
    assert memory.blocks_taken(1, 1) == memory.blocks_taken(6, 1) == 6
    assert memory.blocks_taken(7, 1) > memory.num_usable_blocks
    assert make_memory(max_num_seqs=3).num_places == 3


def test_a_short_sequence_reserves_a_whole_place():
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


def test_places_never_overlap_whatever_comes_and_goes():
    rng = random.Random(5)
    memory = make_memory()
    lens: dict[int, int] = {}
    for _ in range(300):
        room = memory.num_free_blocks // memory.blocks_taken(1, 1)
        assert room == memory.num_places - len(lens)
        if room and rng.random() < 0.5:
            counts = [rng.randint(1, 20) for _ in range(rng.randint(1, room))]
            lens |= dict(zip(memory.admit(plans(counts)), counts, strict=True))
        elif lens and rng.random() < 0.5:
            rows = rng.sample(sorted(lens), rng.randint(1, len(lens)))
            memory.free(rows)
            for row in rows:
                del lens[row]
        elif lens and memory.append(list(lens), [1] * len(lens)):
            lens = {row: count + 1 for row, count in lens.items()}
        memory.check_invariants(lens)
        used = memory.state.tables[sorted(lens)].ravel()
        assert max(collections.Counter(used.tolist()).values(), default=1) == 1
        assert memory.num_reserved_slots == 24 * len(lens)
    memory.free_all()
    memory.check_invariants({})
    assert memory.num_free_blocks == memory.num_usable_blocks


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
    paged = offline.drive(llm.engine, requests, [0.0] * 6)
    engine, num_places = offline.baseline_engine(llm)
    continuous = offline.drive(engine, requests, [0.0] * 6)
    engine, _ = offline.baseline_engine(llm)
    static = offline.drive(engine, requests, [0.0] * 6, static_batch_size=num_places)
    for run in (paged, continuous, static):
        assert [len(times.token_times_s) for times in run.times] == wanted
        assert not any(times.failed for times in run.times)
        assert run.num_preemptions == 0
    assert num_places < 6
    assert continuous.peak_running == static.peak_running == num_places
    assert paged.peak_running == 6
    assert paged.kv_used_share > continuous.kv_used_share


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
        engine, _ = offline.baseline_engine(llm)
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
    engine, num_places = offline.baseline_engine(llm)
    times = offline.drive(engine, requests, [0.0] * 6, static_batch_size=num_places).times
    for start in range(num_places, 6, num_places):
        ended = max(one.token_times_s[-1] for one in times[start - num_places : start])
        assert all(one.token_times_s[0] > ended for one in times[start : start + num_places])


def test_requests_start_after_they_arrive(llm):
    llm.engine.core.reset()  # other engines have used its device
    offline.drive(llm.engine, workload(llm, 1), [0.0])  # compiles
    arrivals = [0.0, 0.0, 0.3, 0.6]
    run = offline.drive(llm.engine, workload(llm, 4), arrivals)
    assert [times.arrival_s for times in run.times] == arrivals
    assert all(times.ttft_s > 0 for times in run.times)
    assert run.duration_s > 0.6
