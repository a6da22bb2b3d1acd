"""The tuning program's choices, with a timer that knows the answer; its refusal without a GPU."""

import subprocess
import sys

import jax
import pytest

from benchmarks.tune_attention import Measured, choose, merged_file, tune
from pallas_paged.ops.attention.config import DecodeConfig, DecodeKey, parse_tuned
from pallas_paged.ops.attention.decode_cases import make_case
from pallas_paged.ops.attention.mosaic_gpu import decode_key

SLOW, RULE, FAST, BROKEN = (DecodeConfig(num_stages=n) for n in (2, 3, 4, 6))
CASES = [make_case(4, 128, size) for size in (16, 32, 64)]
TIMES = {SLOW: (3.0, 3.0), RULE: (1.0, 4.0), FAST: (1.0, 1.0)}


def measure(case):
    if case.config == BROKEN:
        raise jax.errors.JaxRuntimeError("out of something\nand more")
    return TIMES[case.config]


def test_the_fastest_by_ratios_is_chosen(capsys):
    chosen = tune(CASES, lambda case: [SLOW, BROKEN, RULE, FAST], measure, 100.0)
    assert list(chosen) == [decode_key(case.problem) for case in CASES]
    assert {result.config for result in chosen.values()} == {FAST}
    assert capsys.readouterr().out.count("left out: ") == 3
    # Means 3 and 2, although the sums are 6 and 5.1: times count by their ratios.
    assert choose(FAST, [Measured(SLOW, (3.0, 3.0)), Measured(RULE, (5.0, 0.1))]).config == RULE


def test_the_rule_stays_unless_beaten_by_more_than_noise():
    assert CASES[0].config == RULE
    close = [Measured(RULE, (1.01,)), Measured(FAST, (1.0,))]
    assert choose(RULE, close).config == RULE
    assert choose(RULE, close, noise=0.001).config == FAST
    assert choose(SLOW, close).config == FAST


def test_the_budget_ends_it():
    now = iter((0.0, 1.0, 90.0, 101.0, 102.0))
    chosen = tune(CASES, lambda case: [FAST], measure, 100.0, clock=lambda: next(now))
    assert list(chosen) == [decode_key(case.problem) for case in CASES[:2]]


def test_nothing_runs_nothing_is_chosen():
    assert tune(CASES[:1], lambda case: [BROKEN], measure, 1.0) == {}


def test_measured_before_is_kept():
    keys = [DecodeKey("bfloat16", 128, 8, size) for size in (16, 32)]
    first = merged_file(None, {key: Measured(SLOW, (1.0,)) for key in keys}, "A GPU")
    second = merged_file(first, {keys[1]: Measured(FAST, (1.0,))}, "A GPU")
    assert parse_tuned(second) == {keys[0]: SLOW, keys[1]: FAST}


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU to measure on")
def test_it_refuses_without_a_gpu():
    command = [sys.executable, "-m", "benchmarks.tune_attention"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    reason = "it needs an NVIDIA GPU of compute capability 9.0"
    assert f"error: tune_attention cannot measure here: {reason}" in done.stderr
