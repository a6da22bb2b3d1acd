"""Cases that go wrong on purpose, for `--toy`: what goes wrong must cost one case and no more."""

import os
import time

import jax
import jax.numpy as jnp

from benchmarks.gpu_suite import programs
from benchmarks.gpu_suite.stage import Case, Context, Program, Row, Stage


def _fail(context: Context) -> Row:
    raise ValueError("this case fails on purpose")


def _hang(context: Context) -> Row:
    time.sleep(3600)
    return {}


def _crash(context: Context) -> Row:
    os.abort()


def _arguments() -> tuple[jax.ShapeDtypeStruct, ...]:
    return (jax.ShapeDtypeStruct((8,), jnp.float32),)


def _refused() -> tuple[jax.ShapeDtypeStruct, ...]:
    raise ValueError("this program does not compile, on purpose")


def _fatal() -> tuple[jax.ShapeDtypeStruct, ...]:
    os.abort()


def _double(x: jax.Array) -> jax.Array:
    return 2 * x


DOUBLE = Program("rehearsal: double", _double, _arguments)
REFUSED = Program("rehearsal: does not compile", _double, _refused)
FATAL = Program("rehearsal: crashes its compiler", _double, _fatal)


def _load(program: Program, context: Context) -> Row:
    double = programs.load(program, context)
    (twice,) = double(jnp.arange(8, dtype=jnp.float32))
    if float(twice[3]) != 6.0:
        raise ValueError(f"2 * 3 is {twice[3]}")
    return {"program": double.source}


def cases(context: Context) -> list[Case]:
    """Returns none on a GPU, whose time is too short for this."""
    if context.on_gpu:
        return []

    def loading(name: str, program: Program) -> Case:
        return Case(name, lambda context: _load(program, context), programs=lambda: (program,))

    return [
        Case("fails", _fail),
        Case("hangs", _hang, limit_s=0.5),
        Case("crashes", _crash),
        loading("does not compile", REFUSED),
        loading("crashes its compiler", FATAL),
        loading("works", DOUBLE),
    ]


EXPECTED = {
    "fails": "failed",
    "hangs": "timed out",
    "crashes": "crashed",
    "does not compile": "failed",
    "crashes its compiler": "failed",
    "works": "ok",
}
"""What becomes of them."""

STAGE = Stage("rehearsal", 60, cases, ("program",))
