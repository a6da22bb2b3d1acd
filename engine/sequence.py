"""One request as the scheduler sees it: its tokens, and how far their computation has come."""

import dataclasses
import enum
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pallas_paged.engine.logit_rules import LogitRules

FinishReason = Literal["stop", "length", "abort"]


class SequenceStatus(enum.Enum):
    """Where a sequence stands: in the queue, in the block tables, or done."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


@dataclasses.dataclass(eq=False, slots=True)
class Sequence:
    """A prompt and the tokens generated for it.

    Three counts tell how far a sequence is, because the host runs one step ahead of the device:
    `num_computed <= num_dispatched <= num_reserved`. They count from position 0 and start again
    at 0 when the sequence is preempted, since its blocks are given back. Only the scheduler
    changes what follows `sampling_params`.

    Attributes:
      request_id: unique among unfinished requests.
      prompt_token_ids: the prompt, at least one token.
      max_tokens: the most tokens to generate, at least 1.
      stop_token_ids: tokens that end the sequence; reported as its `stop_reason`.
      eos_token_ids: the model's end tokens, which end it without a `stop_reason`; empty for
        `ignore_eos`.
      arrival_time: seconds, for metrics; the order of arrival is the order of `Scheduler.add`.
      sampling_params: carried for the sampler; the scheduler never reads it.
      logit_rules: what the request changes in its logits, None for nothing; carried like
        `sampling_params`, of which it is made.
      reads_prefix_cache: whether blocks of the prompt may come from a cache; not if each of its
        tokens has to be computed for `prompt_logprobs`.
      token_ids: the prompt and the committed output tokens.
      status: see `SequenceStatus`.
      row: its row in the block tables while it runs, else None.
      num_reserved: tokens that its blocks are allocated for.
      num_dispatched: tokens whose keys and values are computed, or will be by a step in flight.
      num_computed: tokens whose keys and values a committed step computed.
      num_in_flight: uncommitted steps that hold the sequence, those before a preemption included.
      num_pending: tokens sampled by uncommitted steps: on the device, not in `token_ids` yet. 0
        or 1 whenever a step is scheduled.
      num_preemptions: how often it was preempted.
      finish_reason: None until it finished.
      stop_reason: the stop token or stop string that ended it, None for any other end.
      logprobs: one entry per output token where `sampling_params` ask for them, else empty; the
        engine fills it beside `commit`, and preemption leaves it alone.
      prompt_logprobs: the same for the prompt's tokens but the first.
      num_prompt_logprobs: entries of `prompt_logprobs` that are there or will be when the steps in
        flight are taken in; the runner counts them.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    stop_token_ids: frozenset[int] = frozenset()
    eos_token_ids: frozenset[int] = frozenset()
    arrival_time: float = 0.0
    sampling_params: Any = None
    logit_rules: "LogitRules | None" = None
    reads_prefix_cache: bool = True

    token_ids: list[int] = dataclasses.field(init=False)
    status: SequenceStatus = dataclasses.field(init=False, default=SequenceStatus.WAITING)
    row: int | None = dataclasses.field(init=False, default=None)
    num_reserved: int = dataclasses.field(init=False, default=0)
    num_dispatched: int = dataclasses.field(init=False, default=0)
    num_computed: int = dataclasses.field(init=False, default=0)
    num_in_flight: int = dataclasses.field(init=False, default=0)
    num_pending: int = dataclasses.field(init=False, default=0)
    num_preemptions: int = dataclasses.field(init=False, default=0)
    finish_reason: FinishReason | None = dataclasses.field(init=False, default=None)
    stop_reason: int | str | None = dataclasses.field(init=False, default=None)
    logprobs: list[Any] = dataclasses.field(init=False, default_factory=list)
    prompt_logprobs: list[Any] = dataclasses.field(init=False, default_factory=list)
    num_prompt_logprobs: int = dataclasses.field(init=False, default=0)

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Committed output tokens."""
        return len(self.token_ids) - len(self.prompt_token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        """The committed output tokens, a new list."""
        return self.token_ids[len(self.prompt_token_ids) :]

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens, the pending ones included."""
        return len(self.token_ids) + self.num_pending

    @property
    def is_finished(self) -> bool:
        """Whether it has a `finish_reason`."""
        return self.status is SequenceStatus.FINISHED
