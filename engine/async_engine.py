"""An engine whose steps run in a thread of their own, for the requests of one event loop.

That thread (`engine_loop`) hands on token ids. Text is made of them here, in the event loop's
thread, and given to whoever waits for it; a reader that does not come keeps nobody waiting.
"""

import asyncio
import collections
import dataclasses
import functools
import logging
import math
import time
import weakref
from collections.abc import Callable, Sequence

from pallas_paged.engine.core.core_output import CoreOutputs
from pallas_paged.engine.core.request import SequenceGroup
from pallas_paged.engine.engine_loop import Added, EngineLoop, Event, Gone, Refused
from pallas_paged.engine.errors import (
    DeadlineExceededError,
    EngineDeadError,
    EngineDrainingError,
    EngineError,
    ended,
    step_failed,
)
from pallas_paged.engine.hand_over import HandOver
from pallas_paged.engine.outputs import RequestOutput
from pallas_paged.engine.parts import EngineParts
from pallas_paged.engine.queue_limit import QueueLimit
from pallas_paged.engine.request_stream import RequestStream
from pallas_paged.engine.sampling_params import RequestOutputKind

logger = logging.getLogger(__name__)

_DRAIN_POLL_S = 0.02


@dataclasses.dataclass(slots=True, eq=False)
class _Entry:
    """A request that has not had its end.

    Attributes:
      stream: to its reader.
      prompt: its text, if it came as text.
      kind: what its outputs hold.
      taken_in: done when the core has it.
      deadline: ends it, if it has one.
    """

    stream: RequestStream
    prompt: str | None
    kind: RequestOutputKind
    taken_in: asyncio.Future[None]
    deadline: asyncio.TimerHandle | None = None

    def fail(self, error: Exception) -> None:
        """Tells whoever waits that nothing more comes."""
        self.stream.fail(error)
        if not self.taken_in.done() and not self.taken_in.get_loop().is_closed():
            self.taken_in.set_exception(error)
            self.taken_in.exception()  # it is no mistake that nobody waits any more


class AsyncEngine:
    """Hands requests to the thread of the steps, and their outputs to coroutines.

    All of it is used in the thread of one event loop; another one may follow when that is closed,
    or has no requests left.

    Args:
      parts: of nobody else.
      max_queued_requests: requests that may wait, beside those that run.

    Attributes:
      parts: as given; the core and its memory belong to the thread of the steps, see `call`.
      on_outputs: called with the outputs of a step, and when they came as `time.monotonic()`,
        before their readers have them; what it raises is logged. None at first.
    """

    def __init__(self, parts: EngineParts, max_queued_requests: int) -> None:
        """Starts the thread."""
        self.parts = parts
        self.on_outputs: Callable[[Sequence[RequestOutput], float], None] | None = None
        self._limit = QueueLimit(max_queued_requests)
        self._entries: dict[str, _Entry] = {}
        # Requests whose reader has gone, and that are not yet gone from the core. Changes are made
        # in their order: another request of the name may come, and is the one behind the last.
        self._leaving: collections.Counter[str] = collections.Counter()
        self._is_draining = self._is_shut_down = False
        self._events: HandOver[Event] = HandOver(self._take_event)
        self._loop = EngineLoop(parts.core, self._events.put)
        weakref.finalize(self, self._loop.stop)
        self._loop.start()

    # --- requests -----------------------------------------------------------------------------

    async def open(
        self,
        request_id: str,
        make_group: Callable[[], SequenceGroup],
        *,
        prompt: str | None,
        kind: RequestOutputKind,
        timeout_s: float | None = None,
    ) -> RequestStream:
        """Takes a request in, and returns the stream of its outputs.

        Args:
          request_id: different from all requests that have not ended.
          make_group: makes its group, by `EngineParts.intake`; called between two steps.
          prompt: its text, if it came as text.
          kind: what its outputs hold.
          timeout_s: seconds after which it is aborted, with `DeadlineExceededError`.

        Raises:
          ValueError: the id is in use, or `make_group` raises it.
          EngineError, RuntimeError: see `check_accepts`.
        """
        self.check_accepts()
        if request_id in self:
            raise ValueError(f"request_id={request_id!r} is in use; choose another")

        may_hold = self.parts.may_hold  # the thread must not hold this, whose end ends it

        def make_held_group() -> SequenceGroup:
            group = make_group()
            group.is_held = may_hold(group, kind)
            return group

        event_loop, is_delta = asyncio.get_running_loop(), kind is RequestOutputKind.DELTA
        stream = RequestStream(request_id, is_delta=is_delta, leave=self._leave)
        entry = _Entry(stream, prompt, kind, event_loop.create_future())
        if timeout_s is not None:
            entry.deadline = event_loop.call_later(timeout_s, self._expire, request_id, timeout_s)
        self._entries[request_id] = entry
        self._loop.add(request_id, make_held_group)
        try:
            await entry.taken_in
        except BaseException:
            stream.close()
            raise
        return stream

    def abort(self, request_id: str) -> None:
        """Ends a request before the next step; unknown and finished ones are ignored.

        Its stream gets a last output then, with `finish_reason="abort"` and what there is of it.
        """
        if request_id in self:
            self._loop.abort(request_id)

    async def call[T](self, function: Callable[[], T]) -> T:
        """Calls a function between two steps, where it may use the core, and returns its result.

        Raises:
          EngineDeadError: the engine has ended.
          BaseException: what the function raises; it must have changed nothing then.
        """
        return await asyncio.wrap_future(self._loop.call(function))

    # --- state --------------------------------------------------------------------------------

    def __contains__(self, request_id: str) -> bool:
        """Whether a request of that name has not had its end."""
        return request_id in self._entries

    @property
    def num_open_requests(self) -> int:
        """Requests that have not had their end."""
        return len(self._entries)

    @property
    def is_running(self) -> bool:
        """Whether steps can run."""
        return not self._is_shut_down and self._loop.is_running

    @property
    def is_dead(self) -> bool:
        """Whether the engine has ended by an error."""
        return self._loop.death is not None

    @property
    def dead_error(self) -> EngineDeadError:
        """What requests get once the engine has ended."""
        if self._loop.death is None and not self._is_shut_down:
            return EngineDeadError(
                "the engine's thread is not in this process; a forked child needs an engine of its "
                "own"
            )
        return ended(self._loop.death)

    def check_accepts(self) -> None:
        """Tells whether a request of the running event loop would be taken in now.

        Raises:
          EngineDeadError, EngineDrainingError, EngineOverloadedError: it would not.
          RuntimeError: requests of another event loop are unfinished.
        """
        if not self.is_running:
            raise self.dead_error
        if self._is_draining:
            raise EngineDrainingError("the engine is shutting down and takes no new requests")
        self._bind()
        self._limit.check(self._loop.num_waiting)

    # --- the end ------------------------------------------------------------------------------

    async def drain(self, timeout_s: float | None = None) -> bool:
        """Takes no new requests, and waits for those that it has; returns whether all ended.

        Raises:
          RuntimeError: they are of another event loop.
        """
        self._is_draining = True
        self._bind()
        end = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while self._entries and time.monotonic() < end:
            await asyncio.sleep(min(_DRAIN_POLL_S, max(0.0, end - time.monotonic())))
        return not self._entries

    async def shutdown(self, drain_s: float = 0.0) -> None:
        """Ends the engine and its thread; requests that are unfinished after `drain_s` fail."""
        self._is_draining = True
        if drain_s:
            await self.drain(drain_s)
        self._fail_all(lambda: EngineDrainingError("the engine has been shut down"))
        self._is_shut_down = True
        await asyncio.get_running_loop().run_in_executor(None, self._loop.stop)

    # --- ends of requests ---------------------------------------------------------------------

    def _leave(self, request_id: str) -> None:
        """Ends a request whose reader goes."""
        self._end(request_id, EngineError(f"request {request_id!r} was left by its reader"))

    def _expire(self, request_id: str, timeout_s: float) -> None:
        what = f"request {request_id!r} was not done after {timeout_s:g} s, and was aborted"
        self._end(request_id, DeadlineExceededError(what))

    def _fail_all(self, make_error: Callable[[], EngineError], added_only: bool = False) -> None:
        """Ends all requests, or those that the core has had, each with an error of its own."""
        for request_id, entry in list(self._entries.items()):
            if entry.taken_in.done() or not added_only:
                self._end(request_id, make_error())

    def _end(self, request_id: str, error: EngineError) -> None:
        """Ends an open request now, and in the core before the next step."""
        entry = self._remove(request_id)
        self._let_go(request_id)
        if request_id in self.parts.processor:
            self._note([self.parts.processor.fail(request_id, str(error))])
        entry.fail(error)

    def _remove(self, request_id: str) -> _Entry:
        entry = self._entries.pop(request_id)
        if entry.deadline is not None:
            entry.deadline.cancel()
        return entry

    def _let_go(self, request_id: str) -> None:
        """Ends a request in the core, whatever still comes of it."""
        self._leaving[request_id] += 1
        self._loop.leave(request_id)

    # --- events -------------------------------------------------------------------------------

    def _bind(self) -> None:
        """Lets events come to the running event loop, if they do not yet."""
        event_loop, before = asyncio.get_running_loop(), self._events.event_loop
        if event_loop is before:
            return
        if self._entries and before is not None:
            if not before.is_closed():
                raise RuntimeError(
                    "this engine serves requests of another event loop; use that one, or an "
                    "engine of its own for each"
                )
            self._fail_all(lambda: EngineError("the event loop of the request was closed"))
        self._events.bind(event_loop)

    def _take_event(self, event: Event) -> None:
        """Takes in what the thread of the steps has to tell."""
        if isinstance(event, CoreOutputs):
            try:
                self._take_outputs(event)
            except BaseException as error:  # nobody may wait for what is lost here
                self._fail_all(functools.partial(step_failed, error), added_only=True)
                if not isinstance(error, Exception):
                    raise
                logger.error("outputs were lost: %s", error, exc_info=error)
            finally:
                self._loop.note_taken()
        elif isinstance(event, Added):
            self._take_added(event)
        elif isinstance(event, Refused):
            self._take_refused(event)
        elif isinstance(event, Gone):
            self._leaving[event.request_id] -= 1
            if not self._leaving[event.request_id]:
                del self._leaving[event.request_id]
        elif event.is_dead:
            self._fail_all(lambda: self.dead_error)
        else:
            self._fail_all(functools.partial(step_failed, event.error), added_only=True)

    def _take_outputs(self, event: CoreOutputs) -> None:
        processed = self.parts.processor.process(*event)
        for ending in processed.endings:
            self._loop.finish(*ending)
        for request_id in processed.faults:
            self._let_go(request_id)
        self._note(processed.outputs)
        for output in processed.outputs:
            entry = self._entries[output.request_id]
            if output.finished:
                self._remove(output.request_id)
                self._limit.note_finished()
            entry.stream.put(output)

    def _note(self, outputs: list[RequestOutput]) -> None:
        self.parts.counts.note(outputs)
        if self.on_outputs is not None and outputs:
            try:
                self.on_outputs(outputs, time.monotonic())
            except Exception as error:  # who only watches ends no request
                logger.error("on_outputs failed: %s", error, exc_info=error)

    def _entry_of(self, event: Added | Refused) -> _Entry | None:
        """Returns whose answer an event is; None if that one has left meanwhile."""
        has_left = event.request_id in self._leaving
        return None if has_left else self._entries[event.request_id]

    def _take_added(self, event: Added) -> None:
        entry = self._entry_of(event)
        if entry is None:
            return
        try:
            self.parts.open(event.group, entry.prompt, entry.kind)
        except Exception as error:
            self._end(event.request_id, step_failed(error))
            return
        if not entry.taken_in.done():  # else cancelled a moment ago
            entry.taken_in.set_result(None)

    def _take_refused(self, event: Refused) -> None:
        entry = self._entry_of(event)
        if entry is not None:
            self._remove(event.request_id).fail(event.error)
