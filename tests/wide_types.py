"""Finds 64-bit types in programs: where a dtype was left to JAX's default."""

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax

WIDE = ("float64", "int64", "uint64", "complex128")
ROOT = str(pathlib.Path(__file__).parent.parent)


def wide_types(function: Callable[..., Any], *args: Any) -> set[str]:
    """Returns which operations of ours have 64-bit results where `jax_enable_x64` is on.

    Python's numbers alone do not count: they take the type of what they meet.
    """
    with jax.enable_x64(True):
        jaxpr = jax.make_jaxpr(function)(*args)
    return set(_wide(jaxpr.jaxpr))


def _wide(jaxpr: Any) -> Iterator[str]:
    for equation in jaxpr.eqns:
        inner = [one for param in equation.params.values() for one in _jaxprs(param)]
        for one in inner:
            yield from _wide(one)
        for result in equation.outvars:
            aval = result.aval
            is_number = getattr(aval, "weak_type", False) and not aval.shape
            if not inner and str(getattr(aval, "dtype", "")) in WIDE and not is_number:
                yield f"{_place(equation)}: {equation.primitive} {aval.str_short()}"


def _place(equation: Any) -> str:
    """Returns the line of ours that an operation comes from."""
    frames = equation.source_info.traceback.frames if equation.source_info.traceback else ()
    ours = [f for f in frames if f.file_name.startswith(ROOT) and "/.venv/" not in f.file_name]
    return f"{ours[0].file_name[len(ROOT) + 1 :]}:{ours[0].line_num}" if ours else "?"


def _jaxprs(param: Any) -> Iterator[Any]:
    for one in param if isinstance(param, tuple | list) else (param,):
        if hasattr(one, "jaxpr"):
            yield one.jaxpr
        elif hasattr(one, "eqns"):
            yield one
