"""What an output has to look like: `StructuredOutputsParams`, checked when they are built."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pallas_paged.engine.field_checks import flag, strings
from pallas_paged.engine.valid_text import check_text

KINDS = ("json", "json_object", "regex", "choice", "grammar")
"""Fields of which exactly one is given."""
MAX_CHARS = {"json": 2**16, "regex": 2**13, "choice": 2**18, "grammar": 2**16}
"""Characters of each. Long regular expressions take minutes to compile, long choices do not."""
_NO_REPEATS = re.compile(r"\{\d*,?\d*\}|\\[tnr]")
_BLANKS = re.compile(r"(?:[ \t\n\r\[\]()|?*+]|\(\?:)*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """What the outputs of a request have to look like: exactly one of the first five fields.

    Each token is one with which such an output can still be reached, and an output ends when it is
    whole; or before, by "length", where it is out of tokens.

    Attributes:
      json: a JSON schema, as a dictionary or a string; held as a string. At most 65536 characters.
      json_object: True for any JSON object.
      regex: a regular expression that matches the whole output, in the syntax of Rust's regex
        crate, without look-around and word boundaries; `\\d` is any digit of Unicode, as it is for
        Python. At most 8192 characters.
      choice: strings of which the output is one; held as a tuple. At most 262144 characters.
      grammar: a grammar in llguidance's variant of Lark's syntax. At most 65536 characters.
      whitespace_pattern: a regular expression for the blanks, tabs and line ends between the tokens
        of JSON. None is as many as the model likes, which may be all that it writes.
      disable_any_whitespace: have none there.

    Raises:
      ValueError: none of the first five fields is given, or several; a field is of the wrong type,
        too long, or goes with JSON only.
    """

    json: str | Mapping[str, Any] | None = None
    json_object: bool = False
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool = False

    def __post_init__(self) -> None:
        given = [kind for kind in KINDS if self._has(kind)]
        for field in ("json_object", "disable_any_whitespace"):
            flag(field, getattr(self, field))
        if len(given) != 1:
            raise ValueError(
                f"structured_outputs needs exactly one of {', '.join(KINDS)}, and has "
                f"{' and '.join(given) or 'none'}"
            )
        if self.json is not None:
            object.__setattr__(self, "json", _schema(self.json))
        if self.choice is not None:
            object.__setattr__(self, "choice", _choice(self.choice))
        for field in ("regex", "grammar", "whitespace_pattern"):
            if getattr(self, field) is not None:
                check_text(field, getattr(self, field))
        self._check_length()
        self._check_whitespace()

    @property
    def kind(self) -> str:
        """Which of the first five fields is given."""
        return next(kind for kind in KINDS if self._has(kind))

    def _has(self, kind: str) -> bool:
        value = getattr(self, kind)
        return value is not None and value is not False

    def _check_length(self) -> None:
        for field, most in MAX_CHARS.items():
            value = getattr(self, field)
            length = sum(map(len, value)) if field == "choice" and value else len(value or "")
            if length > most:
                raise ValueError(
                    f"{field} has {length} characters, and {most} are the most; shorten it, or "
                    "split the request"
                )
            if value == "" and field == "grammar":
                raise ValueError("grammar='' has no rule; begin with one that is called start")

    def _check_whitespace(self) -> None:
        for field in ("whitespace_pattern", "disable_any_whitespace"):
            if getattr(self, field) and self.kind not in ("json", "json_object"):
                raise ValueError(
                    f"{field}={getattr(self, field)!r:.80} is for json and json_object, not for "
                    f"{self.kind}; leave it out"
                )
        if self.whitespace_pattern is None:
            return
        if self.disable_any_whitespace:
            raise ValueError(
                f"whitespace_pattern={self.whitespace_pattern!r:.80} excludes "
                "disable_any_whitespace=True; leave one of them out"
            )
        if not _BLANKS.fullmatch(_NO_REPEATS.sub("", self.whitespace_pattern)):
            raise ValueError(
                f"whitespace_pattern={self.whitespace_pattern!r:.80} must be made of blanks, \\t, "
                "\\n, \\r, brackets and repetitions, such as '[ \\n]{0,4}': JSON allows no others"
            )


def _schema(value: Any) -> str:
    """Returns a JSON schema as a string, its keys in their order."""
    if not isinstance(value, str | Mapping):
        raise ValueError(f"json={value!r:.80} must be a JSON schema: a dictionary or a string")
    try:
        schema = json.loads(value) if isinstance(value, str) else dict(value)
        if not isinstance(schema, dict):
            raise ValueError("a schema is an object")
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        check_text("json", text)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"json={value!r:.80} is no JSON schema: {error}") from error
    return text


def _choice(value: Any) -> tuple[str, ...]:
    found = strings("choice", value)
    if not found:
        raise ValueError(f"choice={value!r} must have at least one string")
    return found
