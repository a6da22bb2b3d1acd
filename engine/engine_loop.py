"""Runs an engine's core in a thread of its own: changes go in, and what steps give comes out.

The thread waits for the device and for new work, and for nobody else. What it has to tell goes to
one function, in order: the outputs of steps, and what became of the changes between them.
"""

import concurrent.futures
import logging
import queue
import threading
from collections.abc import Callable
from typing import NamedTuple

from pallas_paged.engine.core.core_output import CoreOutputs, NewTokens
from pallas_paged.engine.core.engine_core import EngineCore
from pallas_paged.engine.core.request import SequenceGroup
from pallas_paged.engine.errors import ended

logger = logging.getLogger(__name__)

MAX_FAILURES = 3
"""So many failures with no token between them end the loop."""
MAX_BEHIND = 16
"""The outputs of so many steps may be on their way to whoever takes them; then the loop waits."""


class Added(NamedTuple):
    """A request was taken in; its outputs come later."""

    request_id: str
    group: SequenceGroup


class Refused(NamedTuple):
    """A request was not taken in; nothing comes of it."""

    request_id: str
    error: Exception


class Gone(NamedTuple):
    """A request that was left has given its blocks back; nothing more comes of it."""

    request_id: str


class Failed(NamedTuple):
    """A step failed, or a change before it, and all requests with it.

    Attributes:
      error: what was raised.
      is_dead: whether the loop has ended, so that no further step runs.
    """

    error: BaseException
    is_dead: bool


type Event = CoreOutputs | Added | Refused | Gone | Failed


class _Change(NamedTuple):
    """What a thread asks of the loop: to be made between steps, or dropped when it has ended."""

    make: Callable[[], None]
    drop: Callable[[], object]


class EngineLoop:
    """Owns a core while its thread runs; all other threads go through the methods.

    Args:
      core: of nobody else.
      deliver: called with each event, in order, in the loop's thread, or in the thread of a change
        that comes after its end. It must neither wait nor fail.

    Attributes:
      death: what has ended the loop; None unless it was an error.
    """

    def __init__(self, core: EngineCore, deliver: Callable[[Event], None]) -> None:
        """Starts nothing yet."""
        self.death: BaseException | None = None
        self._core = core
        self._deliver = deliver
        self._inbox: queue.SimpleQueue[_Change] = queue.SimpleQueue()
        self._has_ended = False
        # A collector of garbage may call `stop` in a thread that holds it.
        self._ending = threading.RLock()
        self._is_stopping = False
        self._num_failures = 0  # since the last token
        # Each of these counts is written by one thread, and read by the other.
        self._num_asked = self._num_answered = 0  # requests that are to be added
        self._num_delivered = self._num_taken = 0  # outputs of steps
        self._is_held_up = False
        # A daemon: an interpreter that exits without `stop` must not wait for it.
        self._thread = threading.Thread(target=self._run, name="engine-loop", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether steps can run; never in a forked child, which has not got the thread."""
        return self.death is None and self._thread.is_alive()

    @property
    def num_waiting(self) -> int:
        """Requests that wait to be taken in, or for blocks, as it was a moment ago."""
        return self._core.scheduler.num_waiting + self._num_asked - self._num_answered

    def add(self, request_id: str, make_group: Callable[[], SequenceGroup]) -> None:
        """Takes a request in before the next step: `Added` or, for any `Exception`, `Refused`.

        `make_group` is called in the loop's thread, where it may read what steps change.
        """

        def add() -> None:
            self._num_answered += 1
            try:
                group = make_group()
                self._core.scheduler.check(group)
            except Exception as error:
                self._deliver(Refused(request_id, error))
                return
            self._deliver(Added(request_id, group))
            self._core.add(group)

        def drop() -> None:
            self._num_answered += 1
            self._deliver(Refused(request_id, ended(self.death)))

        self._num_asked += 1
        self._put(_Change(add, drop))

    def abort(self, request_id: str) -> None:
        """Ends a request before the next step, in whichever state it is.

        Its last outputs are delivered, unless it is unknown or has had them.
        """

        def abort() -> None:
            outputs = self._core.abort(request_id)
            if outputs:
                self._deliver_outputs(CoreOutputs(outputs, NewTokens([], [], [])))

        self._put(_Change(abort, lambda: None))

    def leave(self, request_id: str) -> None:
        """Ends a request likewise, for whose outputs nobody waits; `Gone` is delivered."""

        def leave() -> None:
            try:
                self._core.abort(request_id)
            finally:  # if it fails, all requests have failed, and this one is gone with them
                self._deliver(Gone(request_id))

        self._put(_Change(leave, lambda: self._deliver(Gone(request_id))))

    def finish(self, request_id: str, index: int, stop_reason: str) -> None:
        """Ends a sequence by "stop" before the next step; see `EngineCore.finish`."""

        def finish() -> None:
            self._core.finish(request_id, index, stop_reason)

        self._put(_Change(finish, lambda: None))

    def call[T](self, function: Callable[[], T]) -> concurrent.futures.Future[T]:
        """Calls a function in the loop's thread, between steps, and returns its result to come.

        What it raises is the result's, and ends nothing else: it must change nothing then. If the
        loop ends before, that is an `EngineDeadError`.
        """
        future: concurrent.futures.Future[T] = concurrent.futures.Future()

        def make() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:
                    future.set_exception(error)

        def drop() -> None:
            if future.set_running_or_notify_cancel():
                future.set_exception(ended(self.death))

        self._put(_Change(make, drop))
        return future

    def note_taken(self) -> None:
        """To be called when the outputs of a step have been taken in, by one and the same thread.

        Where that takes longer than the steps the loop waits for it: a token that is not given out
        is nobody's gain, and would only let the others wait behind it.
        """
        self._num_taken += 1
        if self._is_held_up and not self._is_behind:
            self._put(_Change(lambda: None, lambda: None))

    def stop(self, timeout_s: float | None = None) -> bool:
        """Ends the thread after the step that it is at; returns whether it has ended in time."""

        def stop() -> None:
            self._is_stopping = True

        self._put(_Change(stop, lambda: None))
        # A collector of garbage may call this in the thread itself.
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _put(self, change: _Change) -> None:
        with self._ending:
            if self._has_ended:
                change.drop()
            else:
                self._inbox.put(change)

    def _run(self) -> None:
        try:
            while not self._is_stopping:
                try:
                    self._make_changes()
                    if not self._is_stopping and self._core.has_unfinished:
                        self._step()
                except Exception as error:
                    self._fail(error)
        except BaseException as error:  # whatever it is: somebody waits
            logger.critical("the engine loop has ended: %s", error, exc_info=error)
            self.death = error
            self._deliver(Failed(error, is_dead=True))
        finally:
            with self._ending:  # what is put in now is dropped behind what came before
                self._has_ended = True
                while not self._inbox.empty():
                    self._inbox.get().drop()

    def _make_changes(self) -> None:
        """Makes the changes that have come; waits for one if there is nothing else to do."""
        while not self._is_stopping and (self._must_wait() or not self._inbox.empty()):
            self._inbox.get().make()

    def _must_wait(self) -> bool:
        self._is_held_up = True  # first: `note_taken` looks at it last
        self._is_held_up = self._is_behind
        return self._is_held_up or not self._core.has_unfinished

    @property
    def _is_behind(self) -> bool:
        return self._num_delivered - self._num_taken >= MAX_BEHIND

    def _step(self) -> None:
        num_tokens = self._core.num_generated_tokens
        outputs = self._core.step()
        if self._core.num_generated_tokens > num_tokens:  # a step that is only dispatched may fail
            self._num_failures = 0
        self._deliver_outputs(outputs)

    def _deliver_outputs(self, outputs: CoreOutputs) -> None:
        self._num_delivered += 1
        self._deliver(outputs)

    def _fail(self, error: Exception) -> None:
        """Ends all requests; raises the error if it is one too many."""
        self._num_failures += 1
        if self._num_failures == MAX_FAILURES:
            raise error
        logger.error("a step failed, and all requests with it: %s", error, exc_info=error)
        self._core.reset()
        self._deliver(Failed(error, is_dead=False))
