"""Interrupts of a program that ends what it started: SIGTERM is one, and none gets lost."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

_AGAIN_S = 0.02
"""Seconds until a lost interrupt is raised again: the callback is left by then, mostly."""


def interrupt_on_sigterm(
    handler: Callable[[int, FrameType | None], Any] = signal.default_int_handler,
) -> None:
    """Makes SIGTERM call `handler`, which raises KeyboardInterrupt unless another one is given.

    Python prints an exception that is raised in a callback of the garbage collector, of which jax
    has one, or in `__del__`, and goes on as if there had been none. An interrupt that ends there is
    raised again. Takes SIGALRM and `sys.unraisablehook` for it.
    """
    signal.signal(signal.SIGTERM, handler)
    signal.signal(signal.SIGALRM, handler)
    sys.unraisablehook = _raise_again


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Keeps interrupts back until the block is left: what is begun in it can be ended afterwards.

    An interrupt inside of `Thread.start` or `Popen` would leave a thread or a process that nobody
    knows of. Threads other than the main one are never interrupted.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[signal.Signals] = []
    handlers = {}
    try:
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            handlers[each] = signal.getsignal(each)
            signal.signal(each, lambda number, _: came.append(signal.Signals(number)))
        yield
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)
        if came:
            signal.raise_signal(came[0])


def _raise_again(unraisable: "sys.UnraisableHookArgs") -> None:
    if issubclass(unraisable.exc_type, KeyboardInterrupt | SystemExit):
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)
    else:
        sys.__unraisablehook__(unraisable)
