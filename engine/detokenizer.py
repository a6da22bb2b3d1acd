"""Text from token ids that arrive one at a time."""

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
NUM_CONTEXT = 8
"""Tokens of the prompt's end to begin behind, and of text that is read; then context is cut."""
MAX_PENDING = 8
"""Tokens that may be a character under way, before a part of them is looked for that is not."""


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
        self._window, self._text = self._context(prompt_token_ids)  # read tokens, then pending ones
        self._num_read, self._read_text = len(self._window), self._text

    def append(self, token_id: int) -> str:
        """Takes the next token and returns the text that is settled by it, often empty."""
        text = self._decode([*self._window, token_id])
        if text == self._text and not self._decode([token_id, token_id]):
            return ""  # a token that never has text: a skipped special one, an unknown id
        self._window.append(token_id)
        self._text = text
        if not text.endswith(REPLACEMENT):
            return self._read_up_to(len(self._window), text)
        if len(self._window) - self._num_read > MAX_PENDING:
            return self._read_a_part()
        return ""

    def finish(self) -> str:
        """Returns the rest, in which incomplete characters are replacement characters."""
        return self._read_up_to(len(self._window), self._text)

    def _context(self, prompt_token_ids: Sequence[int]) -> tuple[list[int], str]:
        """Returns enough of the prompt's end to stand for all of it, and its text; or nothing.

        Nothing where the prompt ends inside a character, see the class.
        """
        size = NUM_CONTEXT
        text = self._decode(prompt_token_ids[-size:])
        # Skipped special tokens alone have no text, and the cut may go through a character.
        while (not text or text.endswith(REPLACEMENT)) and size < len(prompt_token_ids):
            size *= 2
            text = self._decode(prompt_token_ids[-size:])
        return ([], "") if text.endswith(REPLACEMENT) else (list(prompt_token_ids[-size:]), text)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens)

    def _read_up_to(self, end: int, text: str) -> str:
        """Marks the window's first `end` tokens, whose text is given, as read; returns the news."""
        if text.startswith(self._read_text):
            added = text[len(self._read_text) :]
        else:  # byte fallback, see the class
            added = self._decode(self._window[self._num_read : end])
        before, self._num_read, self._read_text = self._num_read, end, text
        if end > NUM_CONTEXT:
            # What was read now stands for all before it. Not at every token: that decodes twice.
            start = max(before, end - NUM_CONTEXT)
            self._window = self._window[start:]
            self._num_read -= start
            self._text = self._decode(self._window)
            whole = self._num_read == len(self._window)
            self._read_text = self._text if whole else self._decode(self._window[: self._num_read])
        return added

    def _read_a_part(self) -> str:
        """Reads up to a border between tokens that no character crosses, if there is one.

        For long runs of invalid bytes, which need not ever end in a whole character. A character
        has at most four bytes, so that one of the last borders is such a one; it is when the two
        sides decode to the same text apart and together.
        """
        for border in range(len(self._window) - 1, len(self._window) - 4, -1):
            left, right = self._decode(self._window[:border]), self._decode(self._window[border:])
            if left + right == self._text:
                return self._read_up_to(border, left)
        return ""
