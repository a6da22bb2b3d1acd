"""A tokenizer of any size, made up: byte-level BPE, as GPT-2, Llama 3 and Qwen have it."""

import itertools
import json
import pathlib
from collections.abc import Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

FIRST_WORD = 2 + 256
"""Ids from here on are pieces of words, the shorter ones first; special tokens and bytes before."""
_SPACE = "\u0120"
"""What a space is in the tokens of this kind."""


def write(folder: pathlib.Path, vocab_size: int) -> None:
    """Writes the files of a tokenizer with `vocab_size` tokens to a folder; id 1 is its EOS."""
    specials = ["<|bos|>", "<|eos|>"]
    vocab = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges: list[tuple[str, str]] = []
    for left, right in _pairs():
        if len(vocab) == vocab_size:
            break
        vocab.append(left + right)
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocab)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": specials[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def _pairs() -> Iterator[tuple[str, str]]:
    """Yields what to merge: letters to syllables, these to words, with a space or without."""
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    yield from ((syllable[0], syllable[1]) for syllable in syllables)
    yield from ((_SPACE, syllable) for syllable in syllables)
    words = [*(_SPACE + syllable for syllable in syllables), *syllables]
    while True:
        pairs = list(itertools.product(words, syllables))
        yield from pairs
        words = [word + syllable for word, syllable in pairs]
