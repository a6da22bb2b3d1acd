"""Imports form a tree: engine -> models -> pallas_paged, benchmarks and tests on top.

Inside the engine the wings form one too, and no module is without a sentence that says what it is.
"""

import ast
import collections
import graphlib
import pathlib
import sys
from collections.abc import Iterator, Mapping

import pytest

ROOT = pathlib.Path(__file__).parent.parent
LAYERS = {
    "pallas_paged": ("pallas_paged.engine", "pallas_paged.models", "benchmarks", "tests"),
    "models": ("pallas_paged.engine", "benchmarks", "tests"),
    "engine": ("benchmarks", "tests"),
    "benchmarks": ("tests",),
    "tests": (),
}
ENGINE = "pallas_paged.engine"
JAX = ("jax", "flax")
SERVE = f"{ENGINE}.serve"
FORBIDDEN = {
    "kv": (*JAX, f"{ENGINE}.core", f"{ENGINE}.text", f"{ENGINE}.device", SERVE),
    "core": (*JAX, f"{ENGINE}.text", f"{ENGINE}.device", SERVE),
    "text": (*JAX, f"{ENGINE}.device", SERVE),
    "device": (f"{ENGINE}.text", SERVE),
    "serve.parsers": (*JAX, *(f"{ENGINE}.{wing}" for wing in ("kv", "core", "text", "device"))),
}
"""What the modules in a wing of the engine must not reach, through whichever modules."""
USE_BLOCK_TABLES = (f"{ENGINE}.kv.block_memory", f"{ENGINE}.kv.stats")
"""May reach jax all the same: the functions on block tables are written for it and for NumPy."""
MAX_ENGINE_LINES = 350
LIBRARY = ("pallas_paged", "models", "engine")
NUMBA = tuple(f"pallas_paged.ops.{name}" for name in ("cpu", "attention.cpu", "product.cpu"))
LAZY = (*(f"{package}.kernel" for package in NUMBA[1:]), "pallas_paged.ops.cpu.vectors")
"""May be imported inside a function: who computes on a GPU need not wait for Numba."""


def python_files(root: pathlib.Path) -> list[pathlib.Path]:
    # rglob does not follow the two links inside pallas_paged.
    return sorted(path for layer in LAYERS for path in (root / layer).rglob("*.py"))


def imports(tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    """Yields each import statement with each module it may load."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            yield node, node.module or ""
            for alias in node.names:
                yield node, f"{node.module}.{alias.name}"


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def problems(path: pathlib.Path, root: pathlib.Path) -> list[str]:
    layer = path.relative_to(root).parts[0]
    tree = ast.parse(path.read_text())
    found = []
    for node, module in imports(tree):
        for upper in LAYERS[layer]:
            if is_in(module, upper):
                found.append(f"line {node.lineno}: {layer} imports {module}, which is above it")
        if is_in(module, "models") or is_in(module, "engine"):
            found.append(f"line {node.lineno}: {module} must be imported as pallas_paged.{module}")
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for node, module in imports(function):
                if module.split(".")[0] in LAYERS and module not in (*LAZY, *NUMBA):
                    found.append(f"line {node.lineno}: {module} is imported inside a function")
    return found


@pytest.mark.parametrize("path", python_files(ROOT), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: pathlib.Path) -> None:
    assert problems(path, ROOT) == []


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("pallas_paged", "from pallas_paged.models import load_model"),
        ("pallas_paged", "from pallas_paged import engine"),
        ("models", "import pallas_paged.engine.core.engine_core"),
        ("engine", "import models"),
        ("tests", "from engine.core import scheduler"),
        ("engine", "def f():\n    from pallas_paged.models import load_model"),
    ],
)
def test_a_wrong_import_is_found(layer: str, source: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / layer).mkdir()
    path = tmp_path / layer / "wrong.py"
    path.write_text(source)
    assert len(problems(path, tmp_path)) >= 1


def test_the_kernels_need_jax_and_numpy_only() -> None:
    """And those for CPUs Numba."""
    allowed = {"jax", "numpy", "jaxtyping", "pallas_paged", *sys.stdlib_module_names}
    for path in python_files(ROOT):
        if path.relative_to(ROOT).parts[0] == "pallas_paged":
            loaded = {module.split(".")[0] for _, module in imports(ast.parse(path.read_text()))}
            if any(is_in(module_name(path, ROOT), package) for package in NUMBA):
                loaded -= {"numba", "llvmlite"}
            assert loaded <= allowed, f"{path}: {sorted(loaded - allowed)}"


# --- the graph of the modules ---------------------------------------------------------------------

Graph = Mapping[str, set[str]]


def import_graph(root: pathlib.Path) -> Graph:
    """Returns by first-party module what it imports, by the modules' names.

    That is what an import statement names, be it for types only. The packages around it, whose
    `__init__` Python runs first, are left out: else each package that exports what is in it would
    be a circle.
    """
    paths = {module_name(path, root): path for path in python_files(root)}
    return {name: named_in(ast.parse(path.read_text()), paths) for name, path in paths.items()}


def module_name(path: pathlib.Path, root: pathlib.Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    if parts[0] in ("models", "engine"):
        parts = ("pallas_paged", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def named_in(tree: ast.AST, known: Mapping[str, object]) -> set[str]:
    """Returns the modules that a tree imports; a name in a package is one if it is `known`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else str(node.module) for name in full}
    return found


def circle(graph: Graph) -> list[str]:
    """Returns modules of which each is imported by the next, the first one again last; or none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def way_to(module: str, packages: tuple[str, ...], graph: Graph) -> list[str]:
    """Returns the shortest chain of imports from a module into one of the packages; or none."""
    ways, seen = collections.deque([[module]]), {module}
    while ways:
        way = ways.popleft()
        for name in sorted(graph.get(way[-1], ())):
            if any(is_in(name, package) for package in packages):
                return [*way, name]
            if name not in seen:
                seen.add(name)
                ways.append([*way, name])
    return []


def wing_problems(graph: Graph) -> list[str]:
    """Returns the chains of imports that leave a wing of the engine the wrong way."""
    found = []
    for module in graph:
        for wing, packages in FORBIDDEN.items():
            if is_in(module, f"{ENGINE}.{wing}"):
                if module in USE_BLOCK_TABLES:
                    packages = tuple(package for package in packages if package not in JAX)
                found.append(" -> ".join(way_to(module, packages, graph)))
    return sorted(filter(None, found))


@pytest.fixture(scope="module")
def graph() -> Graph:
    return import_graph(ROOT)


def test_the_graph_is_that_of_this_repository(graph: Graph) -> None:
    assert "pallas_paged.engine.core.plan" in graph["pallas_paged.engine.device.runner"]
    assert "pallas_paged.block_tables" in graph["pallas_paged.engine.kv.block_memory"]


def test_no_modules_import_each_other_in_a_circle(graph: Graph) -> None:
    assert circle(graph) == []


def test_the_wings_of_the_engine_keep_apart(graph: Graph) -> None:
    assert wing_problems(graph) == []


def write_tree(root: pathlib.Path, sources: Mapping[str, str]) -> Graph:
    """Writes modules, and an empty `__init__` where none is given; returns their graph."""
    for name, source in sources.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(source)
    return import_graph(root)


@pytest.mark.parametrize(
    ("sources", "modules"),
    [
        (
            {
                "engine/kv/a.py": "import pallas_paged.engine.kv.b",
                "engine/kv/b.py": "from typing import TYPE_CHECKING\n"
                "if TYPE_CHECKING:\n    from pallas_paged.engine.kv import a",
            },
            {"pallas_paged.engine.kv.a", "pallas_paged.engine.kv.b"},
        ),
        (
            {
                "models/__init__.py": "from pallas_paged.models.a import x",
                "models/a.py": "from pallas_paged.models.b import y",
                "models/b.py": "from pallas_paged.models import x",
            },
            {"pallas_paged.models", "pallas_paged.models.a", "pallas_paged.models.b"},
        ),
        (
            {
                "benchmarks/__init__.py": "from benchmarks.a import x",
                "benchmarks/a.py": "from benchmarks import b",
                "benchmarks/b.py": "import numpy",
            },
            set(),
        ),
    ],
)
def test_a_circle_is_found(
    sources: dict[str, str], modules: set[str], tmp_path: pathlib.Path
) -> None:
    assert set(circle(write_tree(tmp_path, sources))) == modules


@pytest.mark.parametrize(
    ("sources", "chain"),
    [
        ({"engine/core/a.py": "import jax.numpy as jnp"}, "core.a -> jax.numpy"),
        (
            {
                "engine/core/a.py": "from pallas_paged.engine import b",
                "engine/b.py": "from pallas_paged.kv_cache import KVCache",
                "pallas_paged/kv_cache.py": "from flax import nnx",
            },
            "core.a -> pallas_paged.engine.b -> pallas_paged.kv_cache -> flax",
        ),
        ({"engine/kv/a.py": "import pallas_paged.engine.core"}, "kv.a -> pallas_paged.engine.core"),
        (
            {"engine/kv/stats.py": "import jax\nimport pallas_paged.engine.text.stop"},
            "kv.stats -> pallas_paged.engine.text.stop",
        ),
        (
            {
                "engine/core/a.py": "from pallas_paged.engine.device import step",
                "engine/device/step.py": "import jax",
            },
            "core.a -> pallas_paged.engine.device.step",
        ),
        (
            {"engine/text/a.py": "from pallas_paged.engine.device.step import run_step"},
            "text.a -> pallas_paged.engine.device.step",
        ),
        (
            {"engine/device/a.py": "from pallas_paged.engine.text import stop"},
            "device.a -> pallas_paged.engine.text",
        ),
    ],
)
def test_a_way_out_of_a_wing_is_found(
    sources: dict[str, str], chain: str, tmp_path: pathlib.Path
) -> None:
    assert wing_problems(write_tree(tmp_path, sources)) == [f"{ENGINE}.{chain}"]


# --- what a file says of itself -------------------------------------------------------------------


def file_problems(path: pathlib.Path, root: pathlib.Path) -> list[str]:
    found, text = [], path.read_text()
    first_line = (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]
    if not first_line.endswith("."):
        found.append(f"the docstring's first line is no sentence: {first_line!r}")
    num_lines = len(text.splitlines())
    if path.relative_to(root).parts[0] == "engine" and num_lines > MAX_ENGINE_LINES:
        found.append(f"{num_lines} lines, and {MAX_ENGINE_LINES} are the most in engine/")
    return found


@pytest.mark.parametrize(
    "path",
    [path for path in python_files(ROOT) if path.relative_to(ROOT).parts[0] in LIBRARY],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_a_file_begins_with_a_sentence_and_is_not_long(path: pathlib.Path) -> None:
    assert file_problems(path, ROOT) == []


@pytest.mark.parametrize(
    ("name", "source", "num_problems"),
    [
        ("models/a.py", '"""What it is."""\n', 0),
        ("models/a.py", '"""What it is.\n\nMore of it"""\n' + "\n" * 350, 0),
        ("models/a.py", '"""What it is"""\n', 1),
        ("models/a.py", '"""What it\nis."""\n', 1),
        ("pallas_paged/a.py", "import jax\n", 1),
        ("engine/a.py", '"""What it is."""\n' + "\n" * 349, 0),
        ("engine/a.py", '"""What it is."""\n' + "\n" * 350, 1),
    ],
)
def test_a_file_without_a_sentence_or_too_long_is_found(
    name: str, source: str, num_problems: int, tmp_path: pathlib.Path
) -> None:
    write_tree(tmp_path, {name: source})
    assert len(file_problems(tmp_path / name, tmp_path)) == num_problems
