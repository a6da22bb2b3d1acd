"""Loads the tokenizer of a Hugging Face folder: text to token ids and back, by transformers."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pallas_paged.engine.text import chat
from pallas_paged.engine.text.detokenizer import (
    Detokenizer,
    StreamDetokenizer,
    WindowDetokenizer,
)
from pallas_paged.engine.valid_text import check_text
from pallas_paged.models.checkpoint import TOKENIZER_FILES, read_json

logger = logging.getLogger(__name__)

_PROBES = ("Hello world", "One line\nand a 2nd.")
"""What a converted sentencepiece model must split as sentencepiece does."""


class Tokenizer:
    """A tokenizer of transformers; all that the engine uses of it.

    Text never depends on `clean_up_tokenization_spaces` of the folder: that removes spaces by what
    stands around them, and text that is already streamed cannot change.

    Attributes:
      path: the folder, or what transformers calls it.
      vocab_size: number of ids, added tokens included; a model's vocabulary may be larger.
      eos_token_id: the EOS token of the tokenizer's config, or None.
      implementation: the tokenizer of transformers.
      backend: that of the tokenizers library, if its decoding is what `decode` does; else None.
    """

    def __init__(self, path: Path, implementation: Any):
        """Wraps a transformers tokenizer; see `load_tokenizer`."""
        self.path = path
        self.implementation = implementation
        self.backend = _backend_of(implementation)
        self._decode = _decoder_of(implementation, self.backend)
        self._textless: dict[bool, set[int]] = {True: set(), False: set()}
        self._token_texts: dict[int, str] = {}
        self.vocab_size: int = len(implementation)
        self.eos_token_id: int | None = implementation.eos_token_id

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Returns the text's tokens, with the special tokens that the tokenizer's config adds.

        Raises:
          ValueError: it is no text, or has a character that the tokenizer has no token for.
        """
        check_text("the text", text)
        with _translated(f"the tokenizer of {self.path} cannot split it"):
            # Not verbose: the engine checks the length, by the limits of the model.
            return self.implementation.encode(
                text, add_special_tokens=add_special_tokens, verbose=False
            )

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Returns the text of the tokens; ids that the tokenizer does not know have none."""
        return self._decode(list(token_ids), skip_special_tokens)

    def detokenizer(
        self, context: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> Detokenizer:
        """Returns what makes text of the tokens behind a `prompt_context` while they arrive."""
        if self.backend is None:
            return WindowDetokenizer(self, context, skip_special_tokens=skip_special_tokens)
        return StreamDetokenizer(
            self.backend,
            context,
            skip_special_tokens=skip_special_tokens,
            textless=self._textless[skip_special_tokens],
        )

    def decode_token(self, token_id: int) -> str:
        """Returns the text of one token, special or not, as it is decoded alone."""
        text = self._token_texts.get(token_id)
        if text is None:
            text = self._token_texts[token_id] = self._decode([token_id], False)
        return text

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], name: str = "messages", **options: Any
    ) -> str:
        """Returns the text of a conversation, special tokens included; see `chat.render`."""
        return chat.render(self.implementation, self.path, messages, name, **options)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer | None:
    """Returns the tokenizer of a folder, or None when the folder has none.

    Nothing is downloaded, and no code from the folder is run.

    Raises:
      ValueError: `path` is not a folder, or its tokenizer files cannot be loaded.
    """
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"tokenizer={path!r:.80} must be the name of a folder")
    folder = Path(path)
    if not folder.is_dir():
        found = "it is a file" if folder.exists() else "it does not exist"
        raise ValueError(
            f"tokenizer={str(path)!r} must be a folder; {found}, and nothing is downloaded"
        )
    files = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not files:
        return None
    with _no_news_of_pytorch():
        import transformers  # a second or more to import

    with _translated(
        f"cannot load the tokenizer of {folder} from {', '.join(files)}",
        "; a tokenizer.json as save_pretrained writes it always works, in this folder or in one "
        "that tokenizer= names",
    ):
        if files == ["tokenizer.model"] and (reference := _sentencepiece(folder)) is not None:
            implementation = _of_llama(folder, reference)
        else:
            implementation = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        if not set(implementation.get_vocab()) - set(implementation.all_special_tokens):
            raise ValueError("transformers finds no token in it")  # and does not say so
    return Tokenizer(folder, implementation)


def wrap_tokenizer(implementation: Any) -> Tokenizer:
    """Returns the tokenizer that a program has from transformers.

    Raises:
      ValueError: it is none of transformers.
    """
    with _no_news_of_pytorch():
        import transformers

    if not isinstance(implementation, transformers.PreTrainedTokenizerBase):
        raise ValueError(
            f"tokenizer={implementation!r:.80} must be a tokenizer of transformers, the name of a "
            "folder with one, or None"
        )
    return Tokenizer(Path(implementation.name_or_path), implementation)


def require_tokenizer(tokenizer: Tokenizer | None, path: str | os.PathLike[str]) -> Tokenizer:
    """Returns `tokenizer`, which a text prompt or messages need.

    Raises:
      ValueError: it is None, because the folder `path` has no tokenizer files.
    """
    if tokenizer is None:
        raise ValueError(
            f"{os.fspath(path)} has no tokenizer files ({', '.join(TOKENIZER_FILES)}), so text "
            "cannot be turned into tokens; send prompt_token_ids, or name a folder that has a "
            "tokenizer"
        )
    return tokenizer


def known_eos_token_ids(
    token_ids: Sequence[int], tokenizer: Tokenizer | None, vocab_size: int
) -> tuple[int, ...]:
    """Returns the model's EOS tokens and the tokenizer's, without those that are no tokens.

    Some published folders have such ones; the model never generates them.
    """
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        token_ids = (*token_ids, tokenizer.eos_token_id)
    unknown = [token for token in token_ids if not 0 <= token < vocab_size]
    if unknown:
        logger.warning(
            "eos_token_id=%s is outside the model's vocabulary of %d tokens and ends nothing",
            ", ".join(map(str, unknown)),
            vocab_size,
        )
    return tuple(token for token in token_ids if 0 <= token < vocab_size)


def _backend_of(implementation: Any) -> Any | None:
    """Returns the tokenizers library's part of a tokenizer that decodes as the library does."""
    from transformers import PreTrainedTokenizerFast as Fast

    kind = type(implementation)
    if issubclass(kind, Fast) and (kind.decode, kind._decode) == (Fast.decode, Fast._decode):
        return implementation.backend_tokenizer
    return None


def _decoder_of(implementation: Any, backend: Any | None) -> Callable[[list[int], bool], str]:
    """Returns (token ids, skip_special_tokens) -> text."""
    if backend is not None:
        # The same without three layers of Python, which take longer than the decoding.
        return backend.decode

    def decode(token_ids: list[int], skip_special_tokens: bool) -> str:
        return implementation.decode(
            token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )

    return decode


def _sentencepiece(folder: Path) -> Any | None:
    """Returns the sentencepiece model, or None if it is another: tiktoken uses the name too."""
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    except RuntimeError:
        return None


def _of_llama(folder: Path, reference: Any) -> Any:
    """Returns what transformers makes of a sentencepiece model without a tokenizer.json.

    Llama's class, for what AutoTokenizer chooses depends on the rest of the folder, and may lose
    the space in front of the first word. With BOS in front, unless the folder says otherwise.
    """
    import transformers

    config = folder / "tokenizer_config.json"
    fields = read_json(config) if config.is_file() else {}
    implementation = transformers.LlamaTokenizer.from_pretrained(
        folder, local_files_only=True, add_bos_token=fields.get("add_bos_token", True)
    )
    for text in _PROBES:
        if implementation.encode(text, add_special_tokens=False) != reference.encode(text):
            raise ValueError(f"transformers splits {text!r} in another way than sentencepiece")
    return implementation


@contextlib.contextmanager
def _translated(what: str, way_out: str = "") -> Iterator[None]:
    """Raises `ValueError`, with the reason behind `what`, whatever transformers raises.

    Its errors are of many kinds, none of them documented; that of Rust code is no `Exception`.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise ValueError(f"{what}: {error}{way_out}") from error


@contextlib.contextmanager
def _no_news_of_pytorch() -> Iterator[None]:
    """Keeps transformers from saying that PyTorch is missing: only tokenizers are used."""

    def is_news(record: logging.LogRecord) -> bool:
        return "PyTorch was not found" not in record.getMessage()

    transformers_logger = logging.getLogger("transformers")
    transformers_logger.addFilter(is_news)
    try:
        yield
    finally:
        transformers_logger.removeFilter(is_news)
