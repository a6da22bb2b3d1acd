"""Lets a program that calls kernels be traced and compiled before these are.

Numba compiles a kernel for seconds, and so does XLA a program. Who traces inside `kernels_later`
does not wait for the first, and has to wait before the program runs.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

_put_off: contextvars.ContextVar[dict[str, Callable[[], object]] | None] = contextvars.ContextVar(
    "kernels_put_off", default=None
)


@contextlib.contextmanager
def kernels_later(kernels: dict[str, Callable[[], object]]) -> Iterator[None]:
    """Puts off what is to be compiled for programs that are traced inside, in this thread.

    Args:
      kernels: gets, by name, functions to be called before such a program runs, in any order. Each
        compiles a kernel, or waits for the thread that does; called again it does nothing.
    """
    token = _put_off.set(kernels)
    try:
        yield
    finally:
        _put_off.reset(token)


def now_or_later(name: str, compile_kernel: Callable[[], object]) -> None:
    """Compiles a kernel, or inside `kernels_later` leaves that to who waits."""
    kernels = _put_off.get()
    if kernels is None:
        compile_kernel()
    else:
        kernels[name] = compile_kernel
