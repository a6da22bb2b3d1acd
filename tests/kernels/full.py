"""Compiles every named program of the Mosaic GPU kernels, interprets every named case, keeps both.

There are two tables for each JAX: in `compiled/` what the compiler said of each program, in
`interpreted/` the largest error of each case, in units of what is tolerated. Takes what the tables
of this JAX lack, or what was made from other sources than today's, two at a time, and writes after
each; so it can be stopped and started again. Where the compiler would be given the same kernels as
before, a row gets the new sources and nothing is compiled. What fails keeps the row that it had, if
any. What the tables hold is checked by `test_full_table.py`.

  python -m tests.kernels.full                             # all that is missing
  python -m tests.kernels.full decode interpreted-decode   # of these families only
"""

import concurrent.futures
import csv
import functools
import itertools
import multiprocessing
import os
import pathlib
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

import jax

from benchmarks.attention_cases.decode import decode_cases
from pallas_paged.deviceless import kernel_resources
from tests.kernels import ampere_cases, interpreted_cases
from tests.kernels.fingerprint import fingerprint, kernels_hash
from tests.kernels.prefill_cases import compile_cases
from tests.kernels.test_deviceless_prefill import program as prefill_program
from tests.kernels.test_mosaic_cache_ops import operations, shapes

FOLDER = pathlib.Path(__file__).parent


class CompiledRow(NamedTuple):
    """A line of a table; `sources` is the code's fingerprint, `kernels` that of what it makes."""

    family: str
    program: str
    target: str
    sources: str
    kernels: str
    registers: int
    spill_bytes: int
    smem_bytes: int
    warnings: str


class InterpretedRow(NamedTuple):
    """A line of a table; `sources` is the fingerprint of kernels and checks, `error` relative."""

    family: str
    program: str
    target: str
    sources: str
    error: float


Row = CompiledRow | InterpretedRow
Key = tuple[str, str, str]
TABLES: dict[str, type[Row]] = {"compiled": CompiledRow, "interpreted": InterpretedRow}


class Program(NamedTuple):
    """What a row is of: `measure` returns its columns behind `sources`, given the row of before."""

    name: str
    target: str
    measure: Callable[[Any], tuple[Any, ...]]


class Family(NamedTuple):
    """Programs of a table that depend on the same sources.

    `modules`, and what they import of `ops`; and what is done with them, the code of `checks`.
    """

    table: str
    modules: tuple[str, ...]
    programs: Callable[[], list[Program]]
    checks: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """A hash of the sources."""
        return fingerprint(self.modules, self.checks)


def _compile(name: str, target: str, function: Callable[..., Any], *args: Any) -> Program:
    return Program(name, target, functools.partial(_compiled, target, function, args))


def _compiled(
    target: str, function: Callable[..., Any], args: Any, before: CompiledRow | None
) -> tuple[Any, ...]:
    """Returns the columns of `before` again if the compiler would be given the same kernels."""
    digest = kernels_hash(target, function, *args)
    if before is not None and before.kernels == digest:
        return before[CompiledRow._fields.index("kernels") :]
    jax.clear_caches()  # a kernel tells its shared memory when it is lowered, and only then
    kernels = kernel_resources(target, function, *args)
    warnings = sorted({line for kernel in kernels for line in kernel.warnings})
    return (
        digest,
        kernels[0].registers,
        sum(kernel.spill_bytes for kernel in kernels),
        max(kernel.smem_bytes for kernel in kernels),
        "; ".join(warnings),
    )


def _decode() -> list[Program]:
    return [
        _compile(case.name, "h100", case.function, *case.arguments()) for case in decode_cases()
    ]


def _prefill() -> list[Program]:
    return [_compile(case.name, "h100", *prefill_program(case)) for case in compile_cases()]


def _ampere() -> list[Program]:
    return [
        _compile(case.name, case.target, case.function, *case.arguments())
        for case in ampere_cases.compile_cases()
    ]


def _blackwell() -> list[Program]:
    return [
        _compile(case.name, case.target, case.function, *case.arguments())
        for case in ampere_cases.blackwell_cases()
    ]


def _cache_operations() -> list[Program]:
    """Each operation on each dtype for each chip; head_dims and KV heads go round.

    Of some chips a third of the sizes: the code is the same, for another architecture.
    """
    programs = []
    sizes = ((8, 16, 128), (5, 16, 64), (2, 32, 96), (40, 16, 128), (1, 128, 192), (8, 64, 256))
    dtypes = ("bfloat16", "float16", "float32", "int8", "float8_e4m3fn")
    all_sizes = itertools.product(("h100", "a100-80gb"), sizes, dtypes)
    few_sizes = itertools.product(("a10", "l4", "b200"), sizes[::3], dtypes)
    for target, size, dtype in (*all_sizes, *few_sizes):
        cache = *size, dtype
        name = f"heads{size[0]}-block{size[1]}-dim{size[2]}-{dtype}"
        programs += [
            _compile(f"{kind}-{name}", target, operation, shapes(50, *cache), *arguments)
            for kind, (operation, arguments) in operations(cache).items()
            if not kind.startswith(("write_kv", "rotate_and_write"))
            or dtype != "float8_e4m3fn"
            or target not in ("a100-80gb", "a10")
        ]
    return programs


def _interpreted(kernel: str) -> list[Program]:
    return [
        Program(case.name, "interpreted", functools.partial(_checked, case))
        for case in interpreted_cases.cases(kernel)
    ]


def _checked(case: interpreted_cases.Case, before: InterpretedRow | None) -> tuple[float]:
    del before  # what is interpreted is more than a program: arguments, and a reference
    return (round(interpreted_cases.check(case), 3),)


_ATTENTION = "pallas_paged.ops.attention"
_OPS = "pallas_paged.ops"
_KERNELS = {
    "decode": (f"{_ATTENTION}.hopper.decode",),
    "prefill": (f"{_ATTENTION}.hopper.prefill",),
    "ampere": (f"{_ATTENTION}.ampere.attend",),
    "blackwell": (f"{_ATTENTION}.blackwell.attend",),
}
_CHECKS = (
    f"{_ATTENTION}.mosaic_gpu",
    f"{_ATTENTION}.reference",
    "benchmarks.attention_cases.arguments",
    *(f"tests.kernels.{name}" for name in ("interpreted_cases", "interpreting", "covering")),
)
FAMILIES = {
    "decode": Family("compiled", _KERNELS["decode"], _decode),
    "prefill": Family("compiled", _KERNELS["prefill"], _prefill),
    "ampere": Family("compiled", _KERNELS["ampere"], _ampere),
    "blackwell": Family("compiled", _KERNELS["blackwell"], _blackwell),
    "cache": Family(
        "compiled",
        tuple(f"{_OPS}.{op}.mosaic_gpu" for op in ("kv_write", "block_copy", "block_transfer")),
        _cache_operations,
    ),
    "interpreted-decode": Family(
        "interpreted",
        _KERNELS["decode"],
        functools.partial(_interpreted, "decode"),
        _CHECKS,
    ),
    "interpreted-prefill": Family(
        "interpreted",
        (*_KERNELS["decode"], *_KERNELS["prefill"]),  # a step with few rows of decode
        functools.partial(_interpreted, "prefill"),
        _CHECKS,
    ),
    "interpreted-ampere": Family(
        "interpreted",
        _KERNELS["ampere"],
        functools.partial(_interpreted, "ampere"),
        (*_CHECKS, "tests.kernels.interpret_sm80"),
    ),
    "interpreted-blackwell": Family(
        "interpreted",
        _KERNELS["blackwell"],
        functools.partial(_interpreted, "blackwell"),
        _CHECKS,
    ),
}


def table_file(table: str, jax_version: str) -> pathlib.Path:
    """Returns where a table of a JAX is kept."""
    return FOLDER / table / f"jax-{jax_version}.csv"


def read_table(table: str, jax_version: str) -> list[Row]:
    """Returns the rows of a table; none if there is no file."""
    file, row_type = table_file(table, jax_version), TABLES[table]
    if not file.exists():
        return []
    types = row_type.__annotations__.values()
    with file.open(newline="") as lines:
        return [
            row_type(*(convert(value) for convert, value in zip(types, line, strict=True)))
            for line in list(csv.reader(lines))[1:]
        ]


def _write_table(table: str, rows: Iterable[Row]) -> None:
    file = table_file(table, jax.__version__)
    file.parent.mkdir(exist_ok=True)
    partial = file.with_suffix(".part")
    with partial.open("w", newline="") as lines:
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow(TABLES[table]._fields)
        writer.writerows(sorted(rows))
    partial.replace(file)


def key_of(row: Row) -> Key:
    """Returns what there is one line of."""
    return row.family, row.program, row.target


@functools.cache
def _programs(family: str) -> dict[Key, Program]:
    return {(family, p.name, p.target): p for p in FAMILIES[family].programs()}


def _measure(key: Key, sources: str, before: Row | None) -> Row:
    family = FAMILIES[key[0]]
    return TABLES[family.table](*key, sources, *_programs(key[0])[key].measure(before))


def main(families: list[str]) -> None:
    """Brings the tables of this JAX up to date."""
    for name in families:
        if name not in FAMILIES:
            sys.exit(f"family {name!r} is unknown; use some of {', '.join(FAMILIES)}")
    # What interprets kernels needs more threads than two cores give; see tests/conftest.py.
    os.environ.setdefault("NPROC", "16")
    chosen = families or list(FAMILIES)
    tables = [table for table in TABLES if any(FAMILIES[name].table == table for name in chosen)]
    failed = sum(_bring_up_to_date(table, chosen) for table in tables)
    if failed:
        sys.exit(f"{failed} programs failed")


def _bring_up_to_date(table: str, families: Collection[str]) -> int:
    """Makes the missing rows of some families; returns how many failed."""
    started = time.perf_counter()
    current = {n: family.fingerprint for n, family in FAMILIES.items() if family.table == table}
    wanted = {key for name in current for key in _programs(name)}
    rows = {key_of(row): row for row in read_table(table, jax.__version__)}
    rows = {key: row for key, row in rows.items() if key in wanted}  # old ones too, until replaced
    done = {key for key, row in rows.items() if row.sources == current[row.family]}
    missing = sorted(key for key in wanted - done if key[0] in families)
    print(f"jax {jax.__version__}: {len(done)} of {len(wanted)} programs are {table}", flush=True)
    failed = 0
    for number, (key, future) in enumerate(_measure_all(missing, current, rows), 1):
        error = future.exception()
        if error is None:
            row = future.result()
            rows[key] = row
            _write_table(table, rows.values())
            result = " ".join(f"{name}={value}" for name, value in row._asdict().items())
            result = result.partition("sources=")[2].partition(" ")[2]
        else:
            failed += 1
            result = f"FAILED: {type(error).__name__}: {error}"
        print(f"{number}/{len(missing)} {'/'.join(key)}: {result}", flush=True)
    _write_table(table, rows.values())
    print(f"{len(missing)} took {time.perf_counter() - started:.0f} s", flush=True)
    return failed


def _measure_all(
    keys: Collection[Key], sources: dict[str, str], before: dict[Key, Row]
) -> Iterator[tuple[Key, concurrent.futures.Future[Row]]]:
    """Yields every program, done; other processes for each target, as `deviceless` asks for."""
    context = multiprocessing.get_context("spawn")
    for target in sorted({key[2] for key in keys}):
        with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
            done = {
                pool.submit(_measure, key, sources[key[0]], before.get(key)): key
                for key in keys
                if key[2] == target
            }
            for future in concurrent.futures.as_completed(done):
                yield done[future], future


if __name__ == "__main__":
    main(sys.argv[1:])
