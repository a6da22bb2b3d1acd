"""The simulated device: costs and clocks by hand, and what a trace shows of real scheduling."""

import dataclasses
import json
import math
import pathlib
from typing import Any

import numpy as np
import pytest

from benchmarks.paper import traces
from benchmarks.paper.traces import Data
from benchmarks.simulation import hardware as hardware_module
from benchmarks.simulation.calibration import FITTED, Timed, fit
from benchmarks.simulation.cost_model import Attention, Costs, Work, costs_on
from benchmarks.simulation.device import Candidates, SimulatedDevice, Way, works_of
from benchmarks.simulation.hardware import Hardware, hardware
from benchmarks.simulation.serve import Kind, Outcome, serve
from benchmarks.simulation.shapes import SHAPES, Shape
from benchmarks.simulation.systems import (
    CACHES,
    OF_PAPER,
    ORCA_MAX,
    ORCA_ORACLE,
    PAPER,
    STATIC,
    TODAY_SHARING,
    Simulated,
    System,
    build,
)
from benchmarks.workloads import Request
from pallas_paged.engine.core.plan import StepPlan
from pallas_paged.models.demo import DEMO_MODEL

ONE_SECOND = Costs(weights_s=0, token_s=0, kv_token_s=0, pair_s=0, step_s=1.0)
SMALL = Shape("small", 1e9, 4, 64, 4, 2, 16, "h100", 1, num_slots=1024)


def make(
    system: System = PAPER, costs: Costs = ONE_SECOND, shape: Shape = SMALL, **options: Any
) -> tuple[Simulated, list[StepPlan]]:
    """Returns an engine whose steps cost what is said, and the plans that its device gets."""
    way: Way = options.pop("way", Way(pads=False, mixes=system.mixes))
    sizes = {"max_num_seqs": 16, "max_model_len": 256}
    simulated = build(system, shape, seed=0, **sizes | options)
    device = simulated.device
    device._costs, device._way = costs, way
    plans: list[StepPlan] = []
    dispatch = device.dispatch

    def noting(plan: StepPlan) -> Any:
        plans.append(plan)
        return dispatch(plan)

    device.dispatch = noting  # type: ignore[method-assign]
    return simulated, plans


def request(num_prompt: int, num_output: int, seed: int = 0) -> Request:
    rng = np.random.default_rng(seed)
    return Request(tuple(rng.integers(0, 30_000, num_prompt).tolist()), num_output)


class TestCosts:
    def test_by_hand(self) -> None:
        costs = Costs(10, 1, 0.5, 0.25, 3, copied_block_s=7, moved_block_s=2, move_s=4, row_s=0.1)
        assert costs.seconds(Work(4, Attention(100, 100))) == pytest.approx(3 + 10 + 50 + 0.4)
        prompt = Attention(10, 100)
        assert costs.seconds(Work(40, prompts=prompt)) == pytest.approx(3 + 40 + 25 + 4)
        both = Work(40, Attention(100, 100), prompt)  # neither hides the other
        assert costs.seconds(both) == pytest.approx(3 + 40 + 50 + 25 + 4)
        moved = Work(1, num_copied_blocks=2, num_moved_blocks=3, num_moves=1)
        assert costs.seconds(moved) == pytest.approx(3 + 10 + 0.1 + 14 + 6 + 4)

    def test_of_a_model_on_one_and_four_devices(self) -> None:
        device = Hardware("x", 1e12, 1e14, 1e10, 1e11, 1e11, launch_s=1e-6)
        shape = Shape("y", 5e9, 10, 1000, 8, 4, 125, "h100", 1, 0)
        one = costs_on(shape, device, block_size=16)
        assert one.weights_s == pytest.approx(10e9 / 1e12)
        assert one.token_s == pytest.approx(2 * 5e9 / 1e14)
        kv_bytes = 2 * 10 * 4 * 125 * 2
        assert one.kv_token_s == pytest.approx(kv_bytes / 1e12)
        assert one.pair_s == pytest.approx(4 * 10 * 8 * 125 / 1e14)
        assert one.step_s == pytest.approx(10 * 10 * 1e-6)
        assert one.copied_block_s == pytest.approx(2 * 16 * kv_bytes / 1e12)
        assert one.moved_block_s == pytest.approx(16 * kv_bytes / 1e10)
        assert one.row_s == 0
        four = costs_on(shape, dataclasses.replace(device, num_devices=4), block_size=16)
        assert four.weights_s == pytest.approx(one.weights_s / 4)
        assert four.step_s > one.step_s
        assert four.row_s == pytest.approx(20 * 2 * 0.75 * 1000 * 2 / 1e11)  # of ring all-reduces

    def test_the_papers_memory(self) -> None:
        """Table 1: the KV slots and what a token takes are the KV memory, 12, 21 and 264 GB."""
        for name, gigabytes in (("opt-13b", 12), ("opt-66b", 21), ("opt-175b", 264)):
            shape = SHAPES[name]
            held = shape.num_slots * shape.kv_bytes_per_token / 1e9
            assert held == pytest.approx(gigabytes, rel=0.1), name

    def test_a_calibration_finds_constants_that_are_there(self) -> None:
        true = Costs(8e-4, 1e-4, 3e-7, 2e-7, 1.5e-3)
        rng = np.random.default_rng(0)
        works = [
            *(
                Work(int(n), Attention(int(n * rng.integers(20, 400))))
                for n in rng.integers(1, 33, 100)
            ),
            *(
                Work(int(n), prompts=Attention(int(n), int(n * n / 2)))
                for n in rng.integers(32, 513, 100)
            ),
        ]
        steps = [Timed(w, true.seconds(w) * rng.uniform(0.97, 1.03)) for w in works]
        found = fit(steps)
        for work in works:
            assert found.seconds(work) == pytest.approx(true.seconds(work), rel=0.1)
        assert {name for name in FITTED if getattr(found, name) <= 0} == set()


class TestHardware:
    def test_an_unknown_gpu_is_refused(self) -> None:
        with pytest.raises(ValueError, match="gpu='v100' is not known; choose one of a100-40gb"):
            hardware("v100")

    @pytest.mark.parametrize("name", hardware_module.NAMES)
    def test_shares_of_data_sheets(self, name: str, tmp_path: pathlib.Path) -> None:
        found = hardware(name, results=tmp_path)
        peaks = {"a100-40gb": 1.555e12, "a100-80gb": 2.039e12, "h100": 3.35e12, "h200": 4.8e12}
        share = found.bytes_per_s / peaks[name]
        assert share == pytest.approx(hardware_module.SHARE_OF_BANDWIDTH, rel=0.01)
        assert found.source.startswith("data sheet")

    def test_what_was_measured_counts(self, tmp_path: pathlib.Path) -> None:
        for date, scale in (("2027-01-01", 1), ("2027-02-01", 2)):
            folder = tmp_path / f"{date}-nvidia-h100-80gb"
            folder.mkdir()
            rows = (
                {"case": "read bandwidth", "per_second": 3e12 * scale},
                {"case": "matmul rate", "per_second": 6e14 * scale},
            )
            (folder / "device.jsonl").write_text("\n".join(map(json.dumps, rows)))
        found = hardware("h100", results=tmp_path)
        assert (found.bytes_per_s, found.flops_per_s) == (6e12, 12e14)  # of the last run
        assert found.source == "measured, 2027-02-01-nvidia-h100-80gb"
        assert hardware("h200", results=tmp_path).source.startswith("data sheet")


class TestWorks:
    def test_a_prompt_then_decoding(self) -> None:
        simulated, plans = make()
        serve(simulated, [request(10, 3)], [0.0])
        way = Way(pads=False)
        works = [works_of(plan, way)[0] for plan in plans]
        prompt = Work(10, prompts=Attention(10, 55))
        assert works == [[prompt], *([Work(1, Attention(n, n))] for n in (11, 12))]

    def test_padding_counts_where_it_is_paid(self) -> None:
        simulated, plans = make()
        serve(simulated, [request(10, 2)], [0.0])
        bucket = plans[0].bucket
        ((work,), num_seqs, num_tokens) = works_of(plans[0], Way(pads=True))
        assert work.num_tokens == bucket.num_tokens > 10
        assert (num_seqs, num_tokens) == (1, 10)

    def test_a_step_of_both_kinds_is_one_program_or_two(self) -> None:
        """The second request comes while the first decodes: 12 tokens of context, then 7 and 13."""
        simulated, plans = make()
        serve(simulated, [request(10, 9), request(7, 2, seed=1)], [0.0, 2.5])
        mixed = next(plan for plan in plans[1:] if not plan.bucket.is_decode)
        two, *_ = works_of(mixed, Way(pads=False, mixes=False))
        (one,), *_ = works_of(mixed, Way(pads=False, mixes=True))
        prompt, decode = Attention(7, 28), Attention(13, 13)
        assert two == [Work(7, prompts=prompt), Work(1, decode)]
        assert one == Work(8, decode, prompt)

    def test_a_cascade_reads_a_prefix_once(self) -> None:
        system = dataclasses.replace(TODAY_SHARING[-1], is_of_paper=True, overlaps=False)
        prefix = tuple(range(1, 481))
        requests = [Request((*prefix, 1000 + i), 4) for i in range(12)]
        shape = dataclasses.replace(SMALL, num_slots=4096)
        simulated, plans = make(system, shape=shape, max_model_len=512)
        serve(simulated, requests, [0.0, *[2.0] * 11])
        sharing = [plan for plan in plans if plan.bucket.shares_prefix]
        assert sharing
        way = Way(pads=False, group=2, block_size=16)
        ((work,), num_seqs, _) = works_of(sharing[0], way)
        assert num_seqs >= 8
        assert work.decodes.num_pairs - work.decodes.num_kv_tokens == (num_seqs - 1) * 480


class TestClock:
    def test_without_a_host_a_request_takes_its_steps(self) -> None:
        simulated, plans = make()
        outcome = serve(simulated, [request(10, 4)], [0.0])
        assert (outcome.duration_s, outcome.normalized_latency_s) == (4.0, 1.0)
        assert (outcome.num_steps, len(plans)) == (4, 4)
        assert outcome.num_tokens == 10 + 3

    def test_the_host_waits_and_the_device_waits_for_it(self) -> None:
        simulated, _ = make(way=Way(pads=False, host_s=0.5))
        assert serve(simulated, [request(10, 4)], [0.0]).duration_s == 6.0

    def test_overlap_hides_the_host(self) -> None:
        """Only its first half second is seen, and it knows of the end one step late."""
        system = dataclasses.replace(PAPER, overlaps=True)
        simulated, _ = make(system, way=Way(pads=False, host_s=0.5))
        assert serve(simulated, [request(10, 4)], [0.0]).duration_s == 0.5 + 4.0

    def test_arrivals_are_waited_for(self) -> None:
        simulated, _ = make()
        outcome = serve(simulated, [request(10, 2), request(10, 2, 1)], [3.0, 10.0])
        assert outcome.duration_s == 12.0
        assert outcome.normalized_latency_s == 1.0

    def test_one_that_comes_in_the_middle(self) -> None:
        """It comes at 1.5, its step begins at 2 as one of two programs, and they share two more."""
        simulated, _ = make()
        outcome = serve(simulated, [request(10, 4), request(10, 2, 1)], [0.0, 1.5])
        assert outcome.duration_s == 5.0
        first, second = 5.0 / 4, (5.0 - 1.5) / 2
        assert outcome.normalized_latency_s == pytest.approx((first + second) / 2)

    def test_a_run_that_is_too_late_is_given_up(self) -> None:
        """16 rows, 160 requests of 50 tokens: certainly over a limit of 2 s per token."""
        requests = [request(2, 50, seed) for seed in range(160)]
        simulated, _ = make()
        outcome = serve(simulated, requests, [0.0] * 160, over_s_per_token=2.0)
        assert outcome.is_over
        assert outcome.normalized_latency_s > 2.0
        assert 100 < outcome.duration_s < 140  # all wait: 100 s by 50 tokens are 2 s/token
        simulated, _ = make()
        whole = serve(simulated, requests, [0.0] * 160, over_s_per_token=math.inf)
        assert not whole.is_over
        assert whole.normalized_latency_s > outcome.normalized_latency_s  # a bound from below

    def test_without_draining_it_ends_with_the_last_arrival(self) -> None:
        requests = [request(2, 50, seed) for seed in range(3)]
        simulated, _ = make()
        outcome = serve(simulated, requests, [0.0, 5.0, 9.0], drains=False)
        assert 9.0 <= outcome.duration_s <= 12.0


class TestKinds:
    def test_samples_share_the_prompt_or_are_requests(self) -> None:
        kind, one = Kind(3), [request(40, 5)]
        together, _ = make()
        apart, _ = make()
        shared = serve(together, one, [0.0], kind)
        alone = serve(apart, one, [0.0], kind, shares=False)
        assert shared.num_tokens == 40 + 3 * 4
        assert alone.num_tokens == 3 * (40 + 4)
        assert shared.duration_s == alone.duration_s == 5.0  # a step costs the same here
        assert shared.normalized_latency_s == alone.normalized_latency_s == 1.0

    def test_beams_run_to_their_end_and_share(self) -> None:
        simulated, _ = make(beam_temperature=0.05)
        outcome = serve(
            simulated, [request(40, 60)], [0.0], Kind(4, is_beam_search=True), over_s_per_token=9
        )
        assert outcome.duration_s >= 60
        assert 0.2 < outcome.saved_share < 0.75

    def test_flatter_candidates_let_more_beams_die(self) -> None:
        saved = []
        for temperature in (0.02, 1.0):
            simulated, _ = make(beam_temperature=temperature)
            kind = Kind(4, is_beam_search=True)
            saved.append(
                serve(
                    simulated, [request(40, 100)], [0.0], kind, over_s_per_token=math.inf
                ).saved_share
            )
        assert saved[0] < saved[1]

    def test_candidates_are_logarithms_of_probabilities(self) -> None:
        packed = Candidates(0.5, 1000, 0).draw(5, 4)
        values = packed[:, 7:].view(np.float32)
        assert (np.diff(values, axis=1) <= 0).all()
        assert (values <= 0).all()
        assert (np.exp(values).sum(axis=1) < 1 + 1e-6).all()

    def test_a_static_batch_waits_for_the_one_before(self) -> None:
        """Memory for four of the longest: the fifth begins when the last of four has ended."""
        requests = [request(10, count, count) for count in (2, 2, 2, 9, 3)]
        simulated, _ = make(STATIC)
        static = serve(simulated, requests, [0.0] * 5, is_static=True)
        assert static.duration_s == 9 + 3
        answered = (9 / 2, 9 / 2, 9 / 2, 9 / 9, 12 / 3)  # a batch as a whole
        assert static.normalized_latency_s == pytest.approx(np.mean(answered))
        simulated, _ = make(ORCA_MAX)
        joined = serve(simulated, requests, [0.0] * 5)
        assert joined.duration_s == 9 + 1  # it joins in a step that is two programs


def run(system: System, rate: float, seed: int, name: str = "sharegpt") -> Outcome:
    """Serves 40 seconds of a trace of the paper's without an end."""
    data, count = Data(name), round(40 * rate)
    requests, arrivals_s = traces.draw(data, count, seed), traces.arrivals(count, rate, seed)
    simulated = build(system, SHAPES["opt-13b"], seed=seed)
    return serve(simulated, requests, arrivals_s, drains=False, over_s_per_token=math.inf)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_order_of_memories_is_the_papers(seed: int) -> None:
    outcomes = [run(system, 3.0, seed) for system in OF_PAPER]
    running = [outcome.mean_running for outcome in outcomes]
    assert running == sorted(running, reverse=True)
    assert running[0] > 1.5 * running[1] > 1.5 * running[2]
    shares = [outcome.shares for outcome in outcomes[1:]]
    tokens = [share.tokens for share in shares if share is not None]
    assert tokens == sorted(tokens, reverse=True)
    assert [round(sum(share), 9) for share in shares if share is not None] == [1.0] * 3
    assert outcomes[0].token_share > 0.9


def test_the_same_seed_is_the_same_run() -> None:
    first, again, other = (run(ORCA_ORACLE, 2.0, seed) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_prefixes_are_found() -> None:
    data = Data("translation", 80)
    requests = traces.draw(data, 20, 0)
    simulated = build(CACHES, SHAPES["llama-13b"], seed=0)
    outcome = serve(simulated, requests, traces.arrivals(20, 5.0, 0))
    total = sum(len(one.prompt_token_ids) for one in requests)
    assert 15 * 80 / total < outcome.cached_share <= 19 * 80 / total


class TestTraces:
    def test_chats_end_with_what_was_said_last(self) -> None:
        requests = traces.draw(Data("chat"), 200, 0)
        lengths = [len(one.prompt_token_ids) for one in requests]
        assert max(lengths) == traces.CHAT_TOKENS
        assert sum(length == traces.CHAT_TOKENS for length in lengths) > 50
        assert max(one.num_output_tokens for one in requests) <= traces.CHAT_TOKENS

    def test_translations_share_their_prefix(self) -> None:
        requests = traces.draw(Data("translation", 341), 50, 0)
        assert len({one.prompt_token_ids[:341] for one in requests}) == 1
        assert np.mean([len(r.prompt_token_ids) - 341 for r in requests]) == pytest.approx(
            32, rel=0.2
        )

    def test_the_same_requests_at_any_rate(self) -> None:
        slow, fast = (traces.arrivals(50, rate, 7) for rate in (1.0, 4.0))
        np.testing.assert_allclose(slow, 4 * np.array(fast))

    @pytest.mark.parametrize("name", ["sharegpt", "alpaca", "translation", "chat"])
    def test_the_first_of_many_are_those_of_few(self, name: str) -> None:
        data = Data(name, 8 if name == "translation" else 0)
        many = traces.draw(data, 1100, 3)
        assert traces.draw(data, 1050, 3) == many[:1050]
        assert traces.draw(data, 7, 3) == many[:7]
        assert many[:70] != many[1024:1094]
        assert traces.draw(data, 7, 4) != many[:7]

    @pytest.mark.parametrize("name", ["sharegpt", "alpaca", "translation", "chat"])
    def test_pauses_and_lengths_have_nothing_in_common(self, name: str) -> None:
        """Drawn from one stream they would go together: long requests behind long pauses."""
        for seed in range(4):
            requests = traces.draw(Data(name), 1000, seed)
            gaps = np.diff(traces.arrivals(1001, 1.0, seed))
            for lengths in zip(*((len(p), n) for p, n in requests), strict=True):
                assert abs(np.corrcoef(gaps, lengths)[0, 1]) < 0.13

    def test_lengths_of_a_file(self, tmp_path: pathlib.Path) -> None:
        entries = [
            {"instruction": "def " * count, "input": "", "output": "x = 1\n" * count}
            for count in range(1, 40)
        ]
        file = tmp_path / "alpaca.json"
        file.write_text(json.dumps(entries))
        data = traces.count_lengths(str(file), str(DEMO_MODEL), tmp_path)
        assert (data.source, data.file) == ("file alpaca.json", "alpaca.json")
        assert data.lengths is not None
        every = {tuple(pair) for pair in np.load(data.lengths).tolist()}
        assert len(every) > 20
        mine = traces.draw(dataclasses.replace(data, name="alpaca"), 50, 0)
        assert {(len(p), n) for p, n in mine} <= every
        file.write_text(json.dumps(entries[:20]))
        other = traces.count_lengths(str(file), str(DEMO_MODEL), tmp_path)
        assert other.lengths != data.lengths


def test_the_device_gives_back_what_it_was_given() -> None:
    """A step that has not ended is waited for; the clock never goes back."""
    simulated, plans = make()
    serve(simulated, [request(10, 3)], [0.0])
    device = SimulatedDevice(ONE_SECOND, Way(pads=False), vocab_size=9, seed=0)
    times = []
    for plan in plans:
        device.collect(device.dispatch(plan))
        times.append(device.now_s)
    assert times == [1.0, 2.0, 3.0]
    assert device.busy_s == 3.0
