"""What a request asks for: `SamplingParams` or `BeamSearchParams`, checked when they are built."""

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import Any

from pallas_paged.engine.core.beam_search import BeamSearch, EarlyStopping
from pallas_paged.engine.field_checks import (
    Check,
    flag,
    integer,
    is_int,
    logit_bias,
    real,
    refusal,
    strings,
    token_ids,
)
from pallas_paged.engine.structured_outputs import StructuredOutputsParams

MAX_N = 16384
MAX_SEED = 2**64 - 1


class RequestOutputKind(enum.Enum):
    """What each output of a request holds; the values are vLLM's.

    Attributes:
      CUMULATIVE: all that there is of the request so far.
      DELTA: what is new since its output before: of text, tokens and log-probabilities.
      FINAL_ONLY: everything; there is one output, when the request has ended.
    """

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen, and when it ends.

    The logits change in this order: `logit_bias` and what excludes tokens, then the penalties, then
    `structured_outputs` (see `pallas_paged.engine.device.row_state`), then temperature, `min_p`,
    `top_k`, `top_p` (see `pallas_paged.engine.device.sampling`).

    Attributes:
      n: completions per prompt, 1 to 16384, and no more than the engine's `max_num_seqs`. The
        prompt is computed once. Random numbers depend on the seed and on which completion it is.
      presence_penalty: subtracted from the logits of tokens that the output holds; in [-2, 2].
      frequency_penalty: subtracted once for each time the output holds the token; in [-2, 2].
      repetition_penalty: divides the positive and multiplies the negative logits of tokens that the
        prompt or the output holds; finite and > 0. 1 is off.
      temperature: divides the logits; finite and >= 0. 0 is greedy: the most likely token.
      top_p: in (0, 1]; keeps the smallest set of most likely tokens that has this mass. 1 is off.
      top_k: keeps the k most likely tokens. 0 or -1 is off; held as 0.
      min_p: in [0, 1]; drops tokens less likely than this share of the most likely one's. 0 is off.
      seed: 0 to 2**64 - 1; the same seed gives the same tokens whatever else is running. None or
        -1: the engine picks one; held as None.
      stop: a string or strings that end the request when they appear in its text; held as a tuple.
      stop_token_ids: tokens that end the request besides EOS; held as a tuple.
      ignore_eos: go on after an EOS token.
      max_tokens: most tokens to generate, >= 1. None: as many as fit into the
        model's length and the KV pool.
      min_tokens: none of the first `min_tokens` tokens ends the request: EOS (unless `ignore_eos`)
        and `stop_token_ids` are not chosen, and `stop` is not looked for. 0 to `max_tokens`.
      logprobs: give each token's log-probability, and those of so many of the most likely tokens;
        0 is the token's alone, -1 all, None nothing. They are the model's own: the log-softmax of
        its logits before bias, masks, penalties and temperature; unless `logprobs_mode` of the
        engine says what tokens are drawn from. At most the engine's `max_logprobs`. 0 costs little
        more than None, see `EngineConfig.token_logprobs`.
      prompt_logprobs: the model's own for the prompt's tokens but the first. Such a request
        computes its whole prompt and takes nothing from a prefix cache.
      detokenize: make text of the tokens. Without it `text` is None and `stop` must be empty.
      skip_special_tokens: leave special tokens out of the text.
      include_stop_str_in_output: keep the stop string that ended the text.
      logit_bias: added to the logits of given token ids; clamped to [-100, 100].
      allowed_token_ids: the only token ids to choose from; None is all.
      bad_words: strings never to generate: the tokens of each, as the tokenizer splits it at the
        start of a text and behind a space, never follow each other in the output. One that begins
        with whitespace brings its own space, and one that begins with no letter or digit is
        excluded right behind other text too. Other tokens that spell the same are not excluded,
        and neither is a word that the prompt has begun.
      structured_outputs: what the output has to look like; None is anything. It is applied after
        all that is above, and so never gives way: if the rules leave no token, the request ends by
        "abort", or by "stop" where its output is whole. Excludes what could cut the output, or keep
        it from ending: `stop`, `stop_token_ids`, `include_stop_str_in_output`, `ignore_eos` and
        `min_tokens`.
      skip_reading_prefix_cache: compute the whole prompt, whatever is cached.
      skip_writing_prefix_cache: keep nothing of this request for later ones.
      output_kind: what the outputs of a stream hold, see `RequestOutputKind`. A delta costs the
        same however long the request has become; a cumulative output is a copy of all of it. Where
        one output per request is returned, as by `LLM.generate`, that holds everything.

    Raises:
      ValueError: a field is out of its range, of the wrong type, or excludes another.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    structured_outputs: StructuredOutputsParams | None = None
    skip_reading_prefix_cache: bool = False
    skip_writing_prefix_cache: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __post_init__(self) -> None:
        for field, check in _CHECKS.items():
            object.__setattr__(self, field, check(field, getattr(self, field)))
        self._check_together()

    def logprob_targets(self, prompt: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
        """Returns whose log-probabilities `prompt_logprobs` are: a first place, and all tokens."""
        return 1, prompt

    def logprob_temperature(self) -> float:
        """Returns what the logits are divided by for `prompt_logprobs`."""
        return 1.0

    def _check_together(self) -> None:
        if self.n > 1 and self.temperature == 0:
            raise ValueError(
                f"n={self.n} with temperature=0.0 would give {self.n} equal completions; use n=1, "
                "or a temperature above 0"
            )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens={self.min_tokens} must be at most max_tokens={self.max_tokens}"
            )
        if self.stop and not self.detokenize:
            raise ValueError(
                f"stop={self.stop!r} needs the text, but detokenize=False; use detokenize=True, "
                "or stop_token_ids"
            )
        for field in _CUT_OUTPUTS if self.structured_outputs is not None else ():
            if value := getattr(self, field):
                raise ValueError(
                    f"{field}={value!r:.80} excludes structured_outputs, which end when they are "
                    "whole; leave one of them out"
                )


@dataclasses.dataclass(frozen=True)
class BeamSearchParams:
    """A beam search for the most likely continuations, with the semantics of transformers.

    See `pallas_paged.engine.core.beam_search` for the rule. Log-probabilities are the model's own.

    Attributes:
      beam_width: how many beams go on at each token, >= 1, and no more than the engine's
        `max_num_seqs`. The engine reports so many tokens beside the ending ones for each beam,
        which its `max_logprobs` bounds, unless they are at most 32.
      max_tokens: most tokens to generate, >= 1.
      length_penalty: a result's score is the sum of its log-probabilities divided by the number of
        its tokens to this power; in [-10, 10]. Above 0 favours long results, below 0 short ones.
      early_stopping: when to stop once there are `beam_width` results: True at once, False when the
        best beam has a worse score than all of them, "never" when no beam can get a better one.
      num_return: how many of the results to return, best first; 1 to `beam_width`, None is all.
      temperature: 0; beams are not sampled.
      ignore_eos: go on after an EOS token.
      stop_token_ids: tokens that end a result besides EOS; held as a tuple.
      detokenize: make text of the tokens. Without it `text` is None.
      skip_special_tokens: leave special tokens out of the text.
      skip_reading_prefix_cache: compute the whole prompt, whatever is cached.
      skip_writing_prefix_cache: keep nothing of this request for later ones.

    Raises:
      ValueError: a field is out of its range or of the wrong type.
    """

    beam_width: int
    max_tokens: int
    _: dataclasses.KW_ONLY
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False
    num_return: int | None = None
    temperature: float = 0.0
    ignore_eos: bool = False
    stop_token_ids: Sequence[int] | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    skip_reading_prefix_cache: bool = False
    skip_writing_prefix_cache: bool = False

    def __post_init__(self) -> None:
        for field, check in _BEAM_CHECKS.items():
            object.__setattr__(self, field, check(field, getattr(self, field)))
        if self.num_return is None:
            object.__setattr__(self, "num_return", self.beam_width)
        if self.num_return > self.beam_width:  # type: ignore[operator]
            raise ValueError(
                f"num_return={self.num_return} must be at most beam_width={self.beam_width}"
            )

    def search(self, ending_ids: frozenset[int]) -> BeamSearch:
        """Returns a search that begins, in which these tokens end a result."""
        assert self.num_return is not None
        return BeamSearch(
            self.beam_width,
            self.max_tokens,
            ending_ids,
            self.length_penalty,
            self.early_stopping,
            self.num_return,
        )

    def of_each_beam(self, num_candidates: int) -> SamplingParams:
        """Returns what a beam asks of the steps that compute its tokens: likely next ones."""
        return SamplingParams(
            temperature=0,
            logprobs=num_candidates,
            seed=0,
            ignore_eos=self.ignore_eos,
            stop_token_ids=self.stop_token_ids,
            max_tokens=self.max_tokens,
            detokenize=self.detokenize,
            skip_special_tokens=self.skip_special_tokens,
            skip_reading_prefix_cache=self.skip_reading_prefix_cache,
            skip_writing_prefix_cache=self.skip_writing_prefix_cache,
        )


def _top_k(field: str, value: Any) -> int:
    k = integer(-1, 2**31 - 1, "use 0 or -1 to keep every token")(field, value)
    return max(k, 0)


def _seed(field: str, value: Any) -> int | None:
    if is_int(value) and value == -1:
        return None
    rule = "use None or -1 to let the engine pick one"
    return integer(0, MAX_SEED, rule, optional=True)(field, value)


def _stop(field: str, value: Any) -> tuple[str, ...]:
    return strings(field, value, single=True)


def _bad_words(field: str, value: Any) -> tuple[str, ...] | None:
    return strings(field, value) or None


def _allowed_token_ids(field: str, value: Any) -> tuple[int, ...] | None:
    ids = token_ids(field, value)
    if value is not None and not ids:
        raise refusal(field, value, "None or at least one token id; use None to allow every token")
    return ids or None


def _structured_outputs(field: str, value: Any) -> StructuredOutputsParams | None:
    if value is not None and not isinstance(value, StructuredOutputsParams):
        raise refusal(field, value, 'StructuredOutputsParams, such as (choice=["yes", "no"])')
    return value


def _output_kind(field: str, value: Any) -> RequestOutputKind:
    if not isinstance(value, RequestOutputKind):
        raise refusal(field, value, "a RequestOutputKind, such as RequestOutputKind.DELTA")
    return value


def _early_stopping(field: str, value: Any) -> EarlyStopping:
    known = isinstance(value, bool) or (isinstance(value, str) and value == "never")
    if not known:
        raise refusal(field, value, 'False, True or "never"')
    result: EarlyStopping = value
    return result


_CUT_OUTPUTS = (
    *("stop", "stop_token_ids", "include_stop_str_in_output"),
    *("ignore_eos", "min_tokens"),
)
_PENALTY = real(lambda x: -2 <= x <= 2, "in [-2, 2]", "use 0 for none")
_LOGPROBS = integer(-1, None, "use None for none and -1 for the whole vocabulary", optional=True)

_CHECKS: dict[str, Check] = {
    "n": integer(1, MAX_N, "send more requests for more completions"),
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "repetition_penalty": real(lambda x: x > 0, "> 0", "use 1 for none"),
    "temperature": real(lambda x: x >= 0, ">= 0", "use 0 for the most likely token"),
    "top_p": real(lambda x: 0 < x <= 1, "in (0, 1]", "use 1 to keep every token"),
    "top_k": _top_k,
    "min_p": real(lambda x: 0 <= x <= 1, "in [0, 1]", "use 0 to keep every token"),
    "seed": _seed,
    "stop": _stop,
    "stop_token_ids": token_ids,
    "ignore_eos": flag,
    "max_tokens": integer(
        1, None, "use None for as many as fit into the model's length", optional=True
    ),
    "min_tokens": integer(0, None, "use 0 for none"),
    "logprobs": _LOGPROBS,
    "prompt_logprobs": _LOGPROBS,
    "detokenize": flag,
    "skip_special_tokens": flag,
    "include_stop_str_in_output": flag,
    "logit_bias": logit_bias,
    "allowed_token_ids": _allowed_token_ids,
    "bad_words": _bad_words,
    "structured_outputs": _structured_outputs,
    "skip_reading_prefix_cache": flag,
    "skip_writing_prefix_cache": flag,
    "output_kind": _output_kind,
}

_BEAM_CHECKS: dict[str, Check] = {
    "beam_width": integer(1, None, "use SamplingParams to sample"),
    "max_tokens": integer(1, None, "a search needs a length at which it ends"),
    "length_penalty": real(lambda x: -10 <= x <= 10, "in [-10, 10]", "use 0 for none"),
    "early_stopping": _early_stopping,
    "num_return": integer(1, None, "use None for all of them", optional=True),
    "temperature": real(lambda x: x == 0, "that is 0", "use SamplingParams to sample"),
    "ignore_eos": flag,
    "stop_token_ids": token_ids,
    "detokenize": flag,
    "skip_special_tokens": flag,
    "skip_reading_prefix_cache": flag,
    "skip_writing_prefix_cache": flag,
}
