"""Turns `bad_words` into the sequences of tokens that spell them."""

from collections.abc import Sequence

from pallas_paged.engine.text.tokenizer import Tokenizer


def bad_sequences(
    words: Sequence[str] | None, tokenizer: Tokenizer | None, vocab_size: int
) -> list[tuple[int, ...]]:
    """Returns the tokens of `bad_words`, without those that the model has no tokens for.

    Raises:
      ValueError: a word has no tokens, or there is no tokenizer.
    """
    if not words:
        return []
    if tokenizer is None:
        raise ValueError(
            f"bad_words={words!r:.80} needs a tokenizer; give single tokens a logit_bias of -100"
        )
    sequences: dict[tuple[int, ...], None] = {}  # in order, each once
    for index, word in enumerate(words):
        try:
            found = _sequences_of(word, tokenizer)
        except ValueError as error:
            raise ValueError(f"bad_words[{index}]={word!r:.80}: {error}") from error
        sequences |= dict.fromkeys(found)
    return [ids for ids in sequences if max(ids) < vocab_size]


def _sequences_of(word: str, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """Returns the tokens of a word at the start of a text, behind a space, and behind other text.

    A word that begins with whitespace brings its own, so that no other is put in front of it, and
    none of its own is left out: that would be another word. Right behind a letter only what is no
    letter itself is a word; there it has no mark of a word's start, as sentencepiece's kind of
    tokenizers puts one in front of a text.
    """
    texts = [word] if word[0].isspace() else [word, f" {word}"]
    sequences = [tuple(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    if not all(sequences):
        raise ValueError("it has no tokens; leave it out")
    if not word[0].isalnum():
        before = tokenizer.encode("a", add_special_tokens=False)
        both = tokenizer.encode(f"a{word}", add_special_tokens=False)
        if both[: len(before)] == before and len(both) > len(before):
            sequences.append(tuple(both[len(before) :]))
    return sequences
