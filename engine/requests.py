"""A request between its arrival and its last output: what has been made of its tokens so far."""

import dataclasses
import time
from collections.abc import Sequence as Seq
from typing import Any

from pallas_paged.engine import beam_groups
from pallas_paged.engine.detokenizer import Detokenizer
from pallas_paged.engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from pallas_paged.engine.sequence import Sequence, SequenceGroup
from pallas_paged.engine.stop import StopMatcher


@dataclasses.dataclass
class Completion:
    """A sequence, and what has been made of it so far.

    Attributes:
      sequence: the sequence.
      detokenizer: None if nobody wants text.
      stop: looks for stop strings.
      text: the text that may be given out.
      num_tokens: output tokens that are taken in, with text and log-probabilities; no more are
        given out.
      cumulative_logprob: the sum of those tokens' log-probabilities, where the sequence has any.
    """

    sequence: Sequence
    detokenizer: Detokenizer | None
    stop: StopMatcher
    text: str = ""
    num_tokens: int = 0
    cumulative_logprob: float = 0.0

    def take_text(self, text: str, num_tokens: int) -> None:
        """Adds to the text what `num_tokens` output tokens have settled."""
        is_early = num_tokens <= self.sequence.sampling_params.min_tokens
        self.text += self.stop.skip(text) if is_early else self.stop.append(text)


@dataclasses.dataclass
class Request:
    """A request between arrival and its last output.

    Attributes:
      group: its sequences.
      prompt: its text, if it came as text.
      completions: one per sequence; those of a beam search are made when it ends, and until then
        there is a first beam.
      final_only: whether nobody wants an output before the last.
      prompt_logprobs: as they were given out last.
      first_scheduled_time_s: see `RequestMetrics`, as is the next one.
      first_token_time_s: likewise.
    """

    group: SequenceGroup
    prompt: str | None
    completions: list[Completion]
    final_only: bool = False
    prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None = None
    first_scheduled_time_s: float | None = None
    first_token_time_s: float | None = None


def update_text(completion: Completion, detokenizer: Detokenizer, new: Seq[int]) -> None:
    """Adds the text of new tokens, up to a stop string."""
    sequence, params = completion.sequence, completion.sequence.sampling_params
    num_tokens = completion.num_tokens + len(new)
    if sequence.finish_reason == "stop" and not params.include_stop_str_in_output:
        new = new[:-1]  # the token that ended the output is not part of its text
    for count, token in enumerate(new, completion.num_tokens + 1):
        completion.take_text(detokenizer.append(token), count)
    if sequence.is_finished:
        completion.take_text(detokenizer.finish(), num_tokens)
        if completion.stop.stop_reason is None:
            completion.text += completion.stop.finish()


def output_of(request: Request) -> RequestOutput:
    """Returns a request as far as it has come."""
    group = request.group
    if group.sampling_params.prompt_logprobs is not None:
        count = 1 + len(group.prompt_logprobs)
        if request.prompt_logprobs is None or len(request.prompt_logprobs) != count:
            request.prompt_logprobs = (None, *group.prompt_logprobs)
    return RequestOutput(
        request_id=group.request_id,
        prompt=request.prompt,
        prompt_token_ids=group.prompt_token_ids,
        prompt_logprobs=request.prompt_logprobs,
        outputs=tuple(map(_completion_output, request.completions)),
        finished=group.is_finished,
        metrics=RequestMetrics(
            arrival_time_s=group.arrival_time,
            first_scheduled_time_s=request.first_scheduled_time_s,
            first_token_time_s=request.first_token_time_s,
            finish_time_s=time.monotonic() if group.is_finished else None,
            num_preemptions=group.num_preemptions,
        ),
        num_cached_tokens=group.num_cached_tokens,
    )


def _completion_output(completion: Completion) -> CompletionOutput:
    sequence, begin = completion.sequence, completion.sequence.num_prompt_tokens
    return CompletionOutput(
        index=sequence.index,
        text=None if completion.detokenizer is None else completion.text,
        token_ids=tuple(sequence.token_ids[begin : begin + completion.num_tokens]),
        finish_reason=sequence.finish_reason,
        stop_reason=sequence.stop_reason,
        **_logprobs_of(completion),
    )


def _logprobs_of(completion: Completion) -> dict[str, Any]:
    """Returns the fields of `CompletionOutput` that hold log-probabilities, if it has them."""
    sequence = completion.sequence
    if sequence.group.beams is not None:
        cumulative_logprob, score = beam_groups.figures(sequence)
        return {"cumulative_logprob": cumulative_logprob, "score": score}
    if sequence.sampling_params.logprobs is None:
        return {}
    return {
        "logprobs": tuple(sequence.logprobs[: completion.num_tokens]),
        "cumulative_logprob": completion.cumulative_logprob,
    }
