"""From the body of a request to what it asks for; the first thing that is wrong is named."""

import re
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from pallas_paged.engine.serve.protocol import BadRequestError, Message

_SILENT = {
    "user": None,  # names who asks, for a provider's own books
    "safety_identifier": None,
    "metadata": None,
    "store": (False,),
    "service_tier": ("auto", "default"),
    "modalities": (["text"],),
}
"""Fields that change nothing here, with the values for which that is true; None is every value."""
_ELSEWHERE = {
    "guided_json": 'structured_outputs={"json": ...}',
    "guided_regex": 'structured_outputs={"regex": ...}',
    "guided_choice": 'structured_outputs={"choice": ...}',
    "guided_grammar": 'structured_outputs={"grammar": ...}',
    "functions": "tools",
    "function_call": "tool_choice",
    "truncate_prompt_tokens": "a prompt that is short enough; nothing is cut off",
    "suffix": "a prompt that holds the text behind it, as the model was trained for",
}
"""Fields that have another name here, or a way around them."""
_TYPE = re.compile(r"str|int|float|bool|[A-Z]\w*|.*\[.*")
"""Of an error's place, what names one of a field's types and no field."""


def parse[R: BaseModel](kind: type[R], body: bytes) -> R:
    """Returns the request that a body holds; of a key that it holds twice, the last one counts.

    Raises:
      BadRequestError: it is no JSON, a field is missing, of the wrong type, or not known.
    """
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        raise _translated(error) from None
    refuse_unknown(request)
    return request


def refuse_unknown(request: BaseModel, path: str = "") -> None:
    """Raises `BadRequestError` for a field that is not declared, unless it changes nothing."""
    if isinstance(request, Message):
        return
    for name, value in (request.model_extra or {}).items():
        if value is None:
            continue
        if name in _SILENT and not path:
            accepted = _SILENT[name]
            if accepted is None or value in accepted:
                continue
        known = _ELSEWHERE.get(name)
        way_out = f"use {known}" if known else "leave it out"
        field = f"{path}{name:.80}"
        raise BadRequestError(f"{field}={value!r:.80} is not supported; {way_out}", field)
    for name in type(request).model_fields:
        value = getattr(request, name)
        for index, part in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(part, BaseModel):
                place = f"[{index}]" if isinstance(value, list) else ""
                refuse_unknown(part, f"{path}{name}{place}.")


def _translated(error: ValidationError) -> BadRequestError:
    """Returns the first thing that is wrong, by the field's name."""
    found = error.errors(include_url=False)
    first = found[0]
    if first["type"] == "json_invalid":
        return BadRequestError(f"the body cannot be read as JSON: {first['ctx']['error']}")
    place = first["loc"]
    if not place:
        return BadRequestError("the body must be a JSON object")
    param = str(place[0])
    if first["type"] == "missing" and len(place) == 1:
        return BadRequestError(f"{param} is missing", param)
    # Of a field's types the one counts to which the value comes closest.
    of_field = [each for each in found if each["loc"][0] == param]
    depth = max(len(_fields(each["loc"])) for each in of_field)
    closest = [each for each in of_field if len(_fields(each["loc"])) == depth]
    reasons = dict.fromkeys(str(each["msg"]) for each in closest)
    lowered = [f"{reason[0].lower()}{reason[1:]}" for reason in reasons]
    where = ".".join(_fields(closest[0]["loc"]))
    return BadRequestError(f"{where}={closest[0]['input']!r:.80}: {', or '.join(lowered)}", param)


def _fields(place: Sequence[Any]) -> list[str]:
    return [str(part) for part in place if not _TYPE.fullmatch(str(part))]
