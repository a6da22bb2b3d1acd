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
from pallas_paged.engine.engine_loop import Added, EngineLoop, Event, Failed, Gone, Refused
from pallas_paged.engine.errors import (
    DeadlineExceededError,
    EngineDeadError,
    EngineDrainingError,
    EngineError,
    ended,
    step_failed,
)
from pallas_paged.engine.outputs import RequestOutput
from pallas_paged.engine.parts import EngineParts, is_held
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
        before their readers have them; None at first.
    """

    def __init__(self, parts: EngineParts, max_queued_requests: int) -> None:
        """Starts the thread."""
        self.parts = parts
        self.on_outputs: Callable[[Sequence[RequestOutput], float], None] | None = None
        self._limit = QueueLimit(max_queued_requests)
        self._event_loop: asyncio.AbstractEventLoop | None = None
        self._entries: dict[str, _Entry] = {}
        self._leaving: set[str] = set()  # aborted, and not yet gone from the core
        self._num_being_added = 0
        self._is_draining = False
        self._death: BaseException | None = None
        self._outbox: collections.deque[Event] = collections.deque()
        self._is_woken = False
        # Weak, or the thread would keep alive whom it works for.
        deliver = functools.partial(_deliver_to, weakref.WeakMethod(self._deliver))
        self._loop = EngineLoop(parts.core, deliver)
        self._stop = weakref.finalize(self, self._loop.stop)
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
          EngineError: see `check_accepts`.
          RuntimeError: requests of another event loop are unfinished.
        """
        event_loop = self._bind()
        self.check_accepts()
        if request_id in self._entries or request_id in self._leaving:
            raise ValueError(f"request_id={request_id!r} is in use; choose another")

        def make_held_group() -> SequenceGroup:
            group = make_group()
            group.is_held = is_held(group, kind)
            return group

        is_delta = kind is RequestOutputKind.DELTA
        stream = RequestStream(request_id, is_delta=is_delta, leave=self.abort)
        entry = _Entry(stream, prompt, kind, event_loop.create_future())
        if timeout_s is not None:
            entry.deadline = event_loop.call_later(timeout_s, self._expire, request_id, timeout_s)
        self._entries[request_id] = entry
        self._num_being_added += 1
        self._loop.add(request_id, make_held_group)
        try:
            await entry.taken_in
        except BaseException:
            stream.close()
            raise
        return stream

    def abort(self, request_id: str) -> None:
        """Ends a request: its stream gets a last output with `finish_reason="abort"`.

        Its blocks are free before the next step begins. Unknown and finished ones are ignored.
        """
        if request_id in self._entries:
            self._end(request_id, None)

    async def call[T](self, function: Callable[[], T]) -> T:
        """Calls a function between two steps, where it may use the core, and returns its result.

        Raises:
          EngineDeadError: the engine has ended.
          BaseException: what the function raises; it must have changed nothing then.
        """
        future = self._loop.call(function)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if not future.cancelled() or self.is_running:
                raise
            raise self.dead_error from None

    # --- state --------------------------------------------------------------------------------

    @property
    def num_open_requests(self) -> int:
        """Requests that have not had their end."""
        return len(self._entries)

    @property
    def is_running(self) -> bool:
        """Whether steps can run."""
        return self._death is None and self._stop.alive

    @property
    def is_dead(self) -> bool:
        """Whether the engine has ended by an error."""
        return self._death is not None

    @property
    def dead_error(self) -> EngineDeadError:
        """What requests get once the engine has ended."""
        return ended(self._death)

    def check_accepts(self) -> None:
        """Tells whether a request would be taken in now.

        Raises:
          EngineDeadError, EngineDrainingError, EngineOverloadedError: it would not.
        """
        if not self.is_running:
            raise self.dead_error
        if self._is_draining:
            raise EngineDrainingError("the engine is shutting down and takes no new requests")
        self._limit.check(self._loop.num_waiting + self._num_being_added)

    # --- the end ------------------------------------------------------------------------------

    async def drain(self, timeout_s: float | None = None) -> bool:
        """Takes no new requests, and waits for those that it has; returns whether all ended."""
        self._is_draining = True
        end = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while self._entries and time.monotonic() < end:
            await asyncio.sleep(_DRAIN_POLL_S)
        return not self._entries

    async def shutdown(self, drain_s: float = 0.0) -> None:
        """Ends the engine and its thread; requests that are unfinished after `drain_s` fail."""
        self._is_draining = True
        if self.is_running and drain_s:
            await self.drain(drain_s)
        self._fail_all(lambda: EngineDrainingError("the engine has been shut down"))
        await asyncio.get_running_loop().run_in_executor(None, self._stop)

    # --- ends of requests ---------------------------------------------------------------------

    def _expire(self, request_id: str, timeout_s: float) -> None:
        if request_id in self._entries:
            what = f"request {request_id!r} was not done after {timeout_s:g} s, and was aborted"
            self._end(request_id, DeadlineExceededError(what))

    def _end(self, request_id: str, error: EngineError | None) -> None:
        """Ends an open request, in the core too; its stream gets an error, or a last output."""
        entry = self._remove(request_id)
        self._leaving.add(request_id)
        self._loop.abort(request_id)
        if request_id in self.parts.processor:
            cause = None if error is None else str(error)
            last = self.parts.processor.fail(request_id, cause)
            self._note([last])
            if error is None:
                entry.stream.put(last)
        error = error or EngineError(f"request {request_id!r} was aborted")
        entry.stream.fail(error)  # if it has had no last output
        if not entry.taken_in.done():
            entry.taken_in.set_exception(error)
            entry.taken_in.exception()  # where nobody waits for it any more

    def _remove(self, request_id: str) -> _Entry:
        entry = self._entries.pop(request_id)
        if entry.deadline is not None:
            entry.deadline.cancel()
        return entry

    def _fail_all(self, make_error: Callable[[], EngineError], added_only: bool = False) -> None:
        """Ends all requests, or those that the core has had, each with an error of its own."""
        for request_id, entry in list(self._entries.items()):
            if entry.taken_in.done() or not added_only:
                self._end(request_id, make_error())

    # --- events -------------------------------------------------------------------------------

    def _bind(self) -> asyncio.AbstractEventLoop:
        """Lets events come to the running event loop; returns it."""
        event_loop = asyncio.get_running_loop()
        if event_loop is not self._event_loop:
            if self._event_loop is not None and self._entries:
                if not self._event_loop.is_closed():
                    raise RuntimeError(
                        "this engine serves requests of another event loop; use that one, or an "
                        "engine of its own for each"
                    )
                for request_id in list(self._entries):  # whose readers went with their loop
                    self._remove(request_id)
                    self._loop.abort(request_id)
                    self._leaving.add(request_id)
                    if request_id in self.parts.processor:
                        self.parts.processor.fail(request_id, "abort")
            self._event_loop = event_loop
            self._take_events()
        return event_loop

    def _deliver(self, event: Event) -> None:
        """Called in the thread of the steps."""
        self._outbox.append(event)
        if isinstance(event, Failed) and event.is_dead:
            self._death = event.error
        if not self._is_woken and self._event_loop is not None:
            self._is_woken = True
            try:
                self._event_loop.call_soon_threadsafe(self._take_events)
            except RuntimeError:  # it is closed, and its coroutines with it; see `_bind`
                self._is_woken = False

    def _take_events(self) -> None:
        """Takes in what the thread of the steps has delivered."""
        self._is_woken = False  # first: what comes from here on wakes again
        while self._outbox:
            event = self._outbox.popleft()
            if isinstance(event, CoreOutputs):
                try:
                    self._take_outputs(event)
                except Exception as error:  # nobody may wait for what is lost here
                    logger.error("outputs were lost: %s", error, exc_info=error)
                    self._fail_all(functools.partial(step_failed, error), added_only=True)
            elif isinstance(event, Added):
                self._take_added(event)
            elif isinstance(event, Refused):
                self._take_refused(event)
            elif isinstance(event, Gone):
                self._leaving.discard(event.request_id)
            elif event.is_dead:
                self._fail_all(lambda: self.dead_error)
            else:
                self._fail_all(functools.partial(step_failed, event.error), added_only=True)

    def _take_outputs(self, event: CoreOutputs) -> None:
        processed = self.parts.processor.process(*event)
        for ending in processed.endings:
            self._loop.finish(*ending)
        for request_id in processed.faults:
            self._leaving.add(request_id)
            self._loop.abort(request_id)
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
            self.on_outputs(outputs, time.monotonic())

    def _take_added(self, event: Added) -> None:
        self._num_being_added -= 1
        entry = self._entries.get(event.request_id)
        if entry is not None:  # else it has been aborted meanwhile
            self.parts.open(event.group, entry.prompt, entry.kind)
            if not entry.taken_in.done():  # cancelled a moment ago
                entry.taken_in.set_result(None)

    def _take_refused(self, event: Refused) -> None:
        self._num_being_added -= 1
        if event.request_id in self._entries:
            entry = self._remove(event.request_id)
            entry.stream.fail(event.error)
            if not entry.taken_in.done():
                entry.taken_in.set_exception(event.error)


def _deliver_to(method: weakref.WeakMethod[Callable[[Event], None]], event: Event) -> None:
    deliver = method()
    if deliver is not None:
        deliver(event)
