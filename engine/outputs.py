"""What a request gives back: `RequestOutput` and its parts."""

import dataclasses

from pallas_paged.engine.core.core_output import FinishReason


@dataclasses.dataclass(frozen=True, slots=True)
class RequestMetrics:
    """When things happened to a request, as seconds of `time.monotonic()`.

    Attributes:
      arrival_time_s: the engine took the request in.
      first_scheduled_time_s: it first took part in a step; None while it waits.
      first_token_time_s: its first token reached the host; None before.
      finish_time_s: it finished or was aborted; None before.
      num_preemptions: times it lost its blocks and was recomputed.
    """

    arrival_time_s: float
    first_scheduled_time_s: float | None = None
    first_token_time_s: float | None = None
    finish_time_s: float | None = None
    num_preemptions: int = 0


# The others are not frozen: a frozen one takes five times as long to make (2.3 us instead of 0.45),
# and a stream makes two of them for every token.


@dataclasses.dataclass(slots=True)
class Logprob:
    """How likely the model found a token, before bias, masks, penalties and temperature.

    Or, of sampled tokens with `EngineConfig.logprobs_mode="processed"`, how likely it was to be
    drawn: -inf for one that was left out.

    Attributes:
      logprob: log-softmax of the logits.
      rank: the token's place among all tokens, 1 for the most likely.
      decoded_token: its text, None without a tokenizer or with `detokenize=False`.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclasses.dataclass(slots=True)
class CompletionOutput:
    """One completion of a request: as far as it has come, or what is new of it.

    With `RequestOutputKind.DELTA`, `text`, `token_ids` and `logprobs` hold what has come since the
    request's output before this one; everything else is as it stands now.

    Attributes:
      index: which of the request's completions this is.
      text: the text of the tokens; None without a tokenizer or with `detokenize=False`. While
        streaming it ends before a character or a stop string that may still be under way. A
        tokenizer's `clean_up_tokenization_spaces` is not applied.
      token_ids: the generated tokens, the one that ended the completion included.
      cumulative_logprob: sum of the log-probabilities of all tokens so far; None unless asked for,
        or of a beam search.
      logprobs: per token, by token id: the most likely tokens in their order and the token itself;
        None unless asked for.
      finish_reason: None while it runs.
      stop_reason: the stop string or the token id of `stop_token_ids` that ended it, None when EOS
        did; what went wrong when the engine aborted it.
      score: of a beam search, the sum with the length penalty; else None.
      version_runs: (number of tokens, version of the weights) pairs, which say of `token_ids` which
        weights they came from: tokens of several versions are those of a request that went on
        while its engine got new ones.
    """

    index: int
    text: str | None
    token_ids: tuple[int, ...]
    cumulative_logprob: float | None = None
    logprobs: tuple[dict[int, Logprob], ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    score: float | None = None
    version_runs: tuple[tuple[int, int], ...] = ()

    @property
    def weights_versions(self) -> tuple[int, ...]:
        """The version of the weights that each token came from, see `LLM.update_weights`."""
        return tuple(version for count, version in self.version_runs for _ in range(count))

    @property
    def token_logprobs(self) -> tuple[float, ...] | None:
        """The log-probability of each of `token_ids`, out of `logprobs`; None without these."""
        if self.logprobs is None:
            return None
        places = zip(self.token_ids, self.logprobs, strict=True)
        return tuple([found[token].logprob for token, found in places])

    def merged_with(self, later: "CompletionOutput") -> "CompletionOutput":
        """Returns this delta and the next one of the same completion as one delta."""
        return CompletionOutput(  # `dataclasses.replace` takes four times as long
            later.index,
            None if self.text is None or later.text is None else self.text + later.text,
            self.token_ids + later.token_ids,
            later.cumulative_logprob,
            None
            if self.logprobs is None or later.logprobs is None
            else self.logprobs + later.logprobs,
            later.finish_reason,
            later.stop_reason,
            later.score,
            self.version_runs + later.version_runs,
        )


@dataclasses.dataclass(slots=True)
class RequestOutput:
    """A request with its completions, finished or, while streaming, as far as they have come.

    A beam search has an output when it is over, its results best first. If it was aborted, they are
    its best beams at that moment.

    Attributes:
      request_id: the engine's name for the request.
      prompt: the prompt's text; None when it came as tokens alone.
      prompt_token_ids: the prompt's tokens.
      outputs: the completions, by index; of a beam search, best first. With
        `RequestOutputKind.DELTA` only those of which something is new.
      finished: all completions are.
      metrics: times and counts of this request.
      num_cached_tokens: prompt tokens whose KV came from the prefix cache.
      prompt_logprobs: per prompt token, as in `CompletionOutput.logprobs`; None for the first one,
        which nothing predicts. All are there with the first generated token, those of the chunks
        computed so far in what is aborted before. None unless asked for, and in every delta but the
        first.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    finished: bool
    metrics: RequestMetrics
    num_cached_tokens: int = 0
    prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None = None

    def merged_with(self, later: "RequestOutput") -> "RequestOutput":
        """Returns this delta and the next one of the same request as one delta.

        For callers that fetch outputs less often than steps happen. It is for
        `RequestOutputKind.DELTA` alone: of the other kinds the later output holds the earlier one.
        """
        assert later.request_id == self.request_id
        mine, its = self.outputs, later.outputs
        if len(mine) == len(its) == 1 and mine[0].index == its[0].index:
            outputs: tuple[CompletionOutput, ...] = (mine[0].merged_with(its[0]),)
        else:
            merged = {output.index: output for output in mine}
            for output in its:
                earlier = merged.get(output.index)
                merged[output.index] = output if earlier is None else earlier.merged_with(output)
            outputs = tuple(merged[index] for index in sorted(merged))
        return RequestOutput(
            later.request_id,
            later.prompt,
            later.prompt_token_ids,
            outputs,
            later.finished,
            later.metrics,
            later.num_cached_tokens,
            self.prompt_logprobs or later.prompt_logprobs,
        )
