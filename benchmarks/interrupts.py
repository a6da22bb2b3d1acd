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

Handler = Callable[[int, FrameType | None], Any]


class _Held:
    """Signals that came while the main thread was in blocks of `held`."""

    depth = 0
    came: list[signal.Signals] = []  # noqa: RUF012


def interrupt_on_sigterm(handler: Handler = signal.default_int_handler) -> None:
    """Makes SIGTERM call `handler`, which raises KeyboardInterrupt unless another one is given.

    Python prints an exception that is raised in a callback of the garbage collector, of which jax
    has one, or in `__del__`, and goes on as if there had been none. An interrupt that ends there is
    raised again. Takes SIGALRM and `sys.unraisablehook` for it. SIGINT does what it did, but for
    `held`.
    """
    signal.signal(signal.SIGTERM, _unless_held(handler))
    signal.signal(signal.SIGALRM, _unless_held(handler))
    if callable(before := signal.getsignal(signal.SIGINT)):
        signal.signal(signal.SIGINT, _unless_held(before))
    sys.unraisablehook = _raise_again


def _unless_held(handler: Handler) -> Handler:
    def handle(number: int, frame: FrameType | None) -> None:
        if _Held.depth:
            _Held.came.append(signal.Signals(number))
        else:
            handler(number, frame)

    return handle


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Keeps interrupts back until the block is left: what is begun in it can be ended afterwards.

    An interrupt inside of `Thread.start` or `Popen` would leave a thread or a process that nobody
    knows of. Threads other than the main one are never interrupted. The signals are those of
    `interrupt_on_sigterm`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _Held.depth += 1
    try:
        yield
    finally:
        _Held.depth -= 1
        if not _Held.depth and _Held.came:
            first = _Held.came[0]
            _Held.came.clear()
            signal.raise_signal(first)


def _raise_again(unraisable: "sys.UnraisableHookArgs") -> None:
    if issubclass(unraisable.exc_type, KeyboardInterrupt | SystemExit):
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)
    else:
        sys.__unraisablehook__(unraisable)
