"""The tuning program: which problems it has, what it compiles, its budget, its refusals."""

import os
import subprocess
import sys

import jax
import pytest

from benchmarks import tune_attention
from benchmarks.gpu_suite import programs
from benchmarks.gpu_suite.stage import Context
from benchmarks.gpu_suite.tuning import problems as toys
from benchmarks.gpu_suite.tuning_choice import Measured, Outcome
from benchmarks.gpu_suite.tuning_problems import Problem
from benchmarks.tune_attention import compile_all, make_problems, tune_all
from pallas_paged.ops.attention.config import DecodeConfig

PROBLEMS = [Problem("decode", 128, size, (4,)) for size in (16, 32, 64)]
SLOW, FAST = Measured(DecodeConfig(), (3.0, 3.0)), Measured(DecodeConfig(tile=128), (1.0, 1.0))
OUTCOME = Outcome(FAST, SLOW, (SLOW, FAST), {"some": "out of something"}, (), ("one", "two"))


def test_one_problem_for_each_key():
    found = make_problems(["decode", "prefill"], [4, 8, 16], [128], [16, 64], "bfloat16")
    assert len({problem.key for problem in found}) == len(found) == 2 * 2 + 2 * 3
    groups = [(p.kernel, p.groups) for p in found if p.block_size == 16]
    # 4 and 8 heads are 8 columns of the decode kernel, 16 heads are others.
    decode = [("decode", (4, 8)), ("decode", (16,))]
    assert sorted(groups) == [*sorted(decode), *(("prefill", (g,)) for g in (4, 8, 16))]
    again = make_problems(["decode"], [8, 8], [64], [16], "int8")
    assert [(p.groups, p.cache_dtype) for p in again] == [((8,), "int8")]


def test_each_outcome_is_kept_at_once_and_said(capsys):
    kept = []

    def tune_one(problem):
        assert len(kept) == PROBLEMS.index(problem) - (problem is PROBLEMS[2])
        if problem is PROBLEMS[1]:
            raise jax.errors.JaxRuntimeError("out of memory")
        return OUTCOME

    done = tune_all(PROBLEMS, tune_one, lambda *args: kept.append(args), 100.0)
    assert done == 2
    assert kept == [(PROBLEMS[0], OUTCOME), (PROBLEMS[2], OUTCOME)]
    said = capsys.readouterr().out
    assert "block 32, group 4: left out: JaxRuntimeError: out of memory" in said
    assert said.count("  left out: some: out of something") == 2
    assert "tile 128, num_stages 3, ctas_per_sm 2, min_tiles 1, converts_ahead 1: " in said
    assert ": 1000000.0, 1000000.0 us" in said
    assert "rule/best 3.000" in said


def test_the_budget_ends_it():
    now, tuned = iter((0.0, 1.0, 90.0, 101.0, 102.0)), []
    tune_all(
        PROBLEMS,
        lambda problem: tuned.append(problem) or OUTCOME,
        lambda *args: None,
        100.0,
        clock=lambda: next(now),
    )
    assert tuned == PROBLEMS[:2]


def test_other_processes_compile(tmp_path, monkeypatch):
    context = Context("cpu", tmp_path, tmp_path)
    problem = toys(context)[0]
    compile_all(problem, context, jobs=2)
    for program in problem.programs():
        assert programs.find(program.name, context) is not None
    # One whose process dies is known not to compile.
    monkeypatch.setattr(tune_attention, "_compile", die)
    other = problem._replace(block_size=32)
    compile_all(other, context, jobs=1)
    with pytest.raises(
        programs.NotCompiledError, match="crashed while compiling: BrokenProcessPool"
    ):
        programs.load(other.inputs(), context)


def die(*args):
    os._exit(1)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU to measure on")
@pytest.mark.parametrize(
    ("flag", "says"),
    [
        (
            "--kernels=decode",
            "error: tune_attention cannot measure here: "
            "it needs an NVIDIA GPU of compute capability 9.0",
        ),
        ("--kernels=decoding", "use some of decode, prefill"),
        ("--block_sizes=few", "block_sizes"),
    ],
)
def test_it_refuses(flag, says):
    command = [sys.executable, "-m", "benchmarks.tune_attention", flag]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert says in done.stderr
