"""Compiles what `StructuredOutputsParams` ask for, and finds the tokens that may come next."""

import collections
import functools
import logging
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import llguidance
import numpy as np
import tokenizers
from llguidance.numpy import fill_next_token_bitmask_par

from pallas_paged.engine.core.grammar import Matcher, num_words
from pallas_paged.engine.structured_outputs import StructuredOutputsParams
from pallas_paged.engine.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

MAX_CACHED = 128
"""Compiled grammars that are kept."""
_LIMITS = llguidance.LLParserLimits(verbose_errors=False)
_STACK_BYTES = 2**28
"""For compilations: their recursions are as deep as a grammar is long."""
_END = "<|end of the grammar|>"
_MAX_REASON = 300


class _Vocabulary(NamedTuple):
    """A tokenizer as llguidance has it.

    Attributes:
      tokenizer: llguidance's, with one token more than the engine's.
      end: that one, which stands for the end of an output. No text holds it.
      added: the tokens that the tokenizer has added, which llguidance takes for no text.
    """

    tokenizer: llguidance.LLTokenizer
    end: int
    added: frozenset[int]


class TokenMatcher:
    """How far one sequence has come in its grammar; see `pallas_paged.engine.core.grammar`.

    Attributes:
      num_taken: output tokens that it was given.
      fault: why it cannot go on; None while it can.
      is_over: whether nothing may follow, or the output's end was among the tokens.
    """

    def __init__(self, state: llguidance.LLMatcher, eos_token_ids: frozenset[int]):
        """Goes on from a state, which becomes its own."""
        self.state = state
        self.num_taken = 0
        self.fault: str | None = None
        self.is_over = False
        self._eos_token_ids = eos_token_ids

    @property
    def may_end(self) -> bool:
        """Whether the tokens that it was given are a whole output."""
        return self.fault is None and self.state.is_accepting()

    def take(self, token_ids: Sequence[int]) -> None:
        """Goes on by tokens; one that may not follow is a `fault`."""
        self.num_taken += len(token_ids)
        for token in token_ids:
            if self.fault is not None or self.is_over:
                return
            if token in self._eos_token_ids:
                self.is_over = self.may_end
                if not self.is_over:
                    self.fault = f"structured_outputs: token {token} has ended an unfinished output"
            elif self.state.consume_token(token):
                self.is_over = self.state.is_stopped()
            self.find_fault()

    def find_fault(self) -> None:
        """Takes over what llguidance says is wrong; to be called when it may have gone wrong."""
        if self.fault is None and self.state.is_error():
            self.fault = f"structured_outputs: {_shortened(self.state.get_error())}"


class CompiledGrammar:
    """What the outputs of requests have to follow, ready to be followed."""

    def __init__(self, state: llguidance.LLMatcher, eos_token_ids: frozenset[int]):
        """Takes the state of an output that has not begun."""
        self._state = state
        self._eos_token_ids = eos_token_ids

    def start(self) -> TokenMatcher:
        """Returns a matcher that was given no token yet."""
        return TokenMatcher(self._state.deep_copy(), self._eos_token_ids)


class Grammars:
    """Compiles grammars for one tokenizer, and keeps those that were used last."""

    def __init__(
        self, tokenizer: Tokenizer | None, vocab_size: int, eos_token_ids: Sequence[int]
    ) -> None:
        """Reads nothing of the tokenizer before the first grammar comes.

        Args:
          tokenizer: None, or one without a fast implementation, refuses all grammars.
          vocab_size: V, of the model, which may have more tokens than the tokenizer, or fewer.
          eos_token_ids: tokens that end an output, and may where the grammar lets it end.
        """
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = frozenset(eos_token_ids)
        self.compiled = functools.lru_cache(MAX_CACHED)(self._compile)

    def compile(self, params: StructuredOutputsParams | None) -> CompiledGrammar | None:
        """Returns the grammar that a request asks for; None for None.

        Raises:
          ValueError: llguidance cannot follow it, or use the tokenizer; or there is none.
        """
        return None if params is None else self.compiled(params)

    def find_masks(self, matchers: Sequence[Matcher]) -> np.ndarray:
        """Returns which tokens may come next; see `pallas_paged.engine.core.grammar.FindMasks`."""
        tokenizer, end, added = self._vocabulary
        mine = cast(Sequence[TokenMatcher], matchers)
        found = np.zeros((len(mine), num_words(tokenizer.vocab_size)), np.int32)
        states = [(one.state, k) for k, one in enumerate(mine) if one.fault is None]
        if states:
            fill_next_token_bitmask_par(self._executor, states, found)
        for k, one in enumerate(mine):
            one.find_fault()
            if one.fault is not None:
                found[k] = 0
            elif (token := _only_token(found[k])) in added:
                _spell_forced_text(one.state, tokenizer, token, found[k])
        words = found.view(np.uint32)  # a shift must not bring the sign's bit with it
        may_end = (words[:, end // 32] >> np.uint32(end % 32)) & np.uint32(1)
        for token in (end, *self._eos_token_ids):
            word, place = words[:, token // 32], np.uint32(token % 32)
            word &= ~(np.uint32(1) << place)
            if token != end:
                word |= may_end << place
        return found[:, : num_words(self._vocab_size)]

    @functools.cached_property
    def _executor(self) -> llguidance.LLExecutor:
        return llguidance.LLExecutor()

    @functools.cached_property
    def _vocabulary(self) -> _Vocabulary:
        """The tokenizer, for llguidance.

        A token is added for the end of an output: so a model may have no EOS token or several, and
        one that is text, too, is not taken for the end where it is text.
        """
        assert self._tokenizer is not None
        assert self._tokenizer.backend is not None
        copy = tokenizers.Tokenizer.from_str(self._tokenizer.backend.to_str())
        copy.no_padding()
        copy.no_truncation()
        copy.add_special_tokens([_END])
        end = copy.get_vocab_size() - 1
        assert copy.id_to_token(end) == _END
        num_tokens = max(self._vocab_size, end + 1)
        added = frozenset(copy.get_added_tokens_decoder()) - {end}
        try:
            return _Vocabulary(llguidance.LLTokenizer(copy.to_str(), num_tokens, end), end, added)
        except ValueError as error:
            raise ValueError(
                f"structured_outputs need a tokenizer whose tokens are parts of the text, and "
                f"llguidance does not know how to use that of {self._tokenizer.path}: "
                f"{_shortened(error)}"
            ) from error

    def _compile(self, params: StructuredOutputsParams) -> CompiledGrammar:
        kind = params.kind
        if self._tokenizer is None or self._tokenizer.backend is None:
            lack = "the model's folder has none" if self._tokenizer is None else "it has a slow one"
            raise ValueError(
                f"structured_outputs ({kind}) need a tokenizer of the tokenizers library, and "
                f"{lack}; use a folder with a tokenizer.json"
            )
        tokenizer = self._vocabulary.tokenizer

        def compiled() -> llguidance.LLMatcher:
            state = llguidance.LLMatcher(tokenizer, _source(params), log_level=0, limits=_LIMITS)
            first = state.deep_copy()
            if not first.is_error():
                first.compute_bitmask()  # some limits are first met here
            if first.is_error():
                raise ValueError(first.get_error())
            return state

        try:
            state = _with_deep_stack(compiled)
        except ValueError as error:
            value = getattr(params, kind)
            raise ValueError(
                f"structured_outputs: {kind}={value!r:.80} cannot be used: {_shortened(error)}"
            ) from error
        for warning in state.get_grammar_warnings():
            logger.warning("structured_outputs: %s", _shortened(warning))
        return CompiledGrammar(state, self._eos_token_ids)


def _source(params: StructuredOutputsParams) -> str:
    """Returns the grammar as llguidance reads it."""
    make = llguidance.LLMatcher
    if params.grammar is not None:
        return make.grammar_from_lark(params.grammar)
    if params.regex is not None:
        return make.grammar_from_regex(params.regex)
    if params.choice is not None:
        # As one expression: the parser has a limit for rules with alternatives.
        return make.grammar_from_regex("|".join(map(_literal, params.choice)))
    schema = '{"type":"object"}' if params.json is None else cast(str, params.json)
    if params.whitespace_pattern is not None:
        return make.grammar_from_json_schema(
            schema, overrides={"whitespace_pattern": params.whitespace_pattern}
        )
    if params.disable_any_whitespace:
        return make.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
    return make.grammar_from_json_schema(schema)


def _literal(text: str) -> str:
    """Returns the regular expression that matches a text alone."""
    return "".join(
        character if character.isalnum() else f"\\x{{{ord(character):x}}}" for character in text
    )


def _only_token(mask: np.ndarray) -> int | None:
    """Returns the token that a mask allows; None if it allows none or several."""
    (words,) = mask.nonzero()
    if len(words) != 1:
        return None
    word = int(mask[words[0]]) & 0xFFFFFFFF
    return int(words[0]) * 32 + word.bit_length() - 1 if word.bit_count() == 1 else None


def _spell_forced_text(
    state: llguidance.LLMatcher, tokenizer: llguidance.LLTokenizer, token: int, mask: np.ndarray
) -> None:
    """Has a mask allow what forced text can begin with, in the place of a token for no text.

    Where only one text may follow, llguidance has the tokenizer split it, which may find an added
    token in it: that is no text for llguidance, and may not follow.
    """
    if state.validate_tokens([token]):
        return
    spelled = tokenizer.greedy_tokenize(state.compute_ff_bytes().decode("utf-8", "replace"))[0]
    mask[:] = 0
    mask[spelled // 32] = np.uint32(1 << spelled % 32).astype(np.int32)


def _with_deep_stack[T](function: Callable[[], T]) -> T:
    """Returns what a function returns, or raises its error, in a thread with a large stack.

    On a usual one a long chain of rules overflows it, which ends the process.
    """
    results: collections.deque[T | BaseException] = collections.deque()

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run, name="grammar")
    before = threading.stack_size(_STACK_BYTES)
    try:
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    (result,) = results
    if isinstance(result, BaseException):
        raise result
    return result


def _shortened(reason: object) -> str:
    """Returns what llguidance says in one line, without what it adds for its developers."""
    text = " ".join(str(reason).partition("<non-verbose")[0].split())
    return text if len(text) <= _MAX_REASON else f"{text[:_MAX_REASON]}..."
