"""Text from token ids that arrive one at a time."""

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
NUM_CONTEXT = 8
"""Tokens of context in front of new ones; any that have text do, a few bytes may have none."""
MAX_PENDING = 8
"""Tokens without settled text after which the search for a settled part of them starts."""


class Decoder(Protocol):
    """What the detokenizer needs of a tokenizer."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Returns the text of the tokens."""
        ...


class Detokenizer:
    """Turns one completion's tokens into text that never changes once it is given out.

    The pieces, put together, are what the completion adds to its prompt:
    `decode(prompt + tokens)` without `decode(prompt)`. With no prompt that is exactly
    `decode(tokens)`. The two differ for sentencepiece-like tokenizers, whose decoders drop the
    space in front of the first word: after a prompt that space belongs to the text. A prompt that
    ends inside a character is left out: the text is then exactly `decode(tokens)`.

    Only the newest tokens are decoded, behind a few that are already read and stand for all
    before them, so the cost per token does not grow. Text that ends in the replacement character
    may be a character under way and waits for more tokens, or for `finish`.

    One exception to the rule above, in favour of text that is already out: a byte-fallback decoder
    (Llama 2) turns a whole run of byte tokens into replacement characters when one of them is
    wrong; here the characters that were complete before the wrong byte stay.
    """

    def __init__(
        self,
        tokenizer: Decoder,
        prompt_token_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
    ):
        """Starts behind the prompt, of which only the end matters."""
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window = list(prompt_token_ids[-NUM_CONTEXT:])  # read tokens, then pending ones
        self._num_read = len(self._window)
        self._read_text = self._decode(self._window)
        if self._read_text.endswith(REPLACEMENT):
            self._window, self._num_read, self._read_text = [], 0, ""

    def append(self, token_id: int) -> str:
        """Takes the next token and returns the text that is settled by it, often empty."""
        self._window.append(token_id)
        text = self._decode(self._window)
        if text == self._read_text:
            return self._skip_empty()
        if not text.endswith(REPLACEMENT):
            return self._advance(text, num_pending=0)
        if len(self._window) - self._num_read > MAX_PENDING:
            return self._settle_part(text)
        return ""

    def finish(self) -> str:
        """Returns the rest, in which incomplete characters are replacement characters."""
        return self._added(self._decode(self._window))

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens)

    def _added(self, text: str) -> str:
        """Returns what the window's `text` has beyond what is read."""
        if text.startswith(self._read_text):
            return text[len(self._read_text) :]
        return self._decode(self._window[self._num_read :])  # byte fallback, see the class

    def _skip_empty(self) -> str:
        """Forgets tokens that have no text (skipped special ones) before they pile up."""
        if len(self._window) > NUM_CONTEXT + MAX_PENDING:
            self._window.pop()
        return ""

    def _advance(self, text: str, num_pending: int) -> str:
        """Returns the new part of `text`, that of all tokens but the pending ones, as read."""
        added = self._added(text)
        end = len(self._window) - num_pending
        start = max(self._num_read, end - NUM_CONTEXT)
        self._window = self._window[start:]
        self._num_read = end - start
        self._read_text = self._decode(self._window[: self._num_read])
        return added

    def _settle_part(self, text: str) -> str:
        """Returns the text in front of a border between tokens that no character crosses, if any.

        For long runs of invalid bytes, which never end in a whole character. A character has at
        most four bytes, so that one of the last borders is such a one; it is when the two sides
        decode to the same text apart and together.
        """
        for num_pending in range(1, 4):
            left = self._decode(self._window[:-num_pending])
            right = self._decode(self._window[-num_pending:])
            if left + right == text:
                return self._advance(left, num_pending)
        return ""
