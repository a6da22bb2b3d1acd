"""From the engine's log-probabilities to those of OpenAI's answers."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

from pallas_paged.engine.outputs import CompletionOutput, Logprob, RequestOutput
from pallas_paged.engine.serve.responses import (
    ChatLogprobs,
    Logprobs,
    TokenLogprob,
    TopLogprob,
)

_LEAST = -9999.0
"""In the place of minus infinity, which JSON has not."""


def completion_logprobs(
    token_ids: Sequence[int],
    found: Sequence[dict[int, Logprob] | None],
    offset: int,
    decode_token: Callable[[int], str] | None,
    begin: str,
    special_ids: Collection[int],
) -> tuple[Logprobs, int]:
    """Returns the log-probabilities of tokens, in columns, and the offset behind them.

    Args:
      token_ids: the tokens.
      found: of each; None for the first one of a prompt, which nothing predicts.
      offset: characters of the answer's text before the first token's.
      decode_token: gives the text of a token; None without a tokenizer.
      begin: what is known of the answer's text from its beginning on.
      special_ids: tokens that are in the text only where `begin` has them.
    """
    made = Logprobs([], [], [], [])
    assert made.top_logprobs is not None
    for token_id, likely in zip(token_ids, found, strict=True):
        mine = None if likely is None else likely[token_id]
        text = (mine and mine.decoded_token) or ""
        if mine is None and decode_token is not None:
            text = decode_token(token_id)
        made.text_offset.append(offset)
        made.tokens.append(text)
        made.token_logprobs.append(None if mine is None else _finite(mine.logprob))
        made.top_logprobs.append(
            None
            if likely is None
            else {one.decoded_token or "": _finite(one.logprob) for one in likely.values()}
        )
        if token_id not in special_ids or begin.startswith(text, offset):
            offset += len(text)
    return made, offset


def chat_logprobs(output: CompletionOutput, num_top: int) -> ChatLogprobs | None:
    """Returns the log-probabilities of a message's tokens, with the `num_top` likely ones."""
    if output.logprobs is None:
        return None
    content = []
    for token_id, likely in zip(output.token_ids, output.logprobs, strict=True):
        mine = likely[token_id]
        top = [one for one in likely.values() if one.rank <= num_top][:num_top]
        content.append(
            TokenLogprob(
                *_parts(mine),
                [TopLogprob(*_parts(one)) for one in top],
            )
        )
    return ChatLogprobs(content)


def prompt_logprobs(output: RequestOutput) -> list[dict[str, Any] | None] | None:
    """Returns the prompt's, by token id, or None where nobody asked."""
    if output.prompt_logprobs is None:
        return None
    return [
        None
        if likely is None
        else {
            str(token_id): {
                "logprob": _finite(one.logprob),
                "rank": one.rank,
                "decoded_token": one.decoded_token,
            }
            for token_id, one in likely.items()
        }
        for likely in output.prompt_logprobs
    ]


def _parts(one: Logprob) -> tuple[str, float, list[int]]:
    text = one.decoded_token or ""
    return text, _finite(one.logprob), list(text.encode("utf-8", "replace"))


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)
