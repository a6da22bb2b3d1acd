"""Makes log-probabilities as callers get them: by token id, with each token's text."""

from collections.abc import Callable, Sequence

from pallas_paged.engine.core.core_output import TokenLogprobs
from pallas_paged.engine.outputs import Logprob


def logprobs_by_token(
    token_ids: Sequence[int], found: TokenLogprobs, decode: Callable[[int], str] | None
) -> list[dict[int, Logprob]]:
    """Returns, for each place, the most likely tokens in their order and the one that stands there.

    Args:
      token_ids: the tokens that stand there.
      found: how likely the model found these n places, or more.
      decode: gives a token's text; None leaves the texts out.
    """
    places = zip(
        token_ids,
        found.logprobs.tolist(),
        found.ranks.tolist(),
        found.top_token_ids.tolist(),
        found.top_logprobs.tolist(),
        strict=False,
    )
    by_token = []
    for token, logprob, rank, top_token_ids, top_logprobs in places:
        tops = zip(top_token_ids, top_logprobs, strict=True)
        here = {
            top: Logprob(top_logprob, top_rank, decode(top) if decode is not None else None)
            for top_rank, (top, top_logprob) in enumerate(tops, 1)
        }
        if token not in here:
            here[token] = Logprob(logprob, rank, decode(token) if decode is not None else None)
        by_token.append(here)
    return by_token
