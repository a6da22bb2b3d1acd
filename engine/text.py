"""What is text: strings that UTF-8 can hold."""


def check_text(name: str, text: str) -> None:
    """Refuses half of a surrogate pair, which Python's strings can hold and no text does.

    Raises:
      ValueError: there is one; the message calls the text `name`.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} holds {text[error.start]!r} at character {error.start}, half of a surrogate "
            "pair, which is no text; decode bytes as UTF-8 with errors='replace', or leave it out"
        ) from error
