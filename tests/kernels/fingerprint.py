"""What the tables of kernels were made from: hashes of code, and of kernels."""

import ast
import hashlib
import pathlib
import re
from collections.abc import Callable, Iterable
from importlib import util
from typing import Any
from unittest import mock

from jax._src.pallas.mosaic_gpu import lowering

from pallas_paged.deviceless import lower_for

_OPS = "pallas_paged.ops"


def fingerprint(modules: Iterable[str], checks: Iterable[str] = ()) -> str:
    """Returns a hash of the modules' code, and of what they import of `ops`: no comments, no docs.

    Formatting and docstrings may change without anything being stale. Of `checks`, modules too, it
    is the code alone.
    """
    sources = sources_of(modules) | {name: code_of(name)[0] for name in checks}
    text = "\n".join(f"{name}: {sources[name]}" for name in sorted(sources))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def kernels_hash(target: str, function: Callable[..., Any], *args: Any) -> str:
    """Returns a hash of the kernels that `kernel_resources`, with the same arguments, compiles.

    Of what JAX makes of them for the compiler, layouts, options and constants included. Where a
    line of code stands is not in it, nor what XLA computes around the kernels.
    """
    kernels: list[str] = []
    lower = lowering.lower_jaxpr_to_module

    def lower_and_note(*args: Any, **kwargs: Any) -> Any:
        result = lower(*args, **kwargs)
        kernels.append(result.module.operation.get_asm(enable_debug_info=False))
        return result

    with mock.patch.object(lowering, "lower_jaxpr_to_module", lower_and_note):
        lower_for(target, function, *args)
    assert kernels, "the program has no Mosaic GPU kernel"
    # A name for dumps, which counts the kernels that the process has lowered before.
    text = re.sub(r'mosaic_gpu\.dump_basename = "[^"]*"', "", "\n".join(kernels))
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
