"""Interrupts of a program that ends what it started: SIGTERM is one, and none gets lost."""

import signal
import sys
from collections.abc import Callable
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


def _raise_again(unraisable: "sys.UnraisableHookArgs") -> None:
    if issubclass(unraisable.exc_type, KeyboardInterrupt | SystemExit):
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)
    else:
        sys.__unraisablehook__(unraisable)
