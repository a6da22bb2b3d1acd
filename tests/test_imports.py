"""Imports form a tree: engine -> models -> pallas_paged, benchmarks and tests on top."""

import ast
import pathlib
import sys
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parent.parent
LAYERS = {
    "pallas_paged": ("pallas_paged.engine", "pallas_paged.models", "benchmarks", "tests"),
    "models": ("pallas_paged.engine", "benchmarks", "tests"),
    "engine": ("benchmarks", "tests"),
    "benchmarks": ("tests",),
    "tests": (),
}
HOST_ONLY = ("scheduler", "sequence", "sampling_params", "outputs", "stop", "detokenizer")
FIRST_PARTY = ("pallas_paged", "models", "engine", "benchmarks", "tests")


def python_files() -> list[pathlib.Path]:
    # rglob does not follow the two links inside pallas_paged.
    return sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))


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


def problems(path: pathlib.Path) -> list[str]:
    layer = path.relative_to(ROOT).parts[0]
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
                if module.split(".")[0] in FIRST_PARTY:
                    found.append(f"line {node.lineno}: {module} is imported inside a function")
    return found


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: pathlib.Path) -> None:
    assert problems(path) == []


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("pallas_paged", "from pallas_paged.models import load_model"),
        ("pallas_paged", "from pallas_paged import engine"),
        ("models", "import pallas_paged.engine.core"),
        ("engine", "import models"),
        ("tests", "from engine.core import Engine"),
        ("engine", "def f():\n    from pallas_paged.models import load_model"),
    ],
)
def test_a_wrong_import_is_found(
    layer: str, source: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.test_imports.ROOT", tmp_path)
    (tmp_path / layer).mkdir()
    path = tmp_path / layer / "wrong.py"
    path.write_text(source)
    assert len(problems(path)) >= 1


def test_the_kernels_need_jax_and_numpy_only() -> None:
    allowed = {"jax", "numpy", "jaxtyping", "pallas_paged", *sys.stdlib_module_names}
    for path in python_files():
        if path.relative_to(ROOT).parts[0] == "pallas_paged":
            loaded = {module.split(".")[0] for _, module in imports(ast.parse(path.read_text()))}
            assert loaded <= allowed, f"{path}: {sorted(loaded - allowed)}"


@pytest.mark.parametrize("name", HOST_ONLY)
def test_the_scheduler_needs_no_jax(name: str) -> None:
    tree = ast.parse((ROOT / "engine" / f"{name}.py").read_text())
    loaded = {module.split(".")[0] for _, module in imports(tree)}
    assert loaded.isdisjoint({"jax", "flax", "numpy"})
