"""Threads that use one engine, one after the other."""

import contextlib
import os
import threading
from types import TracebackType


class Turns:
    """A context manager that one thread at a time is in; the same thread may be in it again.

    Who waits comes next, and not the thread that has just left: two that take turns step by step
    both get on. In a forked child, where the device and the thread that holds the turn are not,
    everybody is refused.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()
        # The thread that has one of them may take it again: right behind `acquire`, where it is not
        # the owner yet, the collector of garbage may close a stream, which takes a turn of its own.
        self._next, self._held = threading.RLock(), threading.RLock()
        self._owner: int | None = None
        self._depth = 0

    @property
    def is_here(self) -> bool:
        """Whether this is the process that it was made in."""
        return os.getpid() == self._pid

    @property
    def is_nested(self) -> bool:
        """Whether the thread whose turn it is was in it already when it came in again."""
        return self._depth > 1

    def __enter__(self) -> None:
        if not self.is_here:
            raise RuntimeError(
                f"this LLM belongs to process {self._pid}, and a forked child ({os.getpid()}) has "
                "neither its threads nor its device: build an LLM in the child, or start it with "
                "multiprocessing.get_context('spawn')"
            )
        me = threading.get_ident()
        if self._owner == me:
            self._depth += 1
            return
        try:
            with self._next:  # held until it is this thread's turn: nobody overtakes it
                self._held.acquire()
                self._owner, self._depth = me, 1
        except BaseException:  # an interrupt, while this thread waited or right afterwards
            if self._owner == me:
                self._owner = None
            with contextlib.suppress(RuntimeError):  # it was not its turn yet
                self._held.release()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._depth -= 1
        if not self._depth:
            self._owner = None
            self._held.release()
