"""The stage of tuning: candidates, what is left out, the choice, the file that is written."""

import pathlib

import jax
import numpy as np
import pytest

from benchmarks.gpu_suite import programs, tuning, tuning_choice
from benchmarks.gpu_suite import tuning_problems as made
from benchmarks.gpu_suite.stage import Context, run_case
from benchmarks.gpu_suite.tuning_choice import Measured, choose, keep, merged_text, tune
from benchmarks.gpu_suite.tuning_problems import Problem, Sizes, Step, by_rule, describe
from pallas_paged.ops.attention.config import (
    SM90,
    DecodeConfig,
    DecodeKey,
    fits,
    tuned_file_name,
)
from pallas_paged.ops.attention.hopper.decode_problem import scratch_types
from pallas_paged.ops.attention.hopper.prefill_config import PrefillTuning
from pallas_paged.ops.attention.hopper.prefill_tuned import PrefillKey, parse

SLOW, RULE, FAST = (DecodeConfig(num_stages=n) for n in (2, 3, 4))
GPU = Context("sm_90", pathlib.Path("none"), pathlib.Path("none"))
PROBLEM = Problem("decode", 128, 16, (4, 8))


@pytest.fixture
def toy(tmp_path):
    return Context("cpu", tmp_path / "results", tmp_path / "work")


# --- what is compared -----------------------------------------------------------------------------


def test_the_plan_for_a_gpu_is_small_and_its_names_are_unique():
    cases = tuning.STAGE.cases(GPU)
    assert [case.name.partition(",")[0] for case in cases[:2]] == [
        "decode bfloat16",
        "prefill bfloat16",
    ]
    of_cases = [case.programs() for case in cases]
    names = [program.name for of_case in of_cases for program in of_case]
    assert len(names) <= 110
    functions = {}
    for program in (program for of_case in of_cases for program in of_case):
        shapes = tuple((x.shape, str(x.dtype)) for x in jax.tree.leaves(program.arguments()))
        assert functions.setdefault(program.name, shapes) == shapes
    assert sum(case.run_s for case in cases) < tuning.STAGE.budget_s
    assert all(case.skip(GPU) is None for case in cases)


def test_other_chips_are_skipped():
    other = GPU._replace(platform="sm_80")
    for case in tuning.STAGE.cases(other):
        assert case.programs() == ()
        assert "sm_80" in run_case(case, other)["reason"]


def test_candidates_fit_and_begin_with_the_rule():
    for problem in tuning.problems(GPU):
        rule, *others = problem.candidates()
        assert rule == by_rule(problem)
        assert 3 <= len(others) < 12
        assert len({rule, *others}) == 1 + len(others)
        for config in (rule, *others):
            if problem.kernel == "prefill":
                assert made.fits(problem.key, config)
                assert config.in_registers
            else:
                for group in problem.groups:
                    scratch = scratch_types(problem.specialised(group), config)
                    assert fits(config, scratch, SM90)


def test_keys_are_those_of_the_package():
    assert PROBLEM.key == DecodeKey("bfloat16", 128, 8, 16)
    assert Problem("prefill", 128, 64, (8,)).key == PrefillKey("bfloat16", 128, 8, 64)
    with pytest.raises(AssertionError, match="one configuration is not for all"):
        assert PROBLEM._replace(groups=(4, 16)).key


def test_steps_are_in_blocks_of_their_own():
    sizes = Sizes(((Step(3, 40, 2), Step(1, 100)),), 2, 8, 256)
    problem = PROBLEM._replace(groups=(4,), sizes=sizes)
    (arrangement,) = problem.arrangements()
    tables, lens, starts = problem.step_arrays(arrangement, sizes.steps[0][0])
    assert tables.shape == (2, 3, 7)
    used = tables[:, :, :3]
    # 18 blocks in a pool of 16: each is used before any is used again; the null block never is.
    assert set(used.flat) == set(range(1, 17))
    assert (tables[:, :, 3:] == 0).all()
    assert (lens.tolist(), starts.tolist()) == ([40] * 3, [0, 2, 4, 6])
    tables, lens, starts = problem.step_arrays(arrangement, sizes.steps[0][1])
    assert len(set(tables[:, 0].flat)) == 14
    assert (lens.tolist(), starts.tolist()) == ([100, 0, 0], [0, 1, 1, 1])


def test_errors_are_of_rows_and_not_a_number_is_infinite():
    right = np.array([[1.0, -1.0], [0.01, 0.01]], np.float32)
    wrong = right + np.array([[0, 0.1], [0, 0]], np.float32)
    assert made.error((right,), (right,)) == 0
    assert made.error((right, wrong), (right, right)) == pytest.approx(0.05)
    small = right + np.array([[0, 0], [0, 0.001]], np.float32)
    assert made.error((small,), (right,)) == pytest.approx(0.05)
    assert made.error((right * np.nan,), (right,)) == np.inf
    zeros = np.zeros((1, 2), np.float32)
    assert made.error((zeros,), (zeros,)) == 0


# --- the choice -----------------------------------------------------------------------------------


def test_the_fastest_by_ratios_is_chosen():
    # Means 3 and 0.7, although the sums are 6 and 5.1: times count by their ratios.
    assert choose(FAST, [Measured(SLOW, (3.0, 3.0)), Measured(RULE, (5.0, 0.1))]).config == RULE


def test_the_rule_stays_unless_beaten_by_more_than_noise():
    close = [Measured(RULE, (1.01,)), Measured(FAST, (1.0,))]
    assert choose(RULE, close).config == RULE
    assert choose(RULE, close, noise=0.001).config == FAST
    assert choose(SLOW, close).config == FAST


class Device:
    """Loads programs that are names, and times them by what it is told."""

    def __init__(self, problem, times, errors=(), refused=(), broken=()):
        self.problem, self.times, self.errors = problem, times, dict(errors)
        self.refused, self.broken, self.is_dead = refused, broken, False
        self.now = 0.0

    def load(self, program):
        name = program.name
        if name == self.problem.inputs().name:
            return lambda: ["k", "v", *(f"q{i}" for i in range(len(self.problem.arrangements())))]
        if name.startswith("tuning error"):
            return lambda actual, expected: (np.float32(self.errors.get(actual[0], 0.0)),)
        config = next(c for c in self.problem.candidates() if name.endswith(describe(c)))
        if config in self.refused:
            raise NotImplementedError("no such tile")

        def call(*arguments):
            if self.is_dead or config in self.broken:
                self.is_dead = config in self.broken[1:]
                raise jax.errors.JaxRuntimeError("launch failed")
            return (config,)

        return call

    def timer(self, call, count):
        self.now += 1
        return self.times.get(call()[0], 1.0)

    def clock(self):
        return self.now


def tuned(device, budget_s=1000.0, **options):
    return tune(
        device.problem, device.load, budget_s, timer=device.timer, clock=device.clock, **options
    )


def test_what_fails_or_is_wrong_is_left_out():
    rule, a, b, c, d, *_ = PROBLEM.candidates()
    device = Device(
        PROBLEM,
        {rule: 0.9, a: 0.1, b: 0.1, c: 0.1, d: 0.5},
        errors={a: np.nan},
        refused=(b,),
        broken=(c,),
    )
    outcome = tuned(device)
    assert (outcome.best.config, outcome.by_rule.config) == (d, rule)
    assert outcome.best.times_s == (0.5,) * 8
    assert outcome.steps[0] == "group 4: 64 x 4096"
    assert outcome.wrong == (describe(a),)
    assert outcome.left_out == {
        describe(a): "wrong by nan in group 4: 64 x 4096",
        describe(b): "unsupported: no such tile",
        describe(c): "JaxRuntimeError: launch failed",
    }
    assert len(outcome.measured) == len(PROBLEM.candidates()) - 3
    row = tuning.row(outcome)
    assert (row["best"], row["by_rule/best"]) == (describe(d), pytest.approx(1.8))
    assert (row["candidates"], row["left_out"], row["wrong"]) == (len(PROBLEM.candidates()), 3, 1)


def test_a_small_error_is_tolerated_and_a_larger_one_is_not():
    _, a, b, *_ = PROBLEM.candidates()
    outcome = tuned(Device(PROBLEM, {}, errors={a: 0.029, b: 0.031}))
    assert outcome.wrong == (describe(b),)


def test_a_device_that_died_is_an_error_that_names_the_culprit():
    _, a, b, *_ = PROBLEM.candidates()
    device = Device(PROBLEM, {}, broken=(a, b))
    with pytest.raises(RuntimeError, match=f"fails since {describe(b)} failed"):
        tuned(device)


def test_without_the_rule_there_is_nothing_to_compare_with():
    device = Device(PROBLEM, {}, refused=(by_rule(PROBLEM),))
    with pytest.raises(NotImplementedError, match="no such tile"):
        tuned(device)


def test_rounds_end_with_the_budget_and_medians_count():
    device = Device(PROBLEM, {})
    every = 8 * len(PROBLEM.candidates())
    tuned(device, budget_s=8 + every + 1)  # the rule once for the counts, and a round
    assert device.now == 8 + 2 * every
    config, calls = PROBLEM.candidates()[1], iter(range(1000))
    device = Device(PROBLEM, {})
    device.timer = lambda call, count: (
        (9.0, 0.1, 0.2)[next(calls) // 8] if call()[0] == config else 1.0
    )
    outcome = tuned(device, rounds=3)
    assert (outcome.best.config, outcome.best.times_s) == (config, (0.2,) * 8)


def test_what_loads_too_late_is_left_out():
    device = Device(PROBLEM, {})
    load = device.load

    def slow(program):
        device.now += 10
        return load(program)

    device.load = slow
    outcome = tuned(device, budget_s=100)
    assert len(outcome.left_out) == len(PROBLEM.candidates()) - 3
    assert "no time was left to load it" in next(iter(outcome.left_out.values()))


# --- the file -------------------------------------------------------------------------------------


def test_measured_before_is_kept(tmp_path):
    decode, prefill = PROBLEM.key, Problem("prefill", 128, 16, (4,)).key
    file = keep(tmp_path / "tuned", {decode: FAST}, "A GPU 80GB")
    assert file.name == tuned_file_name("A GPU 80GB")
    keep(tmp_path / "tuned", {prefill: PrefillTuning(64, 3)}, "A GPU 80GB")
    assert parse(file.read_text()) == ({decode: FAST}, {prefill: PrefillTuning(64, 3)})
    keep(tmp_path / "tuned", {decode: SLOW}, "A GPU 80GB")
    assert parse(file.read_text()) == ({decode: SLOW}, {prefill: PrefillTuning(64, 3)})
    with pytest.raises(TypeError, match="not of one kernel"):
        merged_text(None, {decode: PrefillTuning()}, "A GPU")


def test_what_the_package_ships_is_kept(tmp_path, monkeypatch):
    shipped = tmp_path / "package" / "tuned"
    other = DecodeKey("bfloat16", 64, 8, 32)
    keep(shipped, {other: SLOW}, "A GPU")
    monkeypatch.setattr(tuning_choice.resources, "files", lambda package: shipped.parent)
    file = keep(tmp_path / "new", {PROBLEM.key: FAST}, "A GPU")
    assert parse(file.read_text())[0] == {other: SLOW, PROBLEM.key: FAST}


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1], ids=["decode", "prefill"])
def test_the_toys_run_and_what_they_write_is_read(index, toy):
    """Interpreted kernels, compared, timed and kept."""
    case, problem = tuning.STAGE.cases(toy)[index], tuning.problems(toy)[index]
    for program in case.programs():
        assert programs.compile_ahead(program, toy)["status"] == "ok"
    row = run_case(case, toy)
    assert row["status"] == "ok", row
    assert (row["candidates"], row["left_out"]) == (2, 0), row
    assert len(next(iter(row["steps_us"].values()))) == 2
    (file,) = (toy.results / "tuned").iterdir()
    chosen = parse(file.read_text())[index]
    assert {key: describe(config) for key, config in chosen.items()} == {problem.key: row["best"]}
