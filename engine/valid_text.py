"""Checks that a caller's string is text: that UTF-8 can hold it."""


def check_text(name: str, text: str) -> None:
    """Refuses half of a surrogate pair, which Python's strings can hold and no text does.

    Raises:
      ValueError: there is one, or `text` is no string; the message calls it `name`.
    """
    if not isinstance(text, str):
        raise ValueError(f"{name}={text!r:.80} must be a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} holds {text[error.start]!r} at character {error.start}, half of a surrogate "
            "pair, which is no text; decode bytes as UTF-8 with errors='replace', or leave it out"
        ) from error
