"""Tokenizers and chat templates of Hugging Face folders, through transformers."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pallas_paged.models.checkpoint import TOKENIZER_FILES


class Tokenizer:
    """A folder's tokenizer; all that the engine uses of it.

    Attributes:
      path: the folder.
      vocab_size: number of ids, added tokens included; a model's vocabulary may be larger.
      eos_token_id: the EOS token of the tokenizer's config, or None.
    """

    def __init__(self, path: Path, implementation: Any):
        """Wraps a transformers tokenizer; see `load_tokenizer`."""
        self.path = path
        self._implementation = implementation
        self.vocab_size: int = len(implementation)
        self.eos_token_id: int | None = implementation.eos_token_id

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Returns the text's tokens, with the special tokens that the tokenizer's config adds."""
        return self._implementation.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Returns the text of the tokens; ids that the tokenizer does not know have none."""
        return self._implementation.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Returns the tokens of a conversation.

        Args:
          messages: each with at least a "role" and a "content", oldest first.
          chat_template: a Jinja template instead of the folder's own.
          add_generation_prompt: end where the model's answer starts.

        Raises:
          ValueError: the folder has no chat template, or it refuses the messages.
        """
        if chat_template is None and self._implementation.chat_template is None:
            raise ValueError(
                f"{self.path} has no chat template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json), so messages cannot be turned into a prompt; send the "
                "prompt as text"
            )
        _check_messages(messages)
        import jinja2

        try:
            return self._implementation.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                tokenize=True,
                return_dict=False,
            )
        except jinja2.TemplateError as error:
            raise ValueError(
                f"the chat template of {self.path} does not accept these messages: {error}"
            ) from error


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer | None:
    """Returns the tokenizer of a folder, or None when the folder has none.

    Nothing is downloaded, and no code from the folder is run.

    Raises:
      ValueError: `path` is not a folder, or its tokenizer files cannot be loaded.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"tokenizer={str(path)!r} must be a folder; it does not exist")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    # That PyTorch is missing is no news: only tokenizers are used.
    logging.getLogger("transformers").addFilter(
        lambda record: "PyTorch was not found" not in record.getMessage()
    )
    from transformers import AutoTokenizer  # a second or more to import

    try:
        implementation = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises many kinds, none of them documented
        raise ValueError(
            f"cannot load the tokenizer of {folder}: {error}; a tokenizer.json as "
            "save_pretrained writes it always works"
        ) from error
    return Tokenizer(folder, implementation)


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


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    if isinstance(messages, str | Mapping) or not messages:
        raise ValueError(
            f"messages={messages!r} must be a list of at least one message, such as "
            '[{"role": "user", "content": "Hello"}]'
        )
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise ValueError(
                f'messages[{index}]={message!r} must be a mapping with "role" and "content"'
            )
