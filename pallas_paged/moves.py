"""Which arrays a compiled program makes anew that it should use where they lie: weights, caches.

Read from XLA's text of the program, of any platform.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import jax

from pallas_paged.launches import computations_of

_LINE = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\w+\[([\d,]*)\]")
_OPERAND = re.compile(r"%([\w.\-]+)")
_FUSED = re.compile(r"calls=%([\w.\-]+)")
_VIEWS = ("bitcast", "get-tuple-element", "parameter")
_MADE_ELSEWHERE = ("tuple", "while", "conditional", "call", "copy-done", "custom-call")
_IN_PLACE = ("scatter", "dynamic-update-slice")
_FEW = 1 << 15
"""More than a norm has: as many numbers as that stand in a step for other reasons too."""


class _Instruction(NamedTuple):
    is_root: bool
    name: str
    shape: str
    operation: str
    rest: str

    @property
    def operands(self) -> list[str]:
        return _OPERAND.findall(self.rest.partition(")")[0])


def moves(compiled_text: str, arrays: Iterable[jax.Array | jax.ShapeDtypeStruct]) -> list[str]:
    """Returns the instructions that write one of the arrays anew, as text.

    Those that copy, transpose or convert one, or write it in any other way than by updating an
    argument in place. Of a custom call, which says itself what it overwrites, nothing is known.

    Args:
      compiled_text: `compiled.as_text()`.
      arrays: the weights and caches, or their shapes. They are recognised by their number of
        elements, which nothing else in the program may have; those of few are not looked for.
    """
    num_elements = {array.size for array in arrays if array.size >= _FEW}
    bodies = {
        name: {each.name: each for each in _instructions(lines)}
        for name, lines in computations_of(compiled_text)[0].items()
    }
    every = [(body, each) for body in bodies.values() for each in body.values()]
    fused = {_FUSED.findall(each.rest)[-1] for _, each in every if each.operation == "fusion"}
    found = []
    for name in bodies.keys() - fused:
        for each in bodies[name].values():
            if each.operation == "fusion":
                made = _made_by(bodies[_FUSED.findall(each.rest)[-1]])
            elif each.operation == "bitcast":
                made = []  # whatever it is of
            else:
                made = _anew(each, bodies[name])
            if any(size in num_elements for size in made):
                found.append(f"{each.name} = {each.shape} {each.operation}")
    return sorted(found)


def _instructions(lines: list[str]) -> Iterator[_Instruction]:
    for line in lines:
        if found := _LINE.match(line):
            yield _Instruction(found[1] is not None, *found.groups()[1:])


def _made_by(body: Mapping[str, _Instruction]) -> list[int]:
    """Returns the numbers of elements of what a fusion writes anew."""
    (root,) = (each for each in body.values() if each.is_root)
    results = [body[name] for name in root.operands] if root.operation == "tuple" else [root]
    return [size for each in results for size in _anew(each, body)]


def _anew(each: _Instruction, body: Mapping[str, _Instruction]) -> list[int]:
    """Returns the numbers of elements of the arrays that an instruction writes anew."""
    while each.operation == "bitcast" and each.operands[0] in body:
        each = body[each.operands[0]]
    if each.operation in (*_VIEWS, *_MADE_ELSEWHERE):
        return []
    if each.operation in _IN_PLACE:
        updated = body.get(each.operands[0])
        while updated is not None and updated.operation in ("bitcast", *_IN_PLACE):
            updated = body.get(updated.operands[0])
        if updated is None or updated.operation in (*_VIEWS, *_MADE_ELSEWHERE, "fusion"):
            return []
    return [
        math.prod(map(int, filter(None, dims.split(",")))) for dims in _ARRAY.findall(each.shape)
    ]
