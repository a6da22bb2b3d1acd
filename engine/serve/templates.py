"""Finds the chat template that a server is told to use."""

import os
from collections.abc import Mapping


def choose_template(
    value: str | None, own: str | Mapping[str, str] | None
) -> tuple[str | None, str | None]:
    """Returns the chat template that is asked for, and the text of those that may be used.

    Args:
      value: a file, a template or the name of one of the model's; None asks for none.
      own: the model's, several by their names.

    Raises:
      ValueError: it is none of these.
    """
    by_name = dict(own) if isinstance(own, Mapping) else {} if own is None else {"default": own}
    if value is None:
        return None, "\n".join(by_name.values()) or None
    if value in by_name:
        return value, by_name[value]
    if os.path.isfile(value):
        with open(value, encoding="utf-8") as file:
            value = file.read()
    elif "{{" not in value and "{%" not in value:
        names = ", ".join(sorted(by_name)) or "none"
        raise ValueError(
            f"--chat_template={value!r:.80} is no file, no Jinja template, and no name of one of "
            f"the model's, which has {names}"
        )
    return value, value
