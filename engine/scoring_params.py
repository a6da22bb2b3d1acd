"""Requests that only ask how likely the model finds tokens that are known."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from pallas_paged.engine.field_checks import real
from pallas_paged.engine.outputs import RequestOutput
from pallas_paged.engine.sampling_params import RequestOutputKind, SamplingParams


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoringParams(SamplingParams):
    """Asks for the log-probabilities of the last tokens of a text, whose last token is not read.

    They are those of the model's own logits, divided by a temperature, and come as
    `RequestOutput.prompt_logprobs`. The one token that is generated is nobody's. Such a request
    neither reads nor writes the prefix cache.

    Attributes:
      num_scored: how many of the last tokens, at least 1.
      last_token: stands behind the prompt.
      score_temperature: divides the logits; above 0.
    """

    num_scored: int
    last_token: int
    score_temperature: float = 1.0

    def logprob_temperature(self) -> float:
        """See `SamplingParams.logprob_temperature`."""
        return self.score_temperature

    def logprob_targets(self, prompt: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
        """See `SamplingParams.logprob_targets`."""
        tokens = (*prompt, self.last_token)
        return len(tokens) - self.num_scored, tokens


def check_temperature(temperature: float) -> float:
    """Returns the temperature of scores; `ValueError` if it is none."""
    return real(lambda x: x > 0, "> 0", "use 1 for the model's own")("temperature", temperature)


def scoring_params(
    token_ids: Sequence[int], num_scored: int, temperature: float = 1.0
) -> ScoringParams:
    """Returns what asks for the last `num_scored` of these tokens behind a prompt of the others.

    The prompt of the request is `token_ids[:-1]`.
    """
    return ScoringParams(
        num_scored=num_scored,
        last_token=token_ids[-1],
        score_temperature=temperature,
        temperature=0,
        max_tokens=1,
        ignore_eos=True,
        prompt_logprobs=0,
        detokenize=False,
        skip_reading_prefix_cache=True,
        skip_writing_prefix_cache=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def token_logprobs(output: RequestOutput, completion: Sequence[int]) -> np.ndarray:
    """Returns f32[n], the log-probabilities of the n tokens that such a request scored.

    Raises:
      RuntimeError: the engine ended the request before.
    """
    if output.outputs[0].finish_reason == "abort":
        raise RuntimeError(
            f"request {output.request_id} was ended: {output.outputs[0].stop_reason}"
        )
    found = (output.prompt_logprobs or ())[-len(completion) :]
    return np.array(
        [place[token].logprob for token, place in zip(completion, found, strict=True) if place],
        np.float32,
    )
