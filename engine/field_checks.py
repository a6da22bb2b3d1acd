"""Checks of the fields of what a caller asks for: each returns the value as it is held."""

import numbers
from collections.abc import Callable, Mapping
from typing import Any

from pallas_paged.engine.valid_text import check_text

_MAX_FLOAT32 = 3.4028234e38  # what the device computes with

type Check = Callable[[str, Any], Any]
"""(field, value) -> the value as it is held; raises ValueError."""


def refusal(field: str, value: object, rule: str) -> ValueError:
    """Returns the error that says what a field must be."""
    return ValueError(f"{field}={value!r} must be {rule}")


def is_int(value: object) -> bool:
    """Returns whether it is an integer of any kind; True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def integer(low: int, high: int | None, way_out: str, *, optional: bool = False) -> Check:
    """Returns the check for an integer from `low` to `high`, None being no limit."""
    limits = f">= {low}" if high is None else f"from {low} to {high}"
    rule = f"an integer {limits}{' or None' if optional else ''}; {way_out}"

    def check(field: str, value: Any) -> int | None:
        if value is None and optional:
            return None
        if not is_int(value) or value < low or (high is not None and value > high):
            raise refusal(field, value, rule)
        return int(value)

    return check


def real(within: Callable[[float], bool], limits: str, way_out: str) -> Check:
    """Returns the check for a number that is `within` what `limits` says, and a finite float32."""

    def check(field: str, value: Any) -> float:
        # NaN is within nothing; an integer too large for a float does not overflow here.
        if not _is_number(value) or abs(value) > _MAX_FLOAT32 or not within(value):
            raise refusal(field, value, f"a finite number {limits}; {way_out}")
        return float(value)

    return check


def flag(field: str, value: Any) -> bool:
    """Checks for True or False."""
    if not isinstance(value, bool):
        raise refusal(field, value, "True or False")
    return value


def strings(field: str, value: Any, *, single: bool = False) -> tuple[str, ...]:
    """Checks for a list of strings that are not empty, or None; with `single` for a string too."""
    rule = f"{'a string, ' if single else ''}a list of strings or None"
    items = (value,) if single and isinstance(value, str) else value
    if items is not None and not isinstance(items, list | tuple):
        raise refusal(field, value, rule)
    label = f"{field}={value!r:.80}"  # once: there may be many
    for item in items or ():
        if not isinstance(item, str):
            raise refusal(field, value, f"{rule}; {item!r} is not a string")
        if not item:
            raise refusal(field, value, f"{rule}, none of them empty; leave '' out")
        check_text(label, item)
    return tuple(items or ())


def token_ids(field: str, value: Any) -> tuple[int, ...]:
    """Checks for a list of token ids, or None."""
    if value is not None and not isinstance(value, list | tuple):
        raise refusal(field, value, "a list of token ids or None")
    for item in value or ():
        if not is_int(item) or item < 0:
            raise refusal(field, value, f"a list of token ids or None; {item!r} is not an id >= 0")
    return tuple(int(item) for item in value or ())


def logit_bias(field: str, value: Any) -> dict[int, float] | None:
    """Checks for a mapping of token ids to numbers, which are clamped, or None."""
    if value is not None and not isinstance(value, Mapping):
        raise refusal(field, value, "a mapping of token ids to numbers or None")
    for token, bias in (value or {}).items():
        if not is_int(token) or token < 0:
            raise refusal(field, value, f"a mapping of token ids; {token!r} is not an id >= 0")
        if not _is_number(bias) or bias != bias:  # NaN; math.isnan refuses large integers
            raise refusal(field, value, f"a mapping to numbers; {bias!r} is not one")
    held = {int(token): float(_clamp(bias, 100.0)) for token, bias in (value or {}).items()}
    return held or None


def _clamp(value: float, limit: float) -> float:
    return max(-limit, min(limit, value))
