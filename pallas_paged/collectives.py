"""What a compiled program exchanges with other devices, read from XLA's text of it."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from pallas_paged.launches import computations_of

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
"""As XLA names them, one name for all forms of each."""
_VARIANTS = ("ragged-all-to-all", "collective-broadcast", *KINDS)
_LINE = re.compile(rf"^\s+(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ({'|'.join(_VARIANTS)})(-start)?\(")
_ARRAY = re.compile(r"([a-z]+\d*)(?:e\dm\d\w*)?\[([\d,]*)\]")
_BITS = re.compile(r"\d+")
_CALLED = re.compile(
    r"(calls|to_apply|body|condition|branch_computations|called_computations)=(\{.*?\}|\S+)"
)
_NAME = re.compile(r"%([\w.\-]+)")
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


class Collective(NamedTuple):
    """One exchange.

    Attributes:
      kind: "all-reduce", "all-gather" and so on, as XLA names them.
      num_bytes: of the arrays that every device has afterwards.
      num_times: how often each run of the program comes to it, a branch taken; None in a loop whose
        turns depend on data.
    """

    kind: str
    num_bytes: int
    num_times: int | None = 1


def collectives(compiled_text: str) -> list[Collective]:
    """Returns the exchanges in a program, in its order; `compiled_text` is `compiled.as_text()`.

    A collective in two halves, a start and a done, counts once.
    """
    found = []
    parts, entry = computations_of(compiled_text)
    num_times = _num_times(parts, entry)
    for name, lines in parts.items():
        for line in lines:
            if match := _LINE.match(line):
                _, shape, kind, start = match.groups()
                result = _result_of_start(kind, shape) if start else shape
                size = sum(map(_num_bytes, _ARRAY.findall(result)))
                found.append(Collective(kind, size, num_times.get(name, 0)))
    return found


def _result_of_start(kind: str, shape: str) -> str:
    """Returns the shape of what an exchange gives, from that of its first half.

    Which is `(operands, results, ...)`; or of all-reduces in an older form the results alone.
    """
    elements = list(_elements(shape))
    has_operands = shape.startswith("((") or kind != "all-reduce"
    return elements[1] if has_operands and len(elements) > 1 else shape


def _elements(shape: str) -> Iterator[str]:
    """Yields the elements of a tuple's shape, of which each may be a tuple."""
    depth, begin = 0, 1
    for place, sign in enumerate(shape):
        if sign in "([{":
            depth += 1
        elif sign in ")]}":
            depth -= 1
        if (sign == "," and depth == 1) or (sign == ")" and depth == 0):
            yield shape[begin:place].strip()
            begin = place + 1


def _num_times(parts: Mapping[str, list[str]], entry: str) -> Mapping[str, int | None]:
    """Returns how often a run comes to each part of a program; what is not there, never."""
    found: dict[str, int | None] = {}

    def visit(name: str, times: int | None) -> None:
        seen = found.get(name, 0)
        found[name] = None if seen is None or times is None else seen + times
        for line in parts[name]:
            turns = _TURNS.search(line)
            for how, names in _CALLED.findall(line):
                inner = times
                if how in ("body", "condition"):
                    inner = None
                    if times is not None and turns is not None:
                        inner = times * (int(turns[1]) + (how == "condition"))
                for called in _NAME.findall(names):
                    visit(called, inner)

    visit(entry, 1)
    return found


def _num_bytes(array: tuple[str, str]) -> int:
    dtype, dims = array
    bits = _BITS.search(dtype)
    width = 1 if bits is None else max(1, int(bits[0]) // 8)
    return width * math.prod(int(n) for n in dims.split(",") if n)
