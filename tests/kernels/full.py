"""Compiles every named program of the Mosaic GPU kernels, and keeps what the compiler said.

Takes what the table of this JAX lacks, or what was compiled from other sources than today's, two
programs at a time, and writes after each; so it can be stopped and started again. What the tables
hold is checked by `test_full_table.py`.

  python -m tests.kernels.full                 # all that is missing
  python -m tests.kernels.full decode prefill  # of these families only
"""

import ast
import concurrent.futures
import csv
import functools
import hashlib
import multiprocessing
import pathlib
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from importlib import util
from typing import Any, NamedTuple

import jax

from pallas_paged.deviceless import KernelResources, kernel_resources
from pallas_paged.ops.attention.decode_cases import decode_cases
from tests.kernels import ampere_cases
from tests.kernels.prefill_cases import CompileCase, compile_cases
from tests.kernels.test_deviceless_prefill import resources as prefill_resources
from tests.kernels.test_mosaic_cache_ops import operations, shapes

FOLDER = pathlib.Path(__file__).parent / "compiled"


class Program(NamedTuple):
    """What is compiled: `compile` returns what its kernels take."""

    name: str
    target: str
    compile: Callable[[], tuple[KernelResources, ...]]


class Family(NamedTuple):
    """Programs that depend on the same sources: `modules`, and what they import of `ops`."""

    modules: tuple[str, ...]
    programs: Callable[[], list[Program]]


class Row(NamedTuple):
    """A line of a table; `sources` is the fingerprint of what was compiled."""

    family: str
    program: str
    target: str
    sources: str
    registers: int
    spill_bytes: int
    smem_bytes: int
    warnings: str

    @property
    def key(self) -> tuple[str, str, str]:
        """What there is one line of."""
        return self.family, self.program, self.target


def _decode() -> list[Program]:
    return [
        Program(
            case.name,
            "h100",
            functools.partial(kernel_resources, "h100", case.function, *case.arguments()),
        )
        for case in decode_cases()
    ]


def _prefill() -> list[Program]:
    return [
        Program(case.name, "h100", functools.partial(_prefill_kernel, case))
        for case in compile_cases()
    ]


def _prefill_kernel(case: CompileCase) -> tuple[KernelResources, ...]:
    return (prefill_resources(case, "h100"),)


def _ampere() -> list[Program]:
    return [
        Program(
            case.name,
            "a100-40gb",
            functools.partial(kernel_resources, "a100-40gb", case.function, *case.arguments()),
        )
        for case in ampere_cases.compile_cases()
    ]


def _cache_operations() -> list[Program]:
    """Each operation on each dtype for each chip; head_dims and KV heads go round."""
    programs = []
    sizes = ((8, 16, 128), (5, 16, 64), (2, 32, 96), (40, 16, 128), (1, 128, 192), (8, 64, 256))
    dtypes = ("bfloat16", "float16", "float32", "int8", "float8_e4m3fn")
    for target in ("h100", "a100-80gb"):
        for size in sizes:
            for dtype in dtypes:
                if (target, dtype) == ("a100-80gb", "float8_e4m3fn"):
                    continue  # this chip does not convert to it
                cache = *size, dtype
                programs += [
                    Program(
                        f"{name}-heads{size[0]}-block{size[1]}-dim{size[2]}-{dtype}",
                        target,
                        functools.partial(
                            kernel_resources, target, operation, shapes(50, *cache), *arguments
                        ),
                    )
                    for name, (operation, arguments) in operations(cache).items()
                ]
    return programs


_OPS = "pallas_paged.ops"
FAMILIES = {
    "decode": Family((f"{_OPS}.attention.mosaic_gpu_decode",), _decode),
    "prefill": Family((f"{_OPS}.attention.mosaic_gpu_prefill",), _prefill),
    "ampere": Family((f"{_OPS}.attention.mosaic_gpu_ampere",), _ampere),
    "cache": Family(
        tuple(f"{_OPS}.{op}.mosaic_gpu" for op in ("kv_write", "block_copy", "block_transfer")),
        _cache_operations,
    ),
}


def fingerprint(modules: Iterable[str]) -> str:
    """Returns a hash of the modules' code, and of what they import of `ops`: no comments, no docs.

    Formatting and docstrings may change without compiling anything again.
    """
    sources = sources_of(modules)
    text = "\n".join(f"{name}: {sources[name]}" for name in sorted(sources))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def sources_of(modules: Iterable[str]) -> dict[str, str]:
    """Returns the code of the modules and of what they import of `ops`, by name."""
    sources: dict[str, str] = {}
    todo = list(modules)
    while todo:
        name = todo.pop()
        if name not in sources:
            sources[name], imported = code_of(name)
            todo += imported
    return sources


def code_of(module: str) -> tuple[str, list[str]]:
    """Returns a module's code without comments and docstrings, and its imports of `ops`."""
    spec = util.find_spec(module)
    assert spec is not None, module
    assert spec.origin is not None, module
    tree = ast.parse(pathlib.Path(spec.origin).read_text())
    imported: list[str] = []
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and _is_docstring(body[0]):
            body[:1] = [] if len(body) > 1 else [ast.Pass()]
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(_OPS):
            imported += [node.module, *_submodules(node)]
    return ast.unparse(tree), imported


def _is_docstring(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _submodules(node: ast.ImportFrom) -> list[str]:
    """Returns the modules among the names that are imported."""
    names = [f"{node.module}.{alias.name}" for alias in node.names]
    parent = util.find_spec(node.module or "")
    if parent is None or parent.submodule_search_locations is None:
        return []
    return [name for name in names if util.find_spec(name) is not None]


def table_file(jax_version: str) -> pathlib.Path:
    """Returns where the table of a JAX is kept."""
    return FOLDER / f"jax-{jax_version}.csv"


def read_table(jax_version: str) -> list[Row]:
    """Returns the rows of a table; none if there is no file."""
    file = table_file(jax_version)
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        return [
            Row(*line[:4], *map(int, line[4:7]), line[7]) for line in list(csv.reader(lines))[1:]
        ]


def _write_table(rows: Iterable[Row]) -> None:
    file = table_file(jax.__version__)
    file.parent.mkdir(exist_ok=True)
    partial = file.with_suffix(".part")
    with partial.open("w", newline="") as lines:
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows(sorted(rows))
    partial.replace(file)


@functools.cache
def _programs(family: str) -> dict[tuple[str, str, str], Program]:
    return {(family, p.name, p.target): p for p in FAMILIES[family].programs()}


def _compile(key: tuple[str, str, str], sources: str) -> Row:
    kernels = _programs(key[0])[key].compile()
    warnings = sorted({line for kernel in kernels for line in kernel.warnings})
    smem_bytes: list[Any] = [kernel.smem_bytes for kernel in kernels]
    return Row(
        *key,
        sources,
        registers=kernels[0].registers,
        spill_bytes=sum(kernel.spill_bytes for kernel in kernels),
        smem_bytes=max(smem_bytes),
        warnings="; ".join(warnings),
    )


def main(families: list[str]) -> None:
    """Brings the table of this JAX up to date."""
    for name in families:
        if name not in FAMILIES:
            sys.exit(f"family {name!r} is unknown; use some of {', '.join(FAMILIES)}")
    current = {name: fingerprint(family.modules) for name, family in FAMILIES.items()}
    wanted = {key for name in FAMILIES for key in _programs(name)}
    rows = {
        row.key: row
        for row in read_table(jax.__version__)
        if row.key in wanted and row.sources == current[row.family]
    }
    missing = sorted(k for k in wanted if k[0] in (families or FAMILIES) and k not in rows)
    print(
        f"jax {jax.__version__}: {len(rows)} of {len(wanted)} programs are up to date", flush=True
    )
    failed = 0
    for number, (key, future) in enumerate(_compile_all(missing, current), 1):
        error = future.exception()
        if error is None:
            row = future.result()
            rows[row.key] = row
            _write_table(rows.values())
            result = f"{row.registers} registers, {row.spill_bytes} bytes spilled"
        else:
            failed += 1
            result = f"FAILED: {type(error).__name__}: {error}"
        print(f"{number}/{len(missing)} {'/'.join(key)}: {result}", flush=True)
    _write_table(rows.values())
    if failed:
        sys.exit(f"{failed} programs failed to compile")


def _compile_all(
    keys: Collection[tuple[str, str, str]], sources: dict[str, str]
) -> Iterator[tuple[tuple[str, str, str], concurrent.futures.Future[Row]]]:
    """Yields every program, compiled; other processes for each target, as `deviceless` asks for."""
    context = multiprocessing.get_context("spawn")
    for target in sorted({key[2] for key in keys}):
        with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
            compiled = {
                pool.submit(_compile, key, sources[key[0]]): key for key in keys if key[2] == target
            }
            for future in concurrent.futures.as_completed(compiled):
                yield compiled[future], future


if __name__ == "__main__":
    main(sys.argv[1:])
