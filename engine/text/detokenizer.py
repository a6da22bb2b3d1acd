"""Turns the token ids of a completion into text, as they arrive or all at once."""

from collections.abc import Callable, Sequence
from typing import Protocol

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
NUM_CONTEXT = 8
"""Tokens of context: of a prompt's end at first, of what has been read when a window is cut."""
MAX_PENDING = 8
"""Tokens that wait to become a whole character; of more than these some cannot belong to one."""


class Decoder(Protocol):
    """What the detokenizer needs of a tokenizer."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Returns the text of the tokens."""
        ...


class Detokenizer(Protocol):
    """Turns one completion's tokens into pieces of text; see `WindowDetokenizer` for the rule."""

    def append(self, token_id: int) -> str:
        """Takes the next token and returns the text that is settled by it, often empty."""
        ...

    def finish(self) -> str:
        """Returns the rest, in which incomplete characters are replacement characters."""
        ...


def prompt_context(
    tokenizer: Decoder, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool
) -> list[int]:
    """Returns the last tokens of a prompt, enough to decode what follows as behind all of it.

    Returns none where the prompt ends inside a character, see `WindowDetokenizer`.
    """
    size = NUM_CONTEXT
    while True:
        context = list(prompt_token_ids[-size:])
        text = tokenizer.decode(context, skip_special_tokens=skip_special_tokens)
        # Skipped special tokens alone have no text, and the cut may go through a character.
        if (text and not text.endswith(REPLACEMENT)) or size >= len(prompt_token_ids):
            return [] if text.endswith(REPLACEMENT) else context
        size *= 2


def text_of(
    tokenizer: Decoder,
    context: Sequence[int],
    token_ids: Sequence[int],
    *,
    skip_special_tokens: bool,
) -> str:
    """Returns the text of tokens behind a `prompt_context` at once, by the detokenizers' rule.

    Without their exception: of a run of byte tokens with a wrong one no character is kept.
    """
    before = tokenizer.decode(context, skip_special_tokens=skip_special_tokens)
    whole = tokenizer.decode([*context, *token_ids], skip_special_tokens=skip_special_tokens)
    if whole.startswith(before):
        return whole[len(before) :]
    # A wrong byte behind a prompt that ends in byte tokens has changed the prompt's text.
    return tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)


class StreamDetokenizer:
    """Makes text by the `DecodeStream` of the tokenizers library; the rule is the window's.

    The stream knows no end of a run of invalid bytes: it holds back all that ends in a replacement
    character, however long, and raises where an invalid byte changes text that is out already
    (byte fallback). Both are rare, and both make this go on with a `WindowDetokenizer`, behind what
    was given out last: once more than `MAX_PENDING` tokens wait, or the stream has raised.
    """

    __slots__ = (
        "_backend",
        "_context",
        "_last",
        "_pending",
        "_skip_special_tokens",
        "_step",
        "_textless",
        "_window",
    )

    def __init__(
        self,
        backend: Tokenizer,
        context: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
        textless: set[int] | None = None,
    ):
        """Starts behind a `prompt_context`.

        `textless` are tokens that never have text; what is found to be one is added to them.
        """
        self._backend = backend
        self._skip_special_tokens = skip_special_tokens
        self._textless = set() if textless is None else textless
        self._step: Callable[[Tokenizer, int], str | None] = DecodeStream(
            list(context), skip_special_tokens
        ).step
        # What was read last, which stands for all before it: a single token, else the context.
        self._last: int | None = None
        self._context: Sequence[int] = context
        self._pending: list[int] = []  # what the stream holds back
        self._window: WindowDetokenizer | None = None

    def append(self, token_id: int) -> str:
        """Takes the next token and returns the text that is settled by it, often empty."""
        if token_id in self._textless:
            return ""
        try:
            text = self._step(self._backend, token_id)
        except Exception as error:
            if not str(error).startswith("Invalid prefix"):
                raise
            self._pending.append(token_id)
            return self._go_on_with_window()
        if text is None:
            return self._hold(token_id)
        self._last = token_id
        if self._pending:
            self._last, self._context, self._pending = None, (*self._pending, token_id), []
        return text

    def finish(self) -> str:
        """Returns the rest, in which incomplete characters are replacement characters."""
        text = self._go_on_with_window() if self._pending else ""
        return text if self._window is None else text + self._window.finish()

    def _hold(self, token_id: int) -> str:
        """Takes note of a token by which the stream settled nothing."""
        twice = [token_id, token_id]
        if not self._backend.decode(twice, skip_special_tokens=self._skip_special_tokens):
            self._textless.add(token_id)  # a skipped special one, an unknown id
            return ""
        self._pending.append(token_id)
        return self._go_on_with_window() if len(self._pending) > MAX_PENDING else ""

    def _go_on_with_window(self) -> str:
        """Reads what is pending in a window, which takes all further tokens."""
        context = self._context if self._last is None else (self._last,)
        window = WindowDetokenizer(
            self._backend, context, skip_special_tokens=self._skip_special_tokens
        )
        pending, self._pending = self._pending, []
        self._window, self._step = window, lambda _, token_id: window.append(token_id)
        return "".join(map(window.append, pending))


class WindowDetokenizer:
    """Turns one completion's tokens into text that never changes once it is given out.

    The rule: the pieces, put together, are what the completion adds to its prompt:
    `decode(prompt + tokens)` without `decode(prompt)`. With no prompt that is exactly
    `decode(tokens)`. The two differ for sentencepiece-like tokenizers, whose decoders drop the
    space in front of the first word: after a prompt that space belongs to the text. A prompt that
    ends inside a character is left out: the text is then exactly `decode(tokens)`.

    Only the newest tokens are decoded, behind a few that are already read and stand for all
    before them, so the cost per token does not grow. Text that ends in the replacement character
    may be a character under way and waits for more tokens, or for `finish`.

    One exception, because text that has been given out cannot change: a byte-fallback decoder
    (Llama 2) turns a whole run of byte tokens into replacement characters when one of them is
    wrong. Here the characters that were complete before the wrong byte stay, and how many
    replacement characters stand for the others depends on which tokens are decoded together.
    """

    def __init__(
        self,
        tokenizer: Decoder,
        context: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
    ):
        """Starts behind a `prompt_context`."""
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window = list(context)  # read tokens, then pending ones
        self._text = self._decode(self._window)
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
