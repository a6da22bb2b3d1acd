"""A model whose tokens can be computed by hand, and a runner that computes them out of blocks.

The runner keeps a "KV cache" of token ids and finds them only through the slots and the block
tables of the step, so a wrong row, a block freed too early or a stale slot gives wrong tokens.
Like a device, it lags: a step is described when it is dispatched and computed when it is
collected, after the next one was dispatched.
"""

import collections
import dataclasses
import types
from collections.abc import Callable
from typing import Any

import numpy as np

from pallas_paged import block_tables
from pallas_paged.block_tables import BlockTables
from pallas_paged.engine import LLM
from pallas_paged.engine.beam_search import Candidates
from pallas_paged.engine.config import EngineConfig
from pallas_paged.engine.core import Engine
from pallas_paged.engine.groups import CopyPairs
from pallas_paged.engine.logprobs import TokenLogprobs
from pallas_paged.engine.memory import BlockTableMemory
from pallas_paged.engine.prompts import PromptReader
from pallas_paged.engine.runner import Collected, InFlight
from pallas_paged.engine.scheduler import ScheduledStep, Scheduler
from pallas_paged.engine.sequence import Sequence, SequenceGroup
from pallas_paged.engine.swap import BlockMove, HostPool
from pallas_paged.engine.turns import Turns
from tests.engine import beam_oracle

VOCAB_SIZE = 61


def next_token(token_ids: list[int]) -> int:
    """Every token and its place count: [5] gives 8, [5, 8] gives 30, [8, 5] gives 27."""
    return sum((i + 1) * (t + 3) for i, t in enumerate(token_ids)) % VOCAB_SIZE


def sampled_token(token_ids: list[int], index: int) -> int:
    """The token after `token_ids` in completion `index`.

    Completions 2k and 2k + 1 draw the same ones, as if by chance, until they have a multiple of
    11 tokens; the others begin differently.
    """
    parts = index % 2 and len(token_ids) % 11 == 0
    return (next_token(token_ids) + 7 * (index // 2) + bool(parts)) % VOCAB_SIZE


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


def search_alone(group: SequenceGroup) -> list[beam_oracle.Ended]:
    """Returns the results of a beam search, best first."""
    assert group.beams is not None
    found = beam_oracle.beam_search(
        next_logprobs,
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
    sequence: Sequence, max_model_len: int, host_stop: HostStop | None = None
) -> tuple[list[int], str, int | str | None]:
    """Returns the output tokens, finish_reason and stop_reason of the sequence's request."""
    group = sequence.group
    token_ids: list[int] = list(group.prompt_token_ids)
    max_length = min(len(token_ids) + group.max_tokens, max_model_len)
    while True:
        token = sampled_token(token_ids, sequence.index)
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
    seq_lens: list[int]
    samples: list[bool]
    indices: list[int]
    num_candidates: list[int]  # 0: a token is sampled
    swap_outs: tuple[BlockMove, ...]
    swap_ins: tuple[BlockMove, ...]
    copies: CopyPairs
    free_blocks: np.ndarray


class MockRunner:
    """Computes steps in the order of their dispatch."""

    def __init__(self, memory: BlockTableMemory) -> None:
        self.memory = memory
        num_blocks = memory.num_usable_blocks + 1
        self.cache = np.full((num_blocks, memory.state.block_size), -1)
        self.last_tokens = np.full(len(memory.state.seq_lens), -1)
        self.queue: collections.deque[Batch] = collections.deque()

    def dispatch(self, step: ScheduledStep) -> Batch:
        state = self.memory.state
        batch = Batch(
            input_ids=[
                None
                if share.input_on_device
                else share.sequence.token_ids[share.start : share.start + share.num_tokens]
                for share in step.scheduled
            ],
            rows=[share.row for share in step.scheduled],
            slots=[
                block_tables.slot_mapping(
                    state,
                    np.full(share.num_tokens, share.row),
                    np.arange(share.start, share.start + share.num_tokens),
                )
                for share in step.scheduled
            ],
            tables=[state.tables[share.row].copy() for share in step.scheduled],
            seq_lens=[share.start + share.num_tokens for share in step.scheduled],
            samples=[share.samples for share in step.scheduled],
            indices=[share.sequence.index for share in step.scheduled],
            num_candidates=[
                0
                if share.sequence.group.beams is None
                else share.sequence.group.beams.num_candidates
                for share in step.scheduled
            ],
            swap_outs=step.swap_outs,
            swap_ins=step.swap_ins,
            copies=step.copies,
            free_blocks=np.flatnonzero(state.ref_counts == 0),
        )
        self.queue.append(batch)
        return batch

    def collect(self, batch: Batch) -> list[int | Candidates]:
        assert self.queue.popleft() is batch, "the device computes steps in order"
        for move in batch.swap_outs:
            move.chunk.data = self.cache[move.block_ids].copy()
        self.cache[batch.free_blocks] = -1  # what nobody owns may hold anything
        for move in batch.swap_ins:
            slots = np.flatnonzero(move.block_ids)
            self.cache[move.block_ids[slots]] = move.chunk.data[slots]
        self.cache[batch.copies.dst] = self.cache[batch.copies.src]
        for row, slots, input_ids in zip(batch.rows, batch.slots, batch.input_ids, strict=True):
            tokens = [self.last_tokens[row]] if input_ids is None else input_ids
            assert len(tokens) == len(slots)
            self.cache.reshape(-1)[slots] = tokens
        results: list[int | Candidates] = []
        for row, table, seq_len, samples, index, num_candidates in zip(
            batch.rows,
            batch.tables,
            batch.seq_lens,
            batch.samples,
            batch.indices,
            batch.num_candidates,
            strict=True,
        ):
            context = self.cache[table].reshape(-1)[:seq_len].tolist()
            if not samples:
                results.append(-1)  # nothing is sampled here, and nobody may look
            elif num_candidates:
                results.append(best_tokens(context, num_candidates))
            else:
                self.last_tokens[row] = sampled_token(context, index)
                results.append(int(self.last_tokens[row]))
        return results


class MockDevice:
    """A `MockRunner` as the runner of a whole `Engine`, with log-probabilities that it makes up.

    Attributes:
      fails_in: 1 if the next `collect` is interrupted, and so on; 0: none is.
    """

    def __init__(self, memory: BlockTableMemory) -> None:
        self.runner = MockRunner(memory)
        self.fails_in = 0

    def dispatch(self, step: ScheduledStep, state: BlockTables) -> InFlight:
        assert state is self.runner.memory.state
        return InFlight(step, self.runner.dispatch(step))

    def collect(self, in_flight: InFlight) -> Collected:
        if self.fails_in:
            self.fails_in -= 1
            if not self.fails_in:
                raise KeyboardInterrupt
        tokens: list[int] = []
        logprobs: list[TokenLogprobs | None] = []
        results = self.runner.collect(in_flight.tokens)
        for share, result in zip(in_flight.step.scheduled, results, strict=True):
            if isinstance(result, Candidates):
                tokens.append(result.token_ids[0])
                logprobs.append(TokenLogprobs(result.logprobs[0], 1, *result))
            else:
                tokens.append(result)
                asked = share.samples and share.sequence.sampling_params.logprobs is not None
                made_up = made_up_logprob(result)
                found = TokenLogprobs(made_up, 1, [result], [made_up]) if asked else None
                logprobs.append(found)
        return Collected(tokens, logprobs)

    def recover(self) -> None:
        self.runner.queue.clear()
        self.runner.cache[:] = -1


def made_up_logprob(token: int) -> float:
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
        for sequence in self.scheduler.commit(step, self.runner.collect(batch)):
            samples = sequence.group.beams is None
            if samples and self.host_stop and self.host_stop(sequence.output_token_ids):
                self.scheduler.finish(sequence, "stop", "host")

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
        **policies,
    )
    return MockEngine(scheduler, MockRunner(memory), host_stop)


def make_whole_engine(
    *,
    seed: int = 0,
    async_scheduling: bool = True,
    tokenizer: Any = None,
    **options: Any,
) -> Engine:
    """Returns an `Engine` over a `MockDevice`; see `make_engine` for the other options."""
    scheduler = make_engine(**options).scheduler
    memory = scheduler.memory
    assert isinstance(memory, BlockTableMemory)
    return Engine(
        scheduler,
        memory,
        MockDevice(memory),
        vocab_size=VOCAB_SIZE,
        max_model_len=scheduler.admission.max_model_len,
        tokenizer=tokenizer,
        seed=seed,
        async_scheduling=async_scheduling,
    )


def make_mock_llm(**options: Any) -> LLM:
    """Returns an `LLM` without a model, over `make_whole_engine`."""
    llm = object.__new__(LLM)
    llm.engine = make_whole_engine(**options)
    llm.tokenizer = llm.engine.tokenizer
    llm.config = EngineConfig("mock", block_size=llm.engine.memory.block_size)
    llm.runner = types.SimpleNamespace(programs=types.SimpleNamespace())  # type: ignore[assignment]
    llm.announce = print
    llm._prompts = PromptReader(llm.tokenizer, "mock", VOCAB_SIZE)
    llm._turns = Turns()
    llm._awaited, llm._outputs = set(), {}
    return llm
