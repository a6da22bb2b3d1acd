"""The micro-benchmark of recoveries: what it says of an engine, and where swapping pays."""

import math
from typing import Any

import pytest

from benchmarks.recovery_costs import SwapCosts, crossover, engine_for, measure_costs
from pallas_paged.engine.core.policies import RecoveryCosts
from pallas_paged.engine.kv.host_pool import HostPool
from tests.models.references import DATA

MODEL = str(DATA / "llama-mqa-linear")


def make(**options: Any) -> Any:
    fixed = {"max_num_batched_tokens": 32, "compilation_cache_dir": None}
    return engine_for(MODEL, 4, 100, **fixed | options)


def test_what_it_says_of_an_engine() -> None:
    llm = make()
    found = measure_costs(llm, 60)
    assert found[:2] == (4, 60)
    assert 0 < found.swap_s < 1
    assert 0 < found.recompute_s < 1
    assert found.choice == found.costs.cheaper(60, 16)  # 15 blocks, padded
    assert found.crossover > 60 or found.choice == "swap"
    with pytest.raises(ValueError, match="num_tokens=101 must be from 1 to 100"):
        measure_costs(llm, 101)
    with pytest.raises(ValueError, match=r"swap_space=1e-09 holds 0 blocks.* takes 16"):
        measure_costs(make(swap_space=1e-9), 60)


@pytest.mark.parametrize(
    ("costs", "expected"),
    [
        (RecoveryCosts(1.0, 0.0, 50.0), 51),
        (RecoveryCosts(1.0, 0.0, 99.0), 100),
        (RecoveryCosts(1.0, 0.0, 100.0), math.inf),
        (RecoveryCosts(1.0, 0.0, 0.0), 1),
        # Chunks of 8, 16 and 32 blocks, for up to 32, 64 and 128 tokens:
        (RecoveryCosts(1.0, 0.75, 0.0), 13),  # 12, 24, 48 s
        (RecoveryCosts(1.0, 1.5, 0.0), 97),  # 24, 48, 96 s: also from 25 to 32, and 49 to 64
    ],
)
def test_the_crossover(costs: RecoveryCosts, expected: float) -> None:
    assert crossover(costs, 4, 100, HostPool(1000, 1000)) == expected


def test_a_crossover_that_is_not_there_is_written_as_a_word() -> None:
    costs = SwapCosts(4, 9, 1e-3, 2e-3, RecoveryCosts(1.0, 2.0, 3.0), "recompute", math.inf)
    row = costs.row()
    assert row["swap from tokens"] == "inf"
    assert row["swap 9 tokens, ms"] == 1.0
    assert row["us/block, both ways"] == 4e6
    assert costs._replace(crossover=51).row()["swap from tokens"] == 51
