"""Small tokenizers of the kinds that models have, trained on the spot."""

import functools
import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog. The dog sleeps, and the fox runs.",
    "def main(argv: list[str]) -> None:\n    print('hello world')\n    return None\n",
    "Größe, naïve café, ça va? Ελληνικά и русский текст.",
    "你好,世界。今日はいい天気ですね。안녕하세요",
    "😀 😀😀 👨‍👩‍👧 🇩🇪 é ñ",
] * 3
SPECIAL = ["<s>", "</s>", "<|user|>"]


@functools.cache
def byte_level() -> Tokenizer:
    """GPT-2's and Llama 3's kind: every byte is in the vocabulary, characters split freely."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


@functools.cache
def metaspace() -> Tokenizer:
    """Sentencepiece's kind: words begin with a mark, and the first one's space is dropped."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=240, special_tokens=["<unk>", *SPECIAL], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@functools.cache
def byte_fallback() -> Tokenizer:
    """Llama 2's kind: as `metaspace`, and unknown characters become one token per byte."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=["<unk>", *SPECIAL, *byte_tokens], show_progress=False
    )
    tokenizer.train_from_iterator([line for line in CORPUS if line.isascii()], trainer)
    # The trainer takes bytes as special tokens only; as such they would be skipped.
    saved = json.loads(tokenizer.to_str())
    saved["added_tokens"] = [t for t in saved["added_tokens"] if t["content"] not in byte_tokens]
    return Tokenizer.from_str(json.dumps(saved))


@functools.cache
def word_piece() -> Tokenizer:
    """BERT's kind: pieces of a word are marked, and spaces are put between words."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=240, special_tokens=["<unk>", *SPECIAL], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@functools.cache
def word_ends() -> Tokenizer:
    """GPT-1's kind: the last piece of a word is marked."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=240,
        special_tokens=["<unk>", *SPECIAL],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def words() -> Tokenizer:
    """Whole words, and no token for those it does not know."""
    tokenizer = Tokenizer(models.WordLevel({"the": 0, "fox": 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


KINDS = (byte_level, metaspace, byte_fallback, word_piece, word_ends)
