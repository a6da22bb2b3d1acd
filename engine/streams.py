"""Who waits for which outputs of an engine: iterations of several callers over one batch."""

from collections.abc import Callable, Iterator

from pallas_paged.engine.core.request import SequenceGroup
from pallas_paged.engine.engine import Engine
from pallas_paged.engine.outputs import RequestOutput
from pallas_paged.engine.sampling_params import RequestOutputKind
from pallas_paged.engine.turns import Turns


class Streams:
    """Runs requests of several callers; a step runs in the thread that waits for its outputs.

    What a step gives other callers' requests is kept until they come for it.
    """

    def __init__(self, engine: Engine, turns: Turns) -> None:
        """Whoever else uses the engine takes `turns` too."""
        self._engine = engine
        self._turns = turns
        self._awaited: set[str] = set()
        self._deltas: set[str] = set()  # requests whose outputs hold only what is new
        self._outputs: dict[str, RequestOutput] = {}

    def run(
        self,
        requests: list[tuple[SequenceGroup, str | None]],
        before_step: Callable[[], object],
        output_kind: RequestOutputKind | None = None,
    ) -> Iterator[RequestOutput]:
        """Queues groups, with their prompts' texts, and steps the engine until they are done.

        `before_step` is called before each step that this iteration runs; `output_kind` takes the
        place of the requests' own.
        """
        unfinished = {group.request_id for group, _ in requests}
        try:
            with self._turns:
                self._awaited |= unfinished
                for group, text in requests:
                    kind = output_kind
                    if kind is None:
                        kind = group.sampling_params.output_kind
                    if kind is RequestOutputKind.DELTA:
                        self._deltas.add(group.request_id)
                    self._engine.add(group, text, output_kind=kind)
            while unfinished:
                with self._turns:
                    ready = self._next_outputs(unfinished, before_step)
                for output in ready:
                    if output.finished:
                        unfinished.discard(output.request_id)
                        self._deltas.discard(output.request_id)
                    yield output
        finally:
            if self._turns.is_here:
                with self._turns:
                    self._leave(unfinished)

    def _next_outputs(
        self, request_ids: set[str], before_step: Callable[[], object]
    ) -> list[RequestOutput]:
        """Returns what there is of these requests, after a step if there is nothing."""
        self._file_outputs()  # those that an interrupt kept from it
        if request_ids.isdisjoint(self._outputs):
            assert self._engine.has_unfinished, f"nothing will come for {request_ids}"
            before_step()
            self._engine.advance()
            self._file_outputs()
        ready = [self._outputs.pop(each) for each in sorted(request_ids & self._outputs.keys())]
        self._awaited -= {output.request_id for output in ready if output.finished}
        return ready

    def _file_outputs(self) -> None:
        """Puts the engine's outputs where those who wait for them look."""
        if not self._engine.undelivered:
            return
        filed = self._outputs.copy()
        for output in self._engine.undelivered:
            if output.request_id in self._awaited:
                earlier = filed.get(output.request_id)
                if earlier is not None and output.request_id in self._deltas:
                    output = earlier.merged_with(output)
                filed[output.request_id] = output
        # In one statement, which no interrupt divides: a delta must not be filed twice.
        self._outputs, self._engine.undelivered = filed, []

    def _leave(self, unfinished: set[str]) -> None:
        """Ends what an iteration leaves behind; nobody waits for it any more.

        The collector of garbage may close an iteration in the middle of a call of this thread, and
        a step that is under way is no time for another one.
        """
        self._awaited -= unfinished  # first and at once: what is interrupted here is not kept
        for request_id in unfinished:
            self._outputs.pop(request_id, None)
            self._deltas.discard(request_id)
            self._engine.abort(request_id)
        if not self._awaited and not self._turns.is_nested:
            self._engine.drain()
