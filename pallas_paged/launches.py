"""What a compiled GPU program launches, read from XLA's texts of it.

`launches` reads the program, `schedule` what XLA made of it for the GPU: which launches it records
in command buffers (CUDA graphs), each one launch for the host, and which the host launches one by
one. The program's text knows nothing of command buffers.
"""

import dataclasses
import itertools
import re
from collections.abc import Mapping

_FREE = ("parameter", "bitcast", "tuple", "get-tuple-element", "constant", "after-all")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (?:\(.*?\)|\S+) ([\w\-]+)\(")
_TARGET = re.compile(r'custom_call_target="([^"]+)"')
_CALLED = re.compile(r"(?:calls|body|to_apply|branch_computations)=\{?%([\w.\-]+)")
_THUNK = re.compile(r"^( *)(\d+): k(\w+)", re.MULTILINE)
_THUNK_NAME = re.compile(r'profile_annotation: "([^"]*)"\s+thunk_id: (\d+)')
_ALLOCATION = "AllocateBuffer"  # a custom call that is memory and no launch
_INDENT = 4


@dataclasses.dataclass(frozen=True)
class Launches:
    """The launches of one run of a program, loops and branches apart.

    Attributes:
      kernels: names of Mosaic GPU and other custom calls, one per launch.
      products: names of matrix products, one per launch.
      others: names of what XLA generated or copies, one per launch.
      loops: names of loops and conditionals: each launches more, as often as its data says.
    """

    kernels: tuple[str, ...]
    products: tuple[str, ...]
    others: tuple[str, ...]
    loops: tuple[str, ...]

    @property
    def total(self) -> int:
        """How many launches there are outside of loops."""
        return len(self.kernels) + len(self.products) + len(self.others)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How the host launches one run of a program, what loops and branches hold apart.

    Attributes:
      command_buffers: of each command buffer the names of the launches in it, as `Launches` has
        them; a loop or conditional in it counts as one.
      outside: names of what the host launches by itself, loops and conditionals included.
    """

    command_buffers: tuple[tuple[str, ...], ...]
    outside: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All launches, in the order of the attributes."""
        return (*itertools.chain(*self.command_buffers), *self.outside)


def launches(compiled_text: str) -> Launches:
    """Returns what the program `compiled.as_text()` of a GPU launches."""
    computations, entry = computations_of(compiled_text)
    found: dict[str, list[str]] = {"kernels": [], "products": [], "others": [], "loops": []}
    for name, operation, line in _executed(computations, entry):
        target = _custom_call_target(line, computations)
        if target == _ALLOCATION:
            continue
        if operation in ("while", "conditional"):
            kind = "loops"
        elif "gemm" in name or (target is not None and target.startswith("__cublas")):
            kind = "products"
        elif target is not None:
            kind = "kernels"
        else:
            kind = "others"
        found[kind].append(name)
    return Launches(**{kind: tuple(names) for kind, names in found.items()})


def schedule(thunks: str, thunk_names: str) -> Schedule:
    """Returns how the host launches a program.

    Args:
      thunks: what XLA dumps as `thunk_sequence_after_thunk_passes.txt`.
      thunk_names: what it dumps as `thunk_metadata.txt`.
    """
    names = {number: name for name, number in _THUNK_NAME.findall(thunk_names)}
    buffers: list[list[str]] = []
    outside: list[str] = []
    current: list[str] | None = None  # the command buffer that indented lines belong to
    for indent, number, kind in _THUNK.findall(thunks):
        if indent and (current is None or len(indent) > _INDENT):
            continue  # in a loop, a conditional or a fusion
        if kind == "CommandBuffer":
            assert not indent, "a command buffer in another"
            current = []
            buffers.append(current)
        elif indent:
            assert current is not None
            current.append(names[str(int(number))])
        else:
            current = None
            outside.append(names[str(int(number))])
    return Schedule(tuple(map(tuple, buffers)), tuple(outside))


def computations_of(text: str) -> tuple[Mapping[str, list[str]], str]:
    """Returns the lines of each computation of a program by its name, and the entry's name."""
    computations: dict[str, list[str]] = {}
    entry = current = ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = header[2]
            computations[current] = []
            entry = current if header[1] else entry
        elif current:
            computations[current].append(line)
    assert entry, "no entry computation in the compiled program's text"
    return computations, entry


def _executed(computations: Mapping[str, list[str]], name: str) -> list[tuple[str, str, str]]:
    """Returns (name, operation, line) of what a computation runs, calls followed."""
    executed = []
    for line in computations[name]:
        instruction = _INSTRUCTION.match(line)
        if instruction is None or instruction[2] in _FREE:
            continue
        if instruction[2] == "call" and (called := _CALLED.search(line)):
            executed += _executed(computations, called[1])
        else:
            executed.append((instruction[1], instruction[2], line))
    return executed


def _custom_call_target(line: str, computations: Mapping[str, list[str]]) -> str | None:
    """Returns what a custom call calls, also as a fusion of one with the slices that feed it."""
    called = _CALLED.search(line)
    for inner in (line, *computations.get(called[1] if called else "", ())):
        if target := _TARGET.search(inner):
            return target[1]
    return None
