"""What plans for several GPUs compute, by hand; and the program, at a size that says nothing."""

import csv
import dataclasses
import json
import pathlib

import pytest

from benchmarks.parallel.compiled import Case, Memory, Step, needed_bytes, room_bytes
from benchmarks.parallel.memory import row_of
from benchmarks.parallel.scaling import (
    Link,
    collectives_s,
    links_of,
    multiplied_bytes,
    simulate,
)
from benchmarks.simulation.cost_model import ring_share
from benchmarks.simulation.hardware import Hardware
from pallas_paged.collectives import Collective
from pallas_paged.engine.device.exchanges import Exchanges, by_kind
from pallas_paged.engine.device.pool_size import PoolPlan
from pallas_paged.engine.device.step_report import SHAPES
from tests.programs import run_program

LINK = Link("a link", 100e9, 10e-6)
DEVICE = Hardware("a GPU", 1e12, 1e14, 1e10, 1e11, 80e9, launch_s=2e-6)
GIB = 1 << 30


@pytest.mark.parametrize(
    ("num_devices", "all_reduce", "all_gather"), [(2, 1.0, 0.5), (4, 1.5, 0.75), (8, 1.75, 0.875)]
)
def test_what_a_ring_sends(num_devices: int, all_reduce: float, all_gather: float) -> None:
    assert ring_share("all-reduce", num_devices) == all_reduce
    assert ring_share("all-gather", num_devices) == all_gather


def test_another_collective_has_no_share() -> None:
    with pytest.raises(KeyError):
        ring_share("all-to-all", 2)


def test_the_seconds_of_collectives() -> None:
    """5 all-reduces of 1 MB and a gather of 4 MB: 5 x (10 + 15) us and 10 + 30 us, of 4 devices."""
    found = (Exchanges("all-gather", 1, 4_000_000), Exchanges("all-reduce", 5, 5_000_000))
    assert collectives_s(found, 4, LINK) == pytest.approx(5 * 25e-6 + 40e-6)
    assert collectives_s((), 4, LINK) == 0


def test_exchanges_by_kind() -> None:
    """A loop of 3 turns, and one whose turns depend on data, at most as many as steps."""
    every = [
        Collective("all-reduce", 10),
        Collective("all-reduce", 100, 3),
        Collective("all-gather", 7, None),
    ]
    assert by_kind(every, num_steps=4) == (
        Exchanges("all-gather", 4, 28),
        Exchanges("all-reduce", 4, 310),
    )


def test_a_simulated_step() -> None:
    """Of 1000 launches: weights of 20 GB, 64 x 512 tokens of 32 kB; multiplying hides behind."""
    shape = SHAPES["opt-13b"]
    slots = 16 * (1 + 64 * 32)
    exchanges = (Exchanges("all-gather", 1, 4_000_000), Exchanges("all-reduce", 5, 5_000_000))
    step = Step(
        Case("opt-13b", "a100-80gb", 4),
        64,
        512,
        exchanges,
        exchanges,
        20_000_000_000,
        slots * 32_000,
        0,
        0,
        1000,
        1,
        0,
        0.0,
    )
    found = simulate(step, DEVICE, LINK)
    weights_s, kv_s = 0.020, 64 * 512 * 32_000 / 1e12
    assert found.memory_s == pytest.approx(weights_s + kv_s)
    assert found.launches_s == pytest.approx(0.002)
    assert found.collectives_s == pytest.approx(165e-6)
    assert found.step_s == pytest.approx(weights_s + kv_s + 0.002 + 165e-6)
    assert found.tokens_per_s == pytest.approx(64 / found.step_s)
    # 6400 tokens with 10^10 parameters take longer to multiply than these to read.
    many = dataclasses.replace(step, num_seqs=6400, cache_bytes=16 * (1 + 6400 * 32) * 32_000)
    seconds = simulate(many, DEVICE, LINK).step_s
    pairs_s = 4 * 40 * 40 * 128 / 4 * 6400 * 512 / 1e14
    kv_s = 6400 * 512 * 32_000 / 1e12
    assert pairs_s < kv_s
    assert seconds == pytest.approx(2 * 6400 * 1e10 / 1e14 + kv_s + 0.002 + 165e-6)
    alone = dataclasses.replace(step, case=step.case._replace(num_devices=1))
    assert simulate(alone, DEVICE, LINK).collectives_s == 0
    assert shape.tie_word_embeddings


def test_a_table_of_embeddings_is_not_read_whole() -> None:
    llama = SHAPES["llama-70b"]
    assert multiplied_bytes(10**11, llama, 1) == 10**11 - 128256 * 8192 * 2
    assert multiplied_bytes(10**11, llama, 4) == 10**11 - 128256 * 8192 * 2 // 4
    assert multiplied_bytes(10**11, llama, 5) == 10**11 - 128256 * 8192 * 2  # whole on each
    assert multiplied_bytes(10**11, SHAPES["opt-13b"], 4) == 10**11


def test_links_by_their_data_sheets() -> None:
    rates = {link.name: link.bytes_per_s for link in links_of(DEVICE)}
    assert rates == {"NVLink": 1e11, "PCIe": 1e10, "InfiniBand NDR": pytest.approx(40e9)}


def test_a_row_of_memory() -> None:
    """40 GiB, half of which 10 GiB of weights and 1 GiB of others: 9 GiB less what is not ours."""
    plan = PoolPlan(2, 128, 16, 1 << 20, 10 * GIB, 1 << 20, (1 << 20) * 23, 1000 << 20, 4)
    row = row_of(Memory(Case("opt-66b", "a100-40gb", 4), 40 * GIB, plan, 0.0), 0.5)
    num_blocks = 9 * 1024 - 256
    assert row["slots"] == (num_blocks - 1) * 16
    assert row["slots, rounded"] == (8192 - 1) * 16  # a multiple of 1024
    assert row["KV pool GiB"] == num_blocks / 1024
    assert row["paper's slots"] == 9_700
    assert row["share for these"] == pytest.approx((11 * 1024 + 256 + 607 + 1) / (40 * 1024))
    other = row_of(Memory(Case("opt-66b", "a100-40gb", 8), 40 * GIB, plan, 0.0), 0.2)
    assert (other["slots"], other["paper's slots"]) == (0, None)
    assert room_bytes(100 * GIB, 0.9) == 90 * GIB - (256 << 20)


def test_what_a_device_needs_at_least() -> None:
    """OPT-13B has 12,853,473,280 parameters; 2050 x 5120 of positions are whole on each device."""
    whole = 12_853_473_280 * 2
    keys_and_values = (1 + 2 * 2) * 16 * 2 * 40 * 5120 * 2
    one, two = (needed_bytes(Case("opt-13b", "a100-40gb", n), 2, 20) for n in (1, 2))
    assert one == whole + keys_and_values
    assert two > one / 2
    assert two == pytest.approx(one / 2, rel=0.01)


@pytest.mark.slow
def test_the_program(tmp_path: pathlib.Path) -> None:
    done = run_program(
        "benchmarks.parallel_plans",
        f"--out={tmp_path}",
        *("--layers=1", "--models=opt-13b,opt-175b", "--targets=a100-40gb", "--num_devices=1,2"),
        *("--memory=opt-13b:a100-40gb:2", "--batch=8", "--context=20480"),
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "plans.json").read_text())
    assert {row["compiled"] == row["least"] for row in figures["collectives"]} == {True}
    assert "simulated" in (tmp_path / "summary.txt").read_text().lower()
    for part in ("collectives", "memory", "scaling"):
        with open(tmp_path / f"{part}.csv", newline="") as file:
            assert len(list(csv.DictReader(file))) == len(figures[part])
    rates = {(row["model"], row["GPUs"]): row for row in figures["scaling"]}
    assert rates["opt-13b", 2]["simulated tokens/s"] > rates["opt-13b", 1]["simulated tokens/s"]
