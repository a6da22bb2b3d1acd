"""A model whose tokens can be computed by hand, and a runner that computes them out of blocks.

The runner keeps a "KV cache" of token ids and finds them only through the slots and the block
tables of the step, so a wrong row, a block freed too early or a stale slot gives wrong tokens.
Like a device, it lags: a step is described when it is dispatched and computed when it is
collected, after the next one was dispatched.
"""

import collections
import dataclasses
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from pallas_paged import block_tables
from pallas_paged.engine import LLM
from pallas_paged.engine.async_llm import AsyncLLM
from pallas_paged.engine.build import Built, join
from pallas_paged.engine.config import EngineConfig
from pallas_paged.engine.core.beam_search import Candidates
from pallas_paged.engine.core.buckets import Bucket, Buckets
from pallas_paged.engine.core.committer import Result
from pallas_paged.engine.core.logprobs import MIN_WIDTH
from pallas_paged.engine.core.plan import StepPlan, StepResult
from pallas_paged.engine.core.request import SequenceGroup, TokenSequence
from pallas_paged.engine.core.scheduled import ScheduledStep
from pallas_paged.engine.core.scheduler import Scheduler
from pallas_paged.engine.core.speculation import num_right
from pallas_paged.engine.core.step_inputs import StepInputs, views
from pallas_paged.engine.engine import Engine
from pallas_paged.engine.kv.block_memory import BlockTableMemory
from pallas_paged.engine.kv.host_pool import BlockMove, HostPool
from pallas_paged.engine.kv.sharing import CopyPairs
from pallas_paged.engine.model_source import FolderSource
from pallas_paged.engine.parts import EngineParts
from pallas_paged.models.demo import DEMO_MODEL
from tests.engine import beam_oracle

VOCAB_SIZE = 61


def next_token(token_ids: list[int]) -> int:
    """Every token and its place count: [5] gives 8, [5, 8] gives 30, [8, 5] gives 27."""
    return sum((i + 1) * (t + 3) for i, t in enumerate(token_ids)) % VOCAB_SIZE


def sampled_token(token_ids: list[int], index: int, window: int | None = None) -> int:
    """The token after `token_ids` in completion `index`, seeing the last `window` of them.

    Completions 2k and 2k + 1 draw the same ones, as if by chance, until they have a multiple of
    11 tokens; the others begin differently.
    """
    parts = index % 2 and len(token_ids) % 11 == 0
    return (next_token(seen(token_ids, window)) + 7 * (index // 2) + bool(parts)) % VOCAB_SIZE


def seen(token_ids: list[int], window: int | None) -> list[int]:
    """The tokens that the last one sees, itself included."""
    return token_ids if window is None else token_ids[-window:]


def next_logprobs(token_ids: list[int]) -> np.ndarray:
    """What beams see after `token_ids`: every token and its place count, and no two are equal."""
    place = sum((i + 1) * (t + 3) for i, t in enumerate(token_ids))
    tokens = np.arange(VOCAB_SIZE)
    near = (tokens - place) * 7 % VOCAB_SIZE
    return -(near + (tokens * 40503 + place * 7919) % 65537 / 65537) / 8


def best_tokens(token_ids: list[int], count: int) -> Candidates:
    """The `count` most likely tokens after `token_ids`."""
    logprobs = next_logprobs(token_ids)
    order = np.argsort(-logprobs)[:count]
    return Candidates(order.tolist(), logprobs[order].tolist())


def search_alone(group: SequenceGroup, window: int | None = None) -> list[beam_oracle.Ended]:
    """Returns the results of a beam search, best first."""
    assert group.beams is not None
    found = beam_oracle.beam_search(
        lambda token_ids: next_logprobs(seen(token_ids, window)),
        group.prompt_token_ids,
        width=group.num_seqs,
        max_tokens=group.max_tokens,
        ending_ids=[*group.eos_token_ids, *group.stop_token_ids],
        length_penalty=group.beams.length_penalty,
        early_stopping=group.beams.early_stopping,
    )
    return found[: group.beams.num_results]


HostStop = Callable[[list[int]], bool]
"""Stands for a stop string: whether the host ends a sequence with these output tokens."""


def generate_alone(
    sequence: TokenSequence,
    max_model_len: int,
    host_stop: HostStop | None = None,
    window: int | None = None,
) -> tuple[list[int], str, int | str | None]:
    """Returns the output tokens, finish_reason and stop_reason of the sequence's request."""
    group = sequence.group
    token_ids: list[int] = list(group.prompt_token_ids)
    max_length = min(len(token_ids) + group.max_tokens, max_model_len)
    while True:
        token = sampled_token(token_ids, sequence.index, window)
        token_ids.append(token)
        output = token_ids[len(group.prompt_token_ids) :]
        if token in group.eos_token_ids:
            return output, "stop", None
        if token in group.stop_token_ids:
            return output, "stop", token
        if host_stop and host_stop(output):
            return output, "stop", "host"
        if len(token_ids) == max_length:
            return output, "length", None


@dataclasses.dataclass(frozen=True)
class Batch:
    """A step as the device gets it: copies, and no reference to any sequence."""

    input_ids: list[list[int] | None]  # None: the row's last sampled token
    rows: list[int]
    slots: list[np.ndarray]
    tables: list[np.ndarray]
    seq_lens: list[int]  # after the first of the steps
    num_steps: list[int]
    drafts: list[list[int]]
    ending_ids: list[frozenset[int]]
    samples: list[bool]
    indices: list[int]
    num_candidates: list[int]  # 0: a token is sampled
    dropped_chunks: tuple[int, ...]
    swap_outs: tuple[BlockMove, ...]
    swap_ins: tuple[BlockMove, ...]
    copies: CopyPairs
    free_blocks: np.ndarray


class MockRunner:
    """Computes steps in the order of their dispatch; a query sees the last `window` tokens."""

    def __init__(self, memory: BlockTableMemory, window: int | None = None) -> None:
        self.memory, self.window = memory, window
        num_blocks = memory.num_usable_blocks + 1
        self.cache = np.full((num_blocks, memory.state.block_size), -1)
        self.last_tokens = np.full(len(memory.state.seq_lens), -1)
        self.chunks: dict[int, np.ndarray] = {}
        self.queue: collections.deque[Batch] = collections.deque()

    def dispatch(self, step: ScheduledStep) -> Batch:
        state = self.memory.state
        batch = Batch(
            input_ids=[
                None
                if share.input_on_device
                else [
                    *share.sequence.token_ids[share.start : share.start + share.num_tokens],
                    *share.sequence.drafts[: share.num_drafts],
                ]
                for share in step.scheduled
            ],
            rows=[share.row for share in step.scheduled],
            slots=[
                block_tables.slot_mapping(
                    state,
                    np.full(share.num_tokens + share.num_steps - 1, share.row),
                    share.start + np.arange(share.num_tokens + share.num_steps - 1),
                )
                for share in step.scheduled
            ],
            tables=[state.tables[share.row].copy() for share in step.scheduled],
            seq_lens=[share.start + share.num_tokens for share in step.scheduled],
            num_steps=[share.num_steps for share in step.scheduled],
            drafts=[share.sequence.drafts[: share.num_drafts] for share in step.scheduled],
            ending_ids=[share.sequence.group.ending_ids for share in step.scheduled],
            samples=[share.samples for share in step.scheduled],
            indices=[share.sequence.index for share in step.scheduled],
            num_candidates=[
                0
                if share.sequence.group.beams is None
                else share.sequence.group.beams.num_candidates
                for share in step.scheduled
            ],
            dropped_chunks=step.dropped_chunks,
            swap_outs=step.swap_outs,
            swap_ins=step.swap_ins,
            copies=step.copies,
            free_blocks=np.flatnonzero(state.ref_counts == 0),
        )
        self.queue.append(batch)
        return batch

    def collect(self, batch: Batch) -> list[Result]:
        assert self.queue.popleft() is batch, "the device computes steps in order"
        for number in batch.dropped_chunks:
            self.chunks.pop(number, None)
        for move in batch.swap_outs:
            self.chunks[move.chunk.number] = self.cache[move.block_ids].copy()
        self.cache[batch.free_blocks] = -1  # what nobody owns may hold anything
        for move in batch.swap_ins:
            slots = np.flatnonzero(move.block_ids)
            self.cache[move.block_ids[slots]] = self.chunks.pop(move.chunk.number)[slots]
        self.cache[batch.copies.dst] = self.cache[batch.copies.src]
        over = [  # which the device knows, and the host did not
            input_ids is None and self.last_tokens[row] in ending
            for row, input_ids, ending in zip(
                batch.rows, batch.input_ids, batch.ending_ids, strict=True
            )
        ]
        for row, slots, input_ids in zip(batch.rows, batch.slots, batch.input_ids, strict=True):
            tokens = [self.last_tokens[row]] if input_ids is None else input_ids
            self.cache.reshape(-1)[slots[: len(tokens)]] = tokens
        results: list[Result] = []
        for (
            row,
            table,
            slots,
            seq_len,
            num_steps,
            drafts,
            ending,
            samples,
            index,
            candidates,
        ) in zip(
            batch.rows,
            batch.tables,
            batch.slots,
            batch.seq_lens,
            batch.num_steps,
            batch.drafts,
            batch.ending_ids,
            batch.samples,
            batch.indices,
            batch.num_candidates,
            strict=True,
        ):
            if over[len(results)]:
                results.append([0] * num_steps if num_steps > 1 else 0)
                continue
            context = self.cache[table].reshape(-1)[:seq_len].tolist()
            num_queries = len(slots) - num_steps + 1
            first = 0 if self.window is None else max(0, seq_len - num_queries + 1 - self.window)
            assert -1 not in context[first:], "a key that some query of the step sees is gone"
            if not samples:
                results.append(-1)  # nothing is sampled here, and nobody may look
            elif candidates:
                results.append(best_tokens(seen(context, self.window), candidates))
            elif drafts:
                known = context[: seq_len - len(drafts)]
                drawn = [
                    sampled_token([*known, *drafts[:place]], index, self.window)
                    for place in range(len(drafts) + 1)
                ]
                results.append(drawn[: 1 + num_right(drafts, drawn)])
            elif num_steps > 1:
                results.append(
                    self._run_on(row, table, slots[num_queries:], seq_len, ending, index)
                )
            else:
                self.last_tokens[row] = sampled_token(context, index, self.window)
                results.append(int(self.last_tokens[row]))
        return results

    def _run_on(
        self,
        row: int,
        table: np.ndarray,
        slots: np.ndarray,
        seq_len: int,
        ending_ids: frozenset[int],
        index: int,
    ) -> list[int]:
        """Samples, and once more for each slot; behind an ending token come no real samples."""
        tokens: list[int] = []
        for place in range(len(slots) + 1):
            context = self.cache[table].reshape(-1)[: seq_len + place].tolist()
            first = 0 if self.window is None else max(0, len(context) - self.window)
            assert -1 not in context[first:], "a key that a later step sees is gone"
            self.last_tokens[row] = sampled_token(context, index, self.window)
            tokens.append(int(self.last_tokens[row]))
            if tokens[-1] in ending_ids:
                return tokens + [0] * (len(slots) - place)
            if place < len(slots):
                self.cache.reshape(-1)[slots[place]] = tokens[-1]
        return tokens


class _Dispatched(NamedTuple):
    """A plan, the blocks that nobody owned when it came, and the tables of its rows then."""

    plan: StepPlan
    free: np.ndarray
    tables: dict[int, np.ndarray]


class MockDevice:
    """The mock model as an `Executor`: of a plan it gets the bytes, and knows nothing else.

    Attributes:
      events: the last of "dispatch n" and "collect n", in the order in which they happened.
      before: called with each event; may raise.
      token: if not None, what it samples everywhere.
      fails_in: 1 if the next `collect` is interrupted, and so on; 0: none is.
    """

    def __init__(self, memory: BlockTableMemory, width: int = MIN_WIDTH) -> None:
        """`width` is the W of log-probabilities."""
        self.events: collections.deque[str] = collections.deque(maxlen=1000)
        self.before: Callable[[str], None] = lambda event: None
        self.token: int | None = None
        self.fails_in = 0
        self._memory = memory
        self._width = width
        self.queue: collections.deque[_Dispatched] = collections.deque()
        self.recover()

    def recover(self) -> None:
        num_rows, num_blocks = len(self._memory.tables), self._memory.num_usable_blocks + 1
        self.cache = np.full((num_blocks, self._memory.block_size), -1)
        self.last_tokens = np.full(num_rows + 1, -1)
        self.tables = np.zeros((num_rows + 1, self._memory.tables.shape[1]), np.int32)
        self.chunks: dict[int, np.ndarray] = {}
        self.queue.clear()

    def note(self, event: str) -> None:
        self.before(event)
        self.events.append(event)

    def choose(self, best: Bucket, all_that_fit: Callable[[], Sequence[Bucket]]) -> Bucket:
        return best

    def expect(self, bucket: Bucket) -> None:
        pass

    def dispatch(self, plan: StepPlan) -> int:
        self.note(f"dispatch {plan.step_id}")
        free = np.flatnonzero(self._memory.state.ref_counts == 0)
        plan = StepPlan.from_bytes(plan.to_bytes())
        rows = views(plan.inputs, plan.bucket).rows
        tables = {
            row: self._memory.tables[row, : self._memory.num_blocks[row]].copy()
            for row in rows[rows < len(self._memory.tables)].tolist()
        }
        self.queue.append(_Dispatched(plan, free, tables))
        return plan.step_id

    def collect(self, in_flight: int) -> StepResult:
        self.note(f"collect {in_flight}")
        if self.fails_in:
            self.fails_in -= 1
            if not self.fails_in:
                raise KeyboardInterrupt
        plan, free, tables = self.queue.popleft()
        assert plan.step_id == in_flight, "the device computes steps in order"
        x = views(plan.inputs, plan.bucket)
        self._write(plan, x, free)
        for row, blocks in tables.items():
            np.testing.assert_array_equal(self.tables[row, : len(blocks)], blocks)
        B = int(np.count_nonzero(x.rows < len(self.last_tokens) - 1))
        contexts = [self._context(x, b) for b in range(B)]
        width = max(plan.bucket.num_steps, plan.bucket.num_drafts + 1)
        tokens = np.zeros((plan.bucket.num_seqs, width), np.int32)
        for b in range(B):
            sampled = sampled_token(contexts[b], x.sample_index[b])
            tokens[b, 0] = sampled if self.token is None else self.token
            self.last_tokens[x.sample_rows[b]] = tokens[b, 0]
            if x.many is not None:
                self._run_on(x, b, tokens[b])
            if x.drafts is not None:
                self._sample_behind(x, b, contexts[b], tokens[b])
        if not plan.wants_logprobs:
            return StepResult(tokens)
        if plan.bucket.is_full:
            packed = [self._packed(contexts[b], tokens[b, 0]) for b in range(B)]
            return StepResult(tokens, np.array(packed, np.int32)[:, None])
        assert plan.bucket.has_logprobs, "no step of that shape gives log-probabilities"
        own = tokens[:, : plan.bucket.num_steps]
        bits = made_up_logprob(own).astype(np.float32).view(np.int32)
        return StepResult(tokens, np.stack([own, bits, np.ones_like(own)], axis=-1))

    def _run_on(self, x: StepInputs[np.ndarray], b: int, tokens: np.ndarray) -> None:
        """Makes the steps of row b behind the first, whose sample stands in `tokens` i32[K]."""
        assert x.many is not None
        S, blocks = self.cache.shape[1], self.tables[x.rows[b]]
        for place in range(1, x.many.num_steps[b]):
            if tokens[place - 1] in x.many.ending_ids[b]:
                break
            position = x.positions[b] + place
            self.cache[blocks[position // S], position % S] = tokens[place - 1]
            context = self.cache[blocks].ravel()[: x.seq_lens[b] + place].tolist()
            sampled = sampled_token(context, x.sample_index[b])
            tokens[place] = sampled if self.token is None else self.token
            self.last_tokens[x.sample_rows[b]] = tokens[place]

    def _sample_behind(
        self, x: StepInputs[np.ndarray], b: int, context: list[int], tokens: np.ndarray
    ) -> None:
        """Samples behind the last known token of row b, and behind each of its drafts."""
        assert x.drafts is not None
        num_drafts, first = int(x.drafts.num_drafts[b]), x.drafts.firsts[b]
        for place in range(num_drafts + 1):
            assert x.drafts.owners[first + place] == b
            end = len(context) - num_drafts + place
            assert (
                x.drafts.places[first + place] == x.query_start_loc[b + 1] - 1 - num_drafts + place
            )
            tokens[place] = sampled_token(context[:end], x.sample_index[b])
            if self.token is not None:
                tokens[place] = self.token

    def _write(self, plan: StepPlan, x: StepInputs[np.ndarray], free: np.ndarray) -> None:
        """Carries out what comes before the step, and writes the step's tokens."""
        for number in plan.dropped_chunks:
            self.chunks.pop(number, None)
        for move in plan.swap_outs:
            self.chunks[move.chunk.number] = self.cache[move.block_ids].copy()
        self.cache[free] = -1  # what nobody owns may hold anything
        for move in plan.swap_ins:
            slots = np.flatnonzero(move.block_ids)
            self.cache[move.block_ids[slots]] = self.chunks.pop(move.chunk.number)[slots]
        self.cache[plan.copies.dst] = self.cache[plan.copies.src]
        for places, blocks in (*plan.table_edits, (x.table_places, x.table_blocks)):
            self.tables.reshape(-1)[places] = blocks
        assert not self.tables[-1].any(), "the padding row has null blocks"
        ids = x.input_ids.copy()
        on_device = np.flatnonzero(x.input_on_device)
        ids[x.query_start_loc[on_device]] = self.last_tokens[x.rows[on_device]]
        self.cache.reshape(-1)[x.slot_mapping] = ids

    def _context(self, x: StepInputs[np.ndarray], b: int) -> list[int]:
        """Returns the tokens that row b of the step has behind it; a fork has its parent's."""
        owner = int(np.searchsorted(x.query_start_loc, x.logits_indices[b], side="right")) - 1
        blocks = self.tables[x.rows[owner]]
        context: list[int] = self.cache[blocks].ravel()[: x.seq_lens[owner]].tolist()
        return context

    def _packed(self, context: list[int], token: int) -> np.ndarray:
        """Returns packed log-probabilities: a made-up one, and what beams see."""
        found = best_tokens(context, self._width)
        floats = np.array([made_up_logprob(token), *found.logprobs], np.float32).view(np.int32)
        return np.array([token, floats[0], 1, *found.token_ids, *floats[1:]], np.int32)


def made_up_logprob(token: Any) -> Any:
    """What `MockDevice` says of a sampled token."""
    return -token / 7


class MockEngine:
    """The engine's loop: dispatch a step, then commit the one before."""

    def __init__(
        self, scheduler: Scheduler, runner: MockRunner, host_stop: HostStop | None = None
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.host_stop = host_stop
        self.in_flight: tuple[ScheduledStep, Batch] | None = None
        self.events: list[str] = []

    def step(self, overlap: bool = True) -> ScheduledStep | None:
        """One turn of the loop; without overlap nothing is in flight when it returns."""
        step = self.scheduler.schedule()
        previous, self.in_flight = self.in_flight, None
        if step is not None:
            self.events.append(f"dispatch {step.step_id}")
            self.in_flight = step, self.runner.dispatch(step)
        if previous is not None:
            self.commit(*previous)
        if not overlap:
            self.drain()
        return step

    def drain(self) -> None:
        """Commits the step in flight."""
        if self.in_flight is not None:
            in_flight, self.in_flight = self.in_flight, None
            self.commit(*in_flight)

    def commit(self, step: ScheduledStep, batch: Batch) -> None:
        self.events.append(f"collect {step.step_id}")
        begins = {s: s.num_output_tokens for s in step.batch.sequences}
        for sequence in self.scheduler.commit(step, self.runner.collect(batch)).others:
            if sequence.group.beams is not None or sequence.group.is_held or not self.host_stop:
                continue
            output = sequence.output_token_ids
            for end in range(begins.get(sequence, len(output) - 1) + 1, len(output) + 1):
                if self.host_stop(output[:end]):
                    self.scheduler.finish(sequence, "stop", "host")
                    if end < len(output) or sequence.finish_reason == "length":
                        # What was sampled behind it is dropped, and what that was, too.
                        sequence.finish_reason, sequence.stop_reason = "stop", "host"
                    del sequence.token_ids[len(sequence.prompt_token_ids) + end :]
                    break

    def run(self, overlap: bool = True) -> None:
        """Turns the loop until nothing is unfinished and nothing in flight."""
        while self.scheduler.has_unfinished:
            self.step(overlap)
        self.drain()


def make_engine(
    *,
    num_blocks: int = 65,
    block_size: int = 4,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 64,
    max_model_len: int = 64,
    watermark_blocks: int | None = 0,
    host_stop: HostStop | None = None,
    enable_prefix_caching: bool = False,
    num_host_blocks: int = 0,
    sliding_window: int | None = None,
    **policies: Any,
) -> MockEngine:
    """Returns an engine over fresh block tables (`num_blocks` counts the null block)."""
    memory = BlockTableMemory(
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        enable_prefix_caching=enable_prefix_caching,
    )
    scheduler = Scheduler(
        memory,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        watermark_blocks=watermark_blocks,
        host_pool=HostPool(num_host_blocks, num_blocks - 1),
        sliding_window=sliding_window,
        **policies,
    )
    return MockEngine(scheduler, MockRunner(memory, sliding_window), host_stop)


def make_parts(
    *,
    seed: int = 0,
    async_scheduling: bool = True,
    tokenizer: Any = None,
    **options: Any,
) -> EngineParts:
    """Returns an engine's parts over a `MockDevice`; see `make_engine` for the other options."""
    scheduler = make_engine(**options).scheduler
    memory = scheduler.memory
    assert isinstance(memory, BlockTableMemory)
    proposer = options.get("proposer")
    max_num_seqs, max_blocks_per_seq = memory.tables.shape
    max_num_tokens = scheduler.max_num_batched_tokens
    return join(
        scheduler,
        memory,
        MockDevice(memory),
        Buckets.for_limits(
            max_num_seqs,
            max_num_tokens,
            max_blocks_per_seq,
            num_steps=options.get("num_scheduler_steps", 1),
            num_drafts=0 if proposer is None else proposer.num_speculative_tokens,
            has_logprobs=True,
        ),
        vocab_size=VOCAB_SIZE,
        max_model_len=scheduler.admission.max_model_len,
        tokenizer=tokenizer,
        seed=seed,
        async_scheduling=async_scheduling,
    )


def make_whole_engine(**options: Any) -> Engine:
    """Returns an `Engine` of `make_parts`."""
    return Engine(make_parts(**options))


def device_of(engine: Engine | EngineParts) -> MockDevice:
    """Returns the device of a `make_whole_engine`, or of a `make_parts`."""
    device = engine.core.executor
    assert isinstance(device, MockDevice)
    return device


WATCHING = ("profile_", "kv_events_")
"""What the fields of `EngineConfig` begin with that say what watches an engine."""


def make_mock_llm(*, tokenizer: Any = None, **options: Any) -> LLM:
    """Returns an `LLM` without a model, over `make_whole_engine`."""
    llm = object.__new__(LLM)
    llm._join(*_config_and_built(tokenizer, options))
    return llm


def make_mock_async_llm(
    *, max_queued_requests: int = 1024, tokenizer: Any = None, **options: Any
) -> AsyncLLM:
    """Returns an `AsyncLLM` likewise."""
    return AsyncLLM.of_built(*_config_and_built(tokenizer, options), max_queued_requests)


def _config_and_built(tokenizer: Any, options: dict[str, Any]) -> tuple[EngineConfig, Built]:
    watched = {name: options.pop(name) for name in [*options] if name.startswith(WATCHING)}
    parts = make_parts(tokenizer=tokenizer, **options)
    config = EngineConfig("mock", block_size=parts.memory.block_size, **watched)
    runner: Any = types.SimpleNamespace(programs=types.SimpleNamespace())
    shape: Any = types.SimpleNamespace(vocab_size=VOCAB_SIZE)
    weights: Any = None
    return config, Built(
        parts, runner, tokenizer, shape, 64, weights, FolderSource(str(DEMO_MODEL))
    )
