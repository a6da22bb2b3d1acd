"""A whole engine in this process: requests in, outputs with text out, and what a failure does."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

from pallas_paged.engine.core.core_output import CoreOutput, NewTokens
from pallas_paged.engine.core.request import SequenceGroup
from pallas_paged.engine.kv.sharing import Root
from pallas_paged.engine.kv.stats import KVStats, kv_stats
from pallas_paged.engine.outputs import RequestOutput
from pallas_paged.engine.parts import EngineParts
from pallas_paged.engine.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams

Pinned = tuple[tuple[int, ...], Root]
"""A prefix that is pinned: its tokens, and what they are salted with."""


class Engine:
    """Joins the core, which knows no text, and the processor that makes outputs of what it gives.

    One thread at a time.

    Attributes:
      core: of the parts, as is `memory`.
      memory: likewise.
      counts: likewise.
      undelivered: outputs that `step` returns next; who calls `advance` takes them from here.
      asleep: what it has given back, of "weights" and "kv_cache"; requests are refused then.
    """

    def __init__(self, parts: EngineParts):
        """Takes the parts as its own."""
        self.core, self.memory, self.counts = parts.core, parts.memory, parts.counts
        self.undelivered: list[RequestOutput] = []
        self.asleep: frozenset[str] = frozenset()
        self._parts = parts
        self._processor = parts.processor
        self._failure: str | None = None  # of a change that is under way, or was cut short
        self._late_aborts: list[str] = []  # asked for during a change

    def check_idle(self) -> None:
        """Asserts that no request is left, and that every block is free, cached or pinned."""
        assert not self.has_unfinished, f"unfinished: {sorted(self._processor.request_ids)}"
        self.core.scheduler.check_invariants()
        free = self.memory.num_free_blocks + len(self.memory.pins)
        usable = self.memory.num_usable_blocks
        assert free == usable, f"{usable - free} blocks are lost"

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has anything left to do."""
        waiting = self._processor.request_ids or self.undelivered or self._failure
        return bool(waiting) or self.core.has_unfinished

    # --- requests -----------------------------------------------------------------------------

    def make_group(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams | BeamSearchParams,
        request_id: str | None = None,
        cache_salt: str | None = None,
    ) -> SequenceGroup:
        """Returns a group that `add` accepts, and queues nothing.

        Raises:
          ValueError: see `Intake.make_group`, `bad_sequences` and `Grammars.compile`.
          RuntimeError: the engine is asleep.
        """
        self._recover()
        if self.asleep:
            raise RuntimeError(
                f"the engine sleeps, without {' and '.join(sorted(self.asleep))}: call wake_up"
                + (", or update_weights" if "weights" in self.asleep else "")
            )
        return self._parts.intake.make_group(
            prompt_token_ids,
            params,
            request_id,
            cache_salt,
            self._parts.bad_sequences(params),
            self._parts.grammar(params),
        )

    def all_or_none(self) -> contextlib.AbstractContextManager[None]:
        """Inside, groups are made together: if one is refused, none has drawn an id or a seed."""
        return self._parts.intake.all_or_none()

    def add(
        self,
        group: SequenceGroup,
        prompt: str | None = None,
        *,
        output_kind: RequestOutputKind | None = None,
    ) -> None:
        """Queues a group made by `make_group`; `prompt` is its text, if it came as text.

        `output_kind` takes the place of the request's own; a beam search has one output.

        Raises:
          ValueError: its request id is in use, or it no longer fits beside what is pinned.
        """
        kind = group.sampling_params.output_kind if output_kind is None else output_kind
        group.is_held = self._parts.may_hold(group, kind)
        with self._all_or_nobody(ValueError):
            if group.request_id in self._processor:
                raise ValueError(f"request_id={group.request_id!r} is in use; choose another")
            self.core.scheduler.check(group)
            self._parts.open(group, prompt, kind)
            self.core.add(group)

    def abort(self, request_id: str) -> None:
        """Ends a request and frees its blocks; the next `step` returns its last output.

        Allowed in every state and as often as one likes; unknown and finished ones are ignored.
        While a step is under way it is left for the next one.
        """
        if self._failure is not None:  # in the middle of a step, by a collector of garbage, say
            self._late_aborts.append(request_id)
            return
        with self._all_or_nobody():
            self._process(self.core.abort(request_id))

    def pin(self, token_ids: Sequence[int], salt: Root) -> bool:
        """Keeps the full blocks of a prefix until `unpin`; see `Scheduler.pin`."""
        with self._all_or_nobody(ValueError):
            return self.core.scheduler.pin(token_ids, salt)

    def unpin(self, token_ids: Sequence[int], salt: Root) -> bool:
        """Takes a `pin` back; returns False if there is none."""
        with self._all_or_nobody():
            return self.core.scheduler.unpin(token_ids, salt)

    def reset_prefix_cache(self) -> bool:
        """Forgets what is cached and not in use; returns whether that is all but pinned blocks."""
        with self._all_or_nobody():
            return self.memory.reset_prefix_cache()

    def kv_stats(self) -> KVStats:
        """Returns what the blocks of the pool hold now."""
        return kv_stats(self.memory, self.core.scheduler)

    # --- steps --------------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """Advances by a step, see `EngineCore.step`, and returns what changed.

        Raises:
          BaseException: whatever failed or interrupted it. Every request has been aborted, every
            block is free again, and the engine can be used on; the next `step` returns the
            requests' last outputs, with the error as `stop_reason`. The same holds for `add`,
            `abort`, `pin` and `unpin`, except for the errors that their docstrings name.
        """
        self.advance()
        outputs, self.undelivered = self.undelivered, []
        return outputs

    def advance(self) -> None:
        """Does what `step` does, and leaves what changed in `undelivered`."""
        with self._all_or_nobody():
            while self._late_aborts:
                self._process(self.core.abort(self._late_aborts.pop()))
            self._process(*self.core.step())

    def drain(self) -> None:
        """Steps until nothing is left to do; what the requests still get is lost."""
        while self.has_unfinished:
            self.step()

    def finish_requests(self) -> None:
        """Steps until no request is left; what they get is in `undelivered`."""
        while self.core.has_unfinished:
            self.advance()

    def abort_requests(self) -> None:
        """Ends every request by "abort"; their last outputs are in `undelivered`."""
        for request_id in list(self._processor.request_ids):
            self.abort(request_id)
        self.finish_requests()  # the step in flight

    def change_device[T](self, change: Callable[[], T]) -> tuple[T, list[Pinned]]:
        """Calls what lets the device lose all that it has computed, between two steps.

        Requests go on from the tokens that they have. What is cached is forgotten.

        Returns:
          what `change` returns; and the prefixes that were pinned, and are not any more.
        """
        with self._all_or_nobody():
            self._process(*self.core.settle())
            pinned = list(self.memory.pinned.elements())
            self.core.start_over()
            return change(), pinned

    def _process(self, outputs: Iterable[CoreOutput], tokens: NewTokens | None = None) -> None:
        """Lets the requests have what the core gave them, and the core know what that ended."""
        begin = len(self.undelivered)
        processed = self._processor.process(outputs, tokens, self.undelivered)
        for ending in processed.endings:
            self.core.finish(*ending)
        for request_id in processed.faults:
            self.core.abort(request_id)
        self.counts.note(self.undelivered[begin:])

    # --- failure ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _all_or_nobody(self, *refusals: type[Exception]) -> Iterator[None]:
        """Runs a change of what the engine holds; if it fails, every request has failed.

        `refusals` are errors that come before any change: they fail nothing else. An interrupt may
        strike anywhere, also while requests are being failed: `_failure` stays set until that is
        done, and whatever is called next begins with `_recover`.
        """
        self._recover()
        self._failure = "interrupted"
        try:
            yield
        except refusals:
            self._failure = None
            raise
        except BaseException as error:
            self._failure = f"{type(error).__name__}: {error}"
            self._fail_all(self._failure)
            raise
        self._failure = None

    def _recover(self) -> None:
        """Ends what an interrupt has cut short."""
        if self._failure is not None:
            self._fail_all(self._failure)

    def _fail_all(self, cause: str) -> None:
        """Leaves an empty engine, and each request's last output to be given out.

        Nothing in here may fail, whatever the engine was at: no text is made, no count is trusted,
        and what is not wholly taken in is not given out. It may be begun again.
        """
        self._late_aborts.clear()
        held = self.core.held_tokens()
        self.core.reset()
        for request_id in list(self._processor.request_ids):
            tokens = held.get(request_id, ())
            self.counts.note([self._processor.fail(request_id, cause, self.undelivered, tokens)])
        self._failure = None
