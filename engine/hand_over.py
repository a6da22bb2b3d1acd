"""Brings what one thread has to say to the event loop of another."""

import asyncio
import collections
import contextlib
import weakref
from collections.abc import Callable


class HandOver[T]:
    """Calls a function with each item that was put in, in order, in the thread of an event loop.

    Many items may come with one wake-up of the event loop, but none that was put in after it: its
    other callbacks have their turn first. Until it is bound to one, and while that is closed, items
    are kept.

    Args:
      take: a bound method, which is called while its object lives: the thread that puts items in
        must not keep alive whom it works for. An item on which it fails is lost.

    Attributes:
      event_loop: where it is called; None at first.
    """

    def __init__(self, take: Callable[[T], None]) -> None:
        """Holds nothing yet."""
        self.event_loop: asyncio.AbstractEventLoop | None = None
        self._take = weakref.WeakMethod(take)
        self._items: collections.deque[T] = collections.deque()
        self._is_woken = False

    def put(self, item: T) -> None:
        """Takes an item, in any thread."""
        self._items.append(item)
        if not self._is_woken:
            self._wake()

    def bind(self, event_loop: asyncio.AbstractEventLoop) -> None:
        """Lets items come to an event loop, which runs this; those that are kept come now."""
        self.event_loop = event_loop  # first: what is put in from here on wakes this one
        self._take_all()

    def _wake(self) -> None:
        if self.event_loop is None:
            return
        self._is_woken = True
        with contextlib.suppress(RuntimeError):  # it is closed
            self.event_loop.call_soon_threadsafe(self._take_all)

    def _take_all(self) -> None:
        self._is_woken = False  # first: what is put in from here on wakes again
        take = self._take()
        try:
            for _ in range(len(self._items)):
                item = self._items.popleft()
                if take is not None:
                    take(item)
        finally:
            if self._items and not self._is_woken:  # those behind one that failed
                self._wake()
