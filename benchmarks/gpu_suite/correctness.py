"""Is every kernel right on this device, and does it give the same bits each time?

The first stage has one case of everything, the other one all other sizes; XLA comes last, which the
kernels fall back on nowhere but which serves what they refuse.
"""

import functools
from collections.abc import Iterable

from benchmarks.attention_cases.arguments import AttentionSpec
from benchmarks.gpu_suite import (
    correctness_attention,
    correctness_cases,
    correctness_large,
    correctness_moves,
    repeated,
)
from benchmarks.gpu_suite.correctness_cases import DTYPES, MOVES, OPERATIONS, QUANTISED, WRITES
from benchmarks.gpu_suite.correctness_large import Large
from benchmarks.gpu_suite.correctness_moves import MANY_BLOCKS, MANY_TOKENS
from benchmarks.gpu_suite.repeated import INTERPRETED_REPEATS, REPEATS, Problem
from benchmarks.gpu_suite.stage import Case, Context, Stage

KERNELS, XLA = "mosaic_gpu", "xla"
_COLUMNS = ("error", "tolerance", "lse_error", "repeats", "differing_repeats")


class _Cases:
    """Makes cases for one platform and one implementation; XLA's are not repeated."""

    def __init__(self, context: Context, implementation: str) -> None:
        self._implementation = implementation
        self._interpreted = implementation == KERNELS and not context.on_gpu
        repeats = REPEATS if context.on_gpu else INTERPRETED_REPEATS
        self._repeats = repeats if implementation == KERNELS else 1

    def attention(self, specs: Iterable[AttentionSpec], empty: bool = False) -> list[Case]:
        """Returns a case for each spec."""
        return [
            self._case(
                spec.name,
                correctness_attention.problem(
                    spec,
                    self._implementation,
                    self._repeats,
                    empty=empty,
                    interpreted=self._interpreted,
                ),
                run_s=1.0,
                prepare_s=3.0 if sum(spec.lens_of_queries) > 100 else 2.0,
            )
            for spec in specs
        ]

    def moves(
        self, operations: Iterable[str], dtypes: Iterable[str], *, is_static: bool = False
    ) -> list[Case]:
        """Returns a case for each operation and dtype; of writes also with static scales."""
        return [
            self._case(
                f"{operation} {dtype}" + ", static scales" * is_static,
                correctness_moves.problem(
                    operation,
                    dtype,
                    self._implementation,
                    self._repeats,
                    is_static=is_static,
                    interpreted=self._interpreted,
                ),
                run_s=0.5,
                prepare_s=0.7,
            )
            for operation in operations
            for dtype in dtypes
        ]

    def padding(self) -> Case:
        """Returns a step's write of padding only."""
        problem = correctness_moves.problem(
            "write_kv",
            "bfloat16",
            self._implementation,
            self._repeats,
            padding=True,
            interpreted=self._interpreted,
        )
        return self._case("write_kv nothing", problem, run_s=0.5, prepare_s=0.5)

    def many(self) -> list[Case]:
        """Returns operations on more blocks, or tokens, than a grid's axis may have."""
        problem = functools.partial(
            correctness_moves.problem,
            dtype="bfloat16",
            implementation=self._implementation,
            repeats=self._repeats,
        )
        return [
            self._case(
                f"{operation} 70,000",
                problem(operation, sizes=MANY_TOKENS if operation in WRITES else MANY_BLOCKS),
                run_s=5.0,
                prepare_s=1.5,
                limit_s=20.0,
            )
            for operation in OPERATIONS
        ]

    def large(self) -> list[Case]:
        """Returns what reads and writes the end of a large cache."""
        specs = correctness_cases.large_specs()
        problems = {
            spec.name: correctness_large.attention(spec, self._implementation, self._repeats)
            for spec in specs
        } | {
            f"{operation} in 4.5 GiB": correctness_large.move(
                operation, self._implementation, self._repeats
            )
            for operation in OPERATIONS
        }
        return [
            self._large_case(f"{self._implementation}: {name}", large)
            for name, large in problems.items()
        ]

    def _case(
        self, name: str, problem: Problem, run_s: float, prepare_s: float, limit_s: float = 10.0
    ) -> Case:
        programs = () if problem.interpreted else (problem.program,)
        return Case(
            f"{self._implementation}: {name}",
            functools.partial(repeated.run, problem),
            programs=lambda: programs,
            prepare=functools.partial(repeated.prepare, problem),
            limit_s=60.0 if problem.interpreted else limit_s,
            run_s=run_s,
            prepare_s=prepare_s,
        )

    def _large_case(self, name: str, large: Large) -> Case:
        return Case(
            name,
            functools.partial(correctness_large.run, large),
            programs=lambda: large.programs,
            prepare=functools.partial(correctness_large.prepare, large),
            limit_s=20.0,
            run_s=2.0,
            prepare_s=1.5,
        )


def _first(context: Context) -> list[Case]:
    kernels = _Cases(context, KERNELS)
    if not context.on_gpu:
        return [
            *kernels.attention(correctness_cases.interpreted_specs()[2:]),
            *kernels.attention(correctness_cases.interpreted_empty_specs(), empty=True),
            *kernels.moves(WRITES, DTYPES),
            *kernels.moves(WRITES, QUANTISED, is_static=True),
            *kernels.moves(MOVES, ("bfloat16", "int8")),
            kernels.padding(),
        ]
    basic = correctness_cases.basic_specs()
    return [
        *kernels.attention(basic),
        *kernels.moves(WRITES, DTYPES),
        *kernels.moves(WRITES, QUANTISED, is_static=True),
        *kernels.moves(MOVES, ("bfloat16",)),
        *kernels.attention(correctness_cases.empty_specs(), empty=True),
        kernels.padding(),
        *kernels.attention(correctness_cases.small_specs()),
        *kernels.attention(correctness_cases.first_specs()),
        *kernels.many(),
        *kernels.large(),
    ]


def _more(context: Context) -> list[Case]:
    kernels, xla = _Cases(context, KERNELS), _Cases(context, XLA)
    if not context.on_gpu:
        return [
            *xla.attention(correctness_cases.interpreted_specs()),
            *xla.attention(correctness_cases.interpreted_empty_specs(), empty=True),
            *xla.moves(OPERATIONS, ("bfloat16", "int8")),
            *xla.moves(WRITES, QUANTISED, is_static=True),
            xla.padding(),
        ]
    return [
        *kernels.attention(correctness_cases.more_specs()),
        *kernels.moves(MOVES, DTYPES[1:]),
        *kernels.attention(correctness_cases.kernel_specs()),
        *xla.attention(correctness_cases.basic_specs()),
        *xla.attention(correctness_cases.empty_specs(), empty=True),
        *xla.moves(OPERATIONS, DTYPES),
        *xla.moves(WRITES, QUANTISED, is_static=True),
        *xla.attention(correctness_cases.first_specs()),
        *xla.attention(correctness_cases.common_specs()),
        *xla.attention(correctness_cases.more_specs()),
    ]


CORRECTNESS = Stage("correctness", 90, _first, _COLUMNS, toy=False, parallel=True)
MORE = Stage("more_correctness", 50, _more, _COLUMNS, toy=False, parallel=True)
