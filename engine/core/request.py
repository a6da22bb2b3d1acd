"""A request as the scheduler sees it: a group of sequences, and how far each one has come."""

import dataclasses
import enum
import itertools
from typing import Any

from pallas_paged.engine.core.beam_search import BeamSearch, Candidates
from pallas_paged.engine.core.core_output import FinishReason, RequestStats, Versions
from pallas_paged.engine.core.grammar import Matcher
from pallas_paged.engine.core.logit_rules import LogitRules
from pallas_paged.engine.core.row_columns import Progress, RowColumns
from pallas_paged.engine.kv.host_pool import SwappedChunk
from pallas_paged.engine.kv.prefix_cache import Hit
from pallas_paged.engine.kv.sharing import Root

_NUMBERS = itertools.count()

MAX_ENDING_IDS = 8
"""Tokens that end a sequence, of which the device is told."""


class SequenceStatus(enum.Enum):
    """Where a group or a sequence of it stands: queued, running, queued on the host, or done."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    SWAPPED = enum.auto()
    FINISHED = enum.auto()


@dataclasses.dataclass(eq=False, slots=True, weakref_slot=True)
class TokenSequence:
    """One completion of a request: the prompt and the tokens generated for it.

    How far it is stands in `RowColumns` while it has a row, and is 0 without one: a sequence whose
    blocks are given back starts again. Only the scheduler changes what follows `index`.

    Attributes:
      group: the request's sequences.
      index: which of the request's completions it is.
      token_ids: the prompt and the committed output tokens.
      row: its row in the block tables while it runs, else None. A sequence that has not been forked
        from the first one yet has none either.
      columns: what is known of it by its row, as long as it has one.
      leader: the sequence that computes the last of the blocks it shares from the start of a
        recomputation; None where they are computed already.
      num_shared: tokens in those blocks; it computes none of them.
      num_swapped: tokens whose keys and values wait in host memory.
      swapped_slots: the blocks of the group's chunk that hold them; -1 for one given back before.
      hits: cached blocks that were found for it while it waits, see `PrefixCache.match`.
      num_late: tokens that uncommitted steps sample although it has lost its row.
      drafts: guesses of the tokens that come next, for the step that is scheduled.
      proposals: what the last step guessed on the device.
      matcher: how far it is in the grammar of its request, see `matching`; None before it is asked.
      held_logprobs: i32[n, 3] each, the packed log-probabilities of its output tokens in order, if
        its group is held and asks for them; see `logprobs`.
      candidates: of a beam whose last token is computed, until the others' are too; else None.
      finish_reason: None until it finished.
      stop_reason: the stop token or stop string that ended it, None for any other end.
      number: tells it from all other sequences of this process.
      versions: which weights its output tokens come from; set when the core gets its group.
    """

    group: "SequenceGroup"
    index: int = 0
    token_ids: list[int] = dataclasses.field(init=False)
    row: int | None = dataclasses.field(init=False, default=None)
    columns: RowColumns | None = dataclasses.field(init=False, default=None, repr=False)
    leader: "TokenSequence | None" = dataclasses.field(init=False, default=None, repr=False)
    num_shared: int = dataclasses.field(init=False, default=0)
    num_swapped: int = dataclasses.field(init=False, default=0)
    swapped_slots: tuple[int, ...] = dataclasses.field(init=False, default=())
    hits: list[Hit] = dataclasses.field(init=False, default_factory=list, repr=False)
    num_late: int = dataclasses.field(init=False, default=0)
    drafts: list[int] = dataclasses.field(init=False, default_factory=list)
    proposals: list[int] = dataclasses.field(init=False, default_factory=list)
    matcher: Matcher | None = dataclasses.field(init=False, default=None, repr=False)
    held_logprobs: list[Any] = dataclasses.field(init=False, default_factory=list, repr=False)
    candidates: Candidates | None = dataclasses.field(init=False, default=None)
    finish_reason: FinishReason | None = dataclasses.field(init=False, default=None)
    stop_reason: int | str | None = dataclasses.field(init=False, default=None)
    number: int = dataclasses.field(init=False, default_factory=_NUMBERS.__next__)
    versions: Versions = dataclasses.field(init=False, default=())

    def __post_init__(self) -> None:
        self.token_ids = list(self.group.prompt_token_ids)

    @property
    def request_id(self) -> str:
        """The group's."""
        return self.group.request_id

    @property
    def sampling_params(self) -> Any:
        """The group's; the scheduler never reads it."""
        return self.group.sampling_params

    @property
    def logit_rules(self) -> LogitRules | None:
        """The group's; the scheduler never reads them."""
        return self.group.logit_rules

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        """The group's."""
        return self.group.prompt_token_ids

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.group.prompt_token_ids)

    @property
    def status(self) -> SequenceStatus:
        """Finished, or as the group is."""
        return SequenceStatus.FINISHED if self.is_finished else self.group.status

    @property
    def num_output_tokens(self) -> int:
        """Committed output tokens."""
        return len(self.token_ids) - len(self.group.prompt_token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        """The committed output tokens, a new list."""
        return self.token_ids[len(self.group.prompt_token_ids) :]

    @property
    def progress(self) -> Progress:
        """How far it is, see `RowColumns`; as at its beginning while it has no row."""
        if self.columns is None or self.row is None:
            return Progress(0, 0, 0, 0)
        return self.columns.progress(self.row)

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens, with those that uncommitted steps sample."""
        if self.columns is None:
            return len(self.token_ids) + self.num_late
        return int(self.columns.num_tokens[self.row])

    @property
    def num_pending(self) -> int:
        """Tokens that uncommitted steps sample; always 0 where the group `waits_for_host`."""
        return self.num_tokens - len(self.token_ids)

    @property
    def is_finished(self) -> bool:
        """Whether it has a `finish_reason`."""
        return self.finish_reason is not None

    def take_row(self, columns: RowColumns, row: int, progress: Progress) -> None:
        """Begins in a row, which is empty; no step in flight has its tokens."""
        assert self.row is None
        group, num_known = self.group, len(self.token_ids)
        columns.numbers[row] = self.number
        columns.num_known[row] = columns.num_tokens[row] = num_known
        columns.num_dispatched[row], columns.num_computed[row] = progress[:2]
        columns.num_reserved[row], columns.num_remembered[row] = progress[2:]
        columns.num_entered[row] = progress.num_remembered
        columns.max_length[row] = group.max_length
        columns.waits_for_host[row], columns.is_held[row] = group.waits_for_host, group.is_held
        columns.speculates[row], columns.uses_mask[row] = group.speculates, group.uses_mask
        columns.has_told[row] = False
        columns.runs_on[row] = group.runs_on
        columns.token_ids[row], columns.ending_ids[row] = self.token_ids, group.ending_ids
        columns.request_ids[row], columns.indices[row] = group.request_id, self.index
        self.row = row
        self.columns = columns  # last: an interrupt leaves none without a row

    def give_up_blocks(self) -> None:
        """Starts again, with prompt and output as the prompt; what is in flight stays counted."""
        if self.columns is not None and self.row is not None:
            self.num_late = self.num_pending
            self.columns.clear(self.row)
        self.columns = None
        self.row = self.leader = self.candidates = None
        self.drafts, self.proposals = [], []
        self.num_shared = 0


@dataclasses.dataclass(eq=False, slots=True)
class SequenceGroup:
    """A request: `num_seqs` completions of one prompt, which run, wait and lose blocks together.

    The prompt is computed once, by the first sequence; when its last token is, the others are
    forked from it, and each of them samples its own first token. A beam search begins with one
    sequence; after each token its sequences are replaced by their best continuations, and in the
    end by the results.

    Attributes:
      request_id: unique among unfinished requests.
      prompt_token_ids: the prompt, at least one token.
      max_tokens: the most tokens to generate per sequence, at least 1.
      stop_token_ids: tokens that end a sequence; reported as its `stop_reason`.
      eos_token_ids: the model's end tokens, which end it without a `stop_reason`; empty for
        `ignore_eos`.
      arrival_time: seconds, for metrics; the order of arrival is the order of `Scheduler.add`.
      sampling_params: carried for the sampler; the scheduler never reads it.
      logit_rules: what the request changes in its logits; None for nothing.
      priority: lower ones first, where the scheduler orders by it.
      num_seqs: how many completions, or beams.
      cache_salt: keeps its cached blocks apart from those of requests with another one.
      reads_cache: whether it uses cached blocks; not if each token of its prompt has to be computed
        for `prompt_logprobs`.
      writes_cache: whether its blocks are cached.
      beams: the beam search that the sequences are the beams of, best first; None for sampling.
      waits_for_host: whether no step continues a sequence before the host knows its last token, so
        that it runs in every second step while others run in each; so for beams and under grammars.
      sequences: all of them, by index.
      is_held: whether its tokens are given out when a sequence ends, and not before.
      status: see `SequenceStatus`.
      arrival: counts the scheduler's groups.
      is_forked: whether every live sequence has a row while the group runs; else only the first.
      swapped: its blocks in host memory while it is swapped out.
      is_in_flight: whether it waits while a step computes tokens of the life that preemption ended.
      planned_entry: how it would come in, planned while it waited, and from what; see `Admission`.
      stats: see `RequestStats`.
      ending_ids: `eos_token_ids` and `stop_token_ids`.
      max_length: tokens, prompt and output, at which its sequences end; the scheduler sets it.
      num_prompt_logprobs: log-probabilities of the prompt that steps have computed, or will: once.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    stop_token_ids: frozenset[int] = frozenset()
    eos_token_ids: frozenset[int] = frozenset()
    arrival_time: float = 0.0
    sampling_params: Any = None
    logit_rules: LogitRules | None = None
    priority: int = 0
    num_seqs: int = 1
    cache_salt: str | None = None
    reads_cache: bool = True
    writes_cache: bool = True
    beams: BeamSearch | None = None
    waits_for_host: bool = False
    sequences: list[TokenSequence] = dataclasses.field(init=False, repr=False)
    is_held: bool = dataclasses.field(init=False, default=False)
    status: SequenceStatus = dataclasses.field(init=False, default=SequenceStatus.WAITING)
    arrival: int = dataclasses.field(init=False, default=0)
    is_forked: bool = dataclasses.field(init=False, default=False)
    swapped: SwappedChunk | None = dataclasses.field(init=False, default=None)
    is_in_flight: bool = dataclasses.field(init=False, default=False)
    planned_entry: tuple[Any, Any] | None = dataclasses.field(init=False, default=None, repr=False)
    stats: RequestStats = dataclasses.field(init=False, default=RequestStats())
    ending_ids: frozenset[int] = dataclasses.field(init=False)
    max_length: int = dataclasses.field(init=False, default=0)
    num_prompt_logprobs: int = dataclasses.field(init=False, default=0)

    def __post_init__(self) -> None:
        eos, stop = self.eos_token_ids, self.stop_token_ids
        self.ending_ids = eos | stop if stop else eos  # most groups share one set
        num_first = self.num_seqs if self.beams is None else 1
        self.sequences = [TokenSequence(self, index) for index in range(num_first)]
        self.waits_for_host |= self.uses_mask or self.beams is not None
        if self.beams is not None:
            mine = self.num_seqs, self.max_tokens, self.ending_ids
            assert (self.beams.width, self.beams.max_tokens, self.beams.ending_ids) == mine

    @property
    def speculates(self) -> bool:
        """Whether tokens of its sequences are guessed."""
        return self.waits_for_host and self.beams is None and self.logit_rules is None

    @property
    def uses_mask(self) -> bool:
        """Whether its sequences have to follow a grammar."""
        return self.logit_rules is not None and self.logit_rules.grammar is not None

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt_token_ids)

    @property
    def live(self) -> list[TokenSequence]:
        """The sequences that have not finished, by index; a new list."""
        return [sequence for sequence in self.sequences if sequence.finish_reason is None]

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens found in the prefix cache when it was first admitted."""
        return self.stats.num_cached_tokens

    @property
    def num_preemptions(self) -> int:
        """How often it was preempted."""
        return self.stats.num_preemptions

    @property
    def num_rows(self) -> int:
        """Rows that it takes while it runs: one per live sequence, or beam to come."""
        return len(self.live) if self.beams is None else self.num_seqs

    @property
    def runs_on(self) -> bool:
        """Whether steps may compute several of its tokens before the host sees the first of them.

        Nobody waits for single ones, they depend on nothing that the host knows, and the device can
        tell when one of them ends a sequence.
        """
        needs_host = self.waits_for_host or self.logit_rules is not None
        return self.is_held and not needs_host and len(self.ending_ids) <= MAX_ENDING_IDS

    @property
    def cache_root(self) -> Root:
        """What its cached blocks depend on beside the tokens: today the salt alone."""
        return self.cache_salt

    def ending_of(self, token: int) -> tuple[FinishReason, int | None]:
        """Returns finish and stop reason of an output that is over with this token."""
        if token in self.eos_token_ids:
            return "stop", None
        return ("stop", token) if token in self.stop_token_ids else ("length", None)

    def forget_swapped(self) -> None:
        """Forgets the blocks in host memory; the caller gives their room back."""
        self.swapped = None
        for sequence in self.sequences:
            sequence.num_swapped, sequence.swapped_slots = 0, ()

    @property
    def placed(self) -> list[TokenSequence]:
        """The live sequences that have a row while the group runs."""
        live = self.live
        return live if self.is_forked else live[:1]

    @property
    def is_finished(self) -> bool:
        """Whether all its sequences are."""
        return self.status is SequenceStatus.FINISHED

    def abort(self, stop_reason: str | None = None) -> None:
        """Ends what runs of it by "abort", in any state, and counts on none of its figures.

        Whoever calls this empties the queues and the memory that it may be in.
        """
        for sequence in self.live:
            sequence.give_up_blocks()
            sequence.num_late = 0
            sequence.stop_reason = stop_reason
            sequence.finish_reason = "abort"
        self.swapped = None
        self.status = SequenceStatus.FINISHED
