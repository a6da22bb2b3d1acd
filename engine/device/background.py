"""Makes things in a thread of its own, one after the other, while others go on without them."""

import atexit
import logging
import threading
import weakref
from collections.abc import Callable

logger = logging.getLogger(__name__)


class Background[K]:
    """Runs `make` for one key after the other, in a thread that is there while any is left.

    When the process ends, it waits for the one that is under way and leaves out the others: an
    interpreter that has ended under a compiler crashes.
    """

    def __init__(self, make: Callable[[K], object]) -> None:
        """`make` is called with one key at a time, in another thread; what it raises is logged."""
        self._make = make
        self._lock = threading.Lock()
        self._waiting: list[K] = []
        self._done: dict[K, threading.Event] = {}  # of those that are waiting or under way
        self._thread: threading.Thread | None = None

    def start(self, key: K) -> None:
        """Makes the key's thing as soon as those before it are made; does nothing if it is one."""
        with self._lock:
            if key in self._done or _is_ending.is_set():
                return
            self._done[key] = threading.Event()
            self._waiting.append(key)
            if self._thread is None:
                _end_with_process()
                self._thread = threading.Thread(target=self._run, name="compiler", daemon=True)
                _threads.add(self._thread)
                self._thread.start()

    def settle(self, key: K) -> None:
        """Waits for what is under way for the key, or takes it back if it only waits."""
        with self._lock:
            done = self._done.get(key)
            if done is None:
                return
            if key in self._waiting:
                self._waiting.remove(key)
                del self._done[key]
                return
        done.wait()

    def wait(self) -> None:
        """Waits until nothing is left to make."""
        while (thread := self._thread) is not None:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._waiting or _is_ending.is_set():
                    self._thread = None
                    return
                key = self._waiting.pop(0)
            try:
                self._make(key)
            except Exception:
                logger.warning("%s was not compiled in the background", key, exc_info=True)
            with self._lock:
                self._done.pop(key).set()


_is_ending = threading.Event()
_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


def _end_with_process() -> None:
    """What is registered last is called first: before JAX forgets what a compilation needs.

    JAX registers that when it first needs it, which may be after the first of these threads began.
    """
    atexit.unregister(_end)
    atexit.register(_end)


def _end() -> None:
    _is_ending.set()
    for thread in list(_threads):
        thread.join()
