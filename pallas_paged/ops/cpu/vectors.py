"""Vectors of numbers in the code that Numba compiles, written for LLVM."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import binding, ir
from numba.core import cgutils, config

I16, I32, I64, F32 = *map(ir.IntType, (16, 32, 64)), ir.FloatType()


class _BFloat16(ir.Type):
    """bfloat16, which llvmlite does not know."""

    intrinsic_name = "bf16"

    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat16)

    def __hash__(self) -> int:
        return hash(_BFloat16)


def _cpu_features() -> set[str]:
    """Returns what the CPU has that Numba compiles for, by LLVM's names."""
    asked = getattr(config, "CPU_FEATURES", None)  # NUMBA_CPU_FEATURES
    if asked is not None:
        return {name[1:] for name in asked.split(",") if name[:1] == "+"}
    return {name for name, is_there in binding.get_host_cpu_features().items() if is_there}


_FEATURES = _cpu_features()
LANES = 16 if "avx512f" in _FEATURES else 8 if "avx" in _FEATURES else 4
"""float32 numbers in a vector."""
NUM_REGISTERS = 16 if LANES == 8 else 32
"""Of vectors: AVX2 has half as many as AVX-512 and NEON."""
MULTIPLIES_BFLOAT16 = LANES == 16 and "avx512bf16" in _FEATURES
"""Whether there is an instruction for sums of products of bfloat16 in float32."""
HAS_AMX = "amx-bf16" in _FEATURES
"""Whether there are instructions for matrices of bfloat16."""

_VECTOR = ir.VectorType(F32, LANES)


class Writer:
    """Writes code on vectors of `LANES` float32 where a builder is."""

    def __init__(self, builder: Any):
        self.builder = builder

    def constant(self, value: int) -> Any:
        """Returns a whole number of 64 bits."""
        return ir.Constant(I64, value)

    def zeros(self) -> Any:
        """Returns a vector of zeros."""
        return ir.Constant(_VECTOR, None)

    def infinities(self, sign: int) -> Any:
        """Returns a vector of infinities."""
        return ir.Constant(_VECTOR, [sign * math.inf] * LANES)

    def loop(
        self,
        first: Any,
        past: Any,
        step: int,
        carried: Sequence[Any],
        body: Callable[[Any, list[Any]], Sequence[Any]],
    ) -> list[Any]:
        """Writes `for i in range(first, past, step): carried = body(i, carried)`; returns it."""
        builder = self.builder
        before = builder.block
        head, inside, end = (builder.append_basic_block() for _ in range(3))
        builder.branch(head)
        builder.position_at_end(head)
        i, *kept = (builder.phi(value.type) for value in (first, *carried))
        for phi, value in zip((i, *kept), (first, *carried), strict=True):
            phi.add_incoming(value, before)
        builder.cbranch(builder.icmp_signed("<", i, past), inside, end)
        builder.position_at_end(inside)
        new = body(i, kept)
        following = builder.add(i, self.constant(step))
        for phi, value in zip((i, *kept), (following, *new), strict=True):
            phi.add_incoming(value, builder.block)
        builder.branch(head)
        builder.position_at_end(end)
        return kept

    def switch(self, value: Any, last: int, write: Callable[[int], None]) -> None:
        """Writes a case for each whole number from 1 on; what is none of them is the last."""
        builder = self.builder
        *blocks, otherwise, end = (builder.append_basic_block() for _ in range(last + 1))
        chosen = builder.switch(value, otherwise)
        for number, block in enumerate([*blocks, otherwise], start=1):
            if block is not otherwise:
                chosen.add_case(self.constant(number), block)
            builder.position_at_end(block)
            write(number)
            builder.branch(end)
        builder.position_at_end(end)

    def behind(self, address: Any, stride: Any, count: int) -> Any:
        """Returns the address that is `count` strides behind one."""
        return self.builder.add(address, self.builder.mul(stride, self.constant(count)))

    def load(self, address: Any, is_bfloat16: bool, mask: Any = None) -> Any:
        """Loads a vector of stored numbers as float32, with 0 where a mask has none."""
        if not is_bfloat16:
            return self._load(address, _VECTOR, 4, mask)
        wide = ir.VectorType(I32, LANES)
        stored = self._load(address, ir.VectorType(I16, LANES), 2, mask)
        bits = self.builder.shl(self.builder.zext(stored, wide), ir.Constant(wide, [16] * LANES))
        return self.builder.bitcast(bits, _VECTOR)

    def load_pairs(self, address: Any, mask: Any = None) -> Any:
        """Loads two vectors' bfloat16 numbers as they are."""
        stored = self._load(address, ir.VectorType(I16, 2 * LANES), 2, mask)
        return self.builder.bitcast(stored, ir.VectorType(_BFloat16(), 2 * LANES))

    def prefetch(self, address: Any) -> None:
        """Asks for the cache line at an address, which may be any number."""
        line = self.builder.inttoptr(address, cgutils.voidptr_t)
        read, near, data = (ir.Constant(I32, value) for value in (0, 2, 1))
        self._call("llvm.prefetch.p0", ir.VoidType(), line, read, near, data)

    def _load(self, address: Any, kind: Any, size: int, mask: Any) -> Any:
        place = self._pointer(address, kind)
        if mask is None:
            return self.builder.load(place, align=size)
        name = f"llvm.masked.load.v{kind.count}{'f' if size == 4 else 'i'}{8 * size}.p0"
        return self._call(name, kind, place, ir.Constant(I32, size), mask, ir.Constant(kind, None))

    def store(self, value: Any, address: Any, mask: Any = None) -> None:
        """Stores a vector of float32, of any length; or those numbers of it that a mask has."""
        place = self._pointer(address, value.type)
        if mask is None:
            self.builder.store(value, place, align=4)
            return
        name = f"llvm.masked.store.v{value.type.count}f32.p0"
        self._call(name, ir.VoidType(), value, place, ir.Constant(I32, 4), mask)

    def repeat(self, address: Any) -> Any:
        """Returns a vector with the float32 number at an address in every lane."""
        number = self.builder.load(self._pointer(address, F32), align=4)
        return self._repeated(number, LANES)

    def mask(self, count: Any, length: int = LANES) -> Any:
        """Returns which numbers of a vector of some length are among the first `count`."""
        counts = self._repeated(self.builder.trunc(count, I32), length)
        return self.builder.icmp_signed("<", ir.Constant(counts.type, list(range(length))), counts)

    def _repeated(self, number: Any, length: int) -> Any:
        nothing = ir.Constant(ir.VectorType(number.type, length), ir.Undefined)
        one = self.builder.insert_element(nothing, number, ir.Constant(I32, 0))
        return self._shuffle(one, one, [0] * length)

    def multiply_add(self, left: Any, right: Any, total: Any) -> Any:
        """Returns `total + left * right`, with one rounding where the CPU can."""
        return self._call(f"llvm.fmuladd.v{LANES}f32", _VECTOR, left, right, total)

    def multiply_add_pairs(self, left: Any, right: Any, total: Any) -> Any:
        """Returns `total` with the products of a pair's numbers added to each lane."""
        name = f"llvm.x86.avx512bf16.dpbf16ps.{32 * LANES}"
        return self._call(name, _VECTOR, total, left, right)

    def add_lanes(self, a: Any, b: Any, c: Any, d: Any) -> Any:
        """Returns the sums of four vectors' lanes as a vector of four."""
        total = self._add_neighbours(self._add_neighbours(a, b), self._add_neighbours(c, d))
        while total.type.count > 4:
            total = self.builder.fadd(*self.halves(total))
        return total

    def halves(self, vector: Any) -> tuple[Any, Any]:
        """Returns the first half of a vector's numbers, and the others."""
        length = vector.type.count
        halves = range(length // 2), range(length // 2, length)
        left, right = (self._shuffle(vector, vector, half) for half in halves)
        return left, right

    def chosen(self, mask: Any, value: Any, other: Any) -> Any:
        """Returns the numbers of one vector where a mask has them, else those of another."""
        return self.builder.select(mask, value, other)

    def larger(self, value: Any, other: Any) -> Any:
        """Returns the larger numbers of two vectors; the other one's where one is NaN."""
        return self.chosen(self.builder.fcmp_ordered(">", value, other), value, other)

    def largest_lane(self, vector: Any) -> Any:
        """Returns the largest number of a vector."""
        while vector.type.count > 1:
            vector = self.larger(*self.halves(vector))
        return self.builder.extract_element(vector, ir.Constant(I32, 0))

    def turned(self, rows: Sequence[Any]) -> list[Any]:
        """Returns the columns of `LANES` vectors: the transpose of a square."""
        vectors, lanes, distance = list(rows), range(LANES), 1
        while distance < LANES:
            # Squares of so many rows and columns change places with those right of and below them.
            left = [LANES + i - distance if i & distance else i for i in lanes]
            right = [LANES + i if i & distance else i + distance for i in lanes]
            for i in lanes:
                if not i & distance:
                    pair = vectors[i], vectors[i + distance]
                    vectors[i] = self._shuffle(*pair, left)
                    vectors[i + distance] = self._shuffle(*pair, right)
            distance *= 2
        return vectors

    def _add_neighbours(self, a: Any, b: Any) -> Any:
        """Returns sums of two numbers side by side: in each four two of `a`, then two of `b`."""
        even = [four + i for four in range(0, LANES, 4) for i in (0, 2, LANES, LANES + 2)]
        odd = [i + 1 for i in even]
        return self.builder.fadd(self._shuffle(a, b, even), self._shuffle(a, b, odd))

    def _shuffle(self, a: Any, b: Any, places: Sequence[int]) -> Any:
        indices = ir.Constant(ir.VectorType(I32, len(places)), list(places))
        return self.builder.shuffle_vector(a, b, indices)

    def _pointer(self, address: Any, kind: Any) -> Any:
        return self.builder.inttoptr(address, kind.as_pointer())

    def _call(self, name: str, result: Any, *arguments: Any) -> Any:
        function_type = ir.FunctionType(result, [argument.type for argument in arguments])
        function = cgutils.get_or_insert_function(self.builder.module, function_type, name)
        return self.builder.call(function, list(arguments))
