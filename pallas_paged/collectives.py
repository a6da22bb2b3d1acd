"""What a compiled program exchanges with other devices, read from XLA's text of it."""

import math
import re
from typing import NamedTuple

from pallas_paged.launches import computations_of

_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_LINE = re.compile(rf"^\s+(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ({'|'.join(_KINDS)})(-start)?\(")
_ARRAY = re.compile(r"([a-z]+\d*)(?:e\dm\d\w*)?\[([\d,]*)\]")
_BITS = re.compile(r"\d+")


class Collective(NamedTuple):
    """One exchange.

    Attributes:
      kind: "all-reduce", "all-gather" and so on, as XLA names them.
      num_bytes: of the arrays that every device has afterwards.
      computation: the part of the program in which it stands: the entry, or the body of a loop.
      is_entry: whether that is the entry, so that it comes once in each run.
    """

    kind: str
    num_bytes: int
    computation: str
    is_entry: bool


def collectives(compiled_text: str) -> list[Collective]:
    """Returns the exchanges in a program, in its order; `compiled_text` is `compiled.as_text()`.

    A collective in two halves, a start and a done, counts once.
    """
    found = []
    parts, entry = computations_of(compiled_text)
    for name, lines in parts.items():
        for line in lines:
            if match := _LINE.match(line):
                _, shape, kind, is_start = match.groups()
                arrays = _ARRAY.findall(shape)
                if is_start and shape.startswith("(") and kind != "all-reduce":
                    arrays = arrays[len(arrays) // 2 :]  # operands, then results
                size = sum(map(_num_bytes, arrays))
                found.append(Collective(kind, size, name, name == entry))
    return found


def _num_bytes(array: tuple[str, str]) -> int:
    dtype, dims = array
    bits = _BITS.search(dtype)
    width = 1 if bits is None else max(1, int(bits[0]) // 8)
    return width * math.prod(int(n) for n in dims.split(",") if n)
