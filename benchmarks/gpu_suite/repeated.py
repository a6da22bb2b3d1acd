"""A program that runs many times on the same inputs, and what its results must be.

How a kernel divides its work is fixed: if it does not give the same bits each time, its thread
blocks race. Inputs and expected results are worked out on the CPU, by other processes and with the
float32 reference, and lie in a file; no operation compiles while a case runs.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.gpu_suite import programs
from benchmarks.gpu_suite.stage import Context, Program, Row
from pallas_paged import dispatch

REPEATS = 50
INTERPRETED_REPEATS = 2
_RESULTS_AT_ONCE = 10
"""That are on the device; then they are fetched and compared."""

Arrays = Mapping[str, np.ndarray]
Results = list[np.ndarray]


class Problem(NamedTuple):
    """What is computed, and how to tell whether it is right.

    Attributes:
      name: of the file with the arrays; unique in the suite.
      program: takes inputs and gives them back unharmed.
      make: returns the program's arguments, and by name whatever `judge` needs; jax's default
        device is the CPU then.
      judge: takes what `make` returned by name, and the leaves of the results; returns figures, and
        as "wrong" in words what is wrong, empty if nothing is.
      repeats: how often the program runs.
      ignored: leading rows of each result that may hold anything: the null block.
      interpreted: whether the program has kernels that must be interpreted.
    """

    name: str
    program: Program
    make: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]
    judge: Callable[[Arrays, Results], Row]
    repeats: int
    ignored: int = 0
    interpreted: bool = False


def prepare(problem: Problem, context: Context) -> None:
    """Writes the arrays, unless they are there."""
    keep(problem.name, problem.make, context)


def keep(
    name: str, make: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]], context: Context
) -> None:
    """Writes arguments and whatever else there is, made on the CPU, unless they are there."""
    path = programs.path_of(name, context, ".npz")
    if path.exists():
        return
    with (
        jax.default_device(jax.devices("cpu")[0]),
        jax.default_matmul_precision("highest"),
    ):
        arguments, expected = make()
        arrays = {f"argument {i:03}": leaf for i, leaf in enumerate(jax.tree.leaves(arguments))}
        # Two cases may have the same arrays, and two processes make them at a time.
        own = path.with_name(f"{os.getpid()}-{path.name}")
        programs.save_arrays(own, arrays | expected)
        own.replace(path)


def kept(name: str, context: Context) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """Returns the leaves of the arguments, and the rest by name."""
    arrays = programs.load_arrays(programs.path_of(name, context, ".npz"))
    keys = sorted(key for key in arrays if key.startswith("argument "))
    return [arrays.pop(key) for key in keys], arrays


def run(problem: Problem, context: Context) -> Row:
    """Runs the program on the arrays that were prepared; returns figures and a status.

    And as `program` where it comes from, see `programs.Loaded`.
    """
    call: Callable[..., Sequence[jax.Array]]
    if problem.interpreted:
        call, source = _interpreted(problem.program), "interpreted"
    else:
        call = loaded = programs.load(problem.program, context)
        source = loaded.source
    arguments, expected = kept(problem.name, context)
    inputs = [jax.device_put(argument) for argument in arguments]
    first: Results = []
    differing = 0
    for begin in range(0, problem.repeats, _RESULTS_AT_ONCE):
        count = min(_RESULTS_AT_ONCE, problem.repeats - begin)
        for result in [call(*inputs) for _ in range(count)]:
            host = [np.asarray(leaf)[problem.ignored :] for leaf in result]
            first = first or host
            differing += not same_bits(first, host)
    row = verdict(problem.judge(expected, first), problem.repeats, differing)
    return row | {"program": source}


def same_bits(some: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> bool:
    """Whether arrays are equal bit for bit."""
    return all(differing_bytes(*pair) == 0 for pair in zip(some, others, strict=True))


def differing_bytes(one: np.ndarray, other: np.ndarray) -> int:
    """Returns how many bytes differ in two arrays of one shape and dtype."""
    assert (one.shape, one.dtype) == (other.shape, other.dtype), (one.shape, other.shape)
    bits = [np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (one, other)]
    return int(np.count_nonzero(bits[0] != bits[1]))


def verdict(row: Row, repeats: int, differing: int) -> Row:
    """Returns a case's row: failed if something is wrong, or if any repeat differs."""
    wrong = row.pop("wrong")
    if differing:
        wrong = [*wrong, f"{differing} of {repeats} runs differ from the first"]
    figures = {"repeats": repeats, "differing_repeats": differing}
    if wrong:
        return {"status": "failed", "reason": "; ".join(wrong)} | row | figures
    return {"status": "ok"} | row | figures


def _interpreted(program: Program) -> Callable[..., list[jax.Array]]:
    """Returns a program whose kernels are interpreted, as a function of leaves to leaves."""
    jitted = jax.jit(program.function)
    tree = jax.tree.structure(program.arguments())

    def call(*leaves: jax.Array) -> list[jax.Array]:
        with dispatch.interpret_kernels():
            return jax.tree.leaves(jitted(*jax.tree.unflatten(tree, leaves)))

    return call
