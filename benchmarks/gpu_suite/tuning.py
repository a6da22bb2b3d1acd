"""Which configurations of decode and prefill are the fastest here? Kept as the package has them."""

import functools
import math
from collections.abc import Callable

import jax

from benchmarks.gpu_suite import programs
from benchmarks.gpu_suite.stage import Case, Context, Program, Row, Stage
from benchmarks.gpu_suite.tuning_choice import ROUNDS, Call, Outcome, keep, tune
from benchmarks.gpu_suite.tuning_problems import Problem, Sizes, Step, describe
from pallas_paged.dispatch import interpret_kernels

BUDGET_S, LIMIT_S = 12.0, 20.0
"""Seconds that a case aims at, and that it is given."""


def problems(context: Context) -> list[Problem]:
    """Returns what is tuned, the most important first."""
    if not context.on_gpu:
        toy = functools.partial(Problem, block_size=16, groups=(1,), interpreted=True)
        return [
            # By rule few CTAs share an SM at this head_dim: less to interpret.
            toy("decode", head_dim=256, sizes=Sizes(((Step(2, 20),),), 1, 1, 64)),
            toy("prefill", head_dim=64, sizes=Sizes(((Step(1, 20, 12),),), 1, 1, 64)),
        ]
    return [
        Problem("decode", 128, 16, (4, 8)),
        Problem("prefill", 128, 16, (4,)),
        Problem("decode", 128, 64, (4, 8)),
        Problem("prefill", 128, 64, (4,)),
        Problem("prefill", 128, 16, (8,)),
        Problem("prefill", 128, 64, (8,)),
    ]


def run(problem: Problem, context: Context) -> Row:
    """Tunes one problem, and adds the choice to the file in `context.results / "tuned"`."""
    # Interpreted kernels take as long as they take, and mean nothing: once is enough.
    budget_s, rounds = (BUDGET_S, ROUNDS) if context.on_gpu else (math.inf, 1)
    outcome = tune(problem, loader(problem, context), budget_s, rounds=rounds)
    device_kind = jax.devices()[0].device_kind
    keep(context.results / "tuned", {problem.key: outcome.best.config}, device_kind)
    return row(outcome)


def row(outcome: Outcome) -> Row:
    """Returns an outcome's figures; times are means of one program, all its layers together."""
    best, by_rule = outcome.best, outcome.by_rule
    return {
        "best": describe(best.config),
        "best_us": 1e6 * best.mean_s,
        "by_rule": describe(by_rule.config),
        "by_rule_us": 1e6 * by_rule.mean_s,
        "by_rule/best": by_rule.mean_s / best.mean_s,
        "candidates": len(outcome.measured) + len(outcome.left_out),
        "left_out": len(outcome.left_out),
        "wrong": len(outcome.wrong),
        "left_out_reasons": dict(outcome.left_out),
        "steps_us": {
            name: {describe(m.config): round(1e6 * m.times_s[i], 2) for m in outcome.measured}
            for i, name in enumerate(outcome.steps)
        },
    }


def loader(problem: Problem, context: Context) -> Callable[[Program], Call]:
    """Returns what loads a program: one compiled ahead, or interpreted kernels."""
    ahead = {program.name for program in problem.programs()}

    def load(program: Program) -> Call:
        if program.name in ahead:
            return programs.load(program, context)
        with interpret_kernels():
            compiled = jax.jit(program.function).lower(*program.arguments()).compile()
        return lambda *arguments: tuple(jax.tree.leaves(compiled(*arguments)))

    return load


def _cases(context: Context) -> list[Case]:
    return [
        Case(
            problem.name,
            functools.partial(run, problem),
            skip=_why_not,
            programs=problem.programs if context.platform in ("cpu", "sm_90") else tuple,
            limit_s=LIMIT_S,
            run_s=6.0 if context.on_gpu else 3.0,
        )
        for problem in problems(context)
    ]


def _why_not(context: Context) -> str | None:
    if context.platform in ("cpu", "sm_90"):
        return None
    return f"candidates are for sm_90, not for {context.platform}"


STAGE = Stage(
    "tuning",
    60,
    _cases,
    ("best", "best_us", "by_rule_us", "by_rule/best", "candidates", "left_out", "wrong"),
)
