"""Tiles of matrix products, written for LLVM: their sums stay in registers to the end.

A vector that is loaded serves as many products as a tile has rows, or columns. What a number of the
result is made of, and in which order, does not depend on the tile that it is in.
"""

from typing import Any

from numba.core import types
from numba.extending import intrinsic

from pallas_paged.ops.cpu.vectors import LANES, NUM_REGISTERS, Writer

MAX_ROWS = 4 if NUM_REGISTERS == 32 else 3
"""Of a tile."""
FEW_COLUMNS = 4
"""Of a tile of dot products: divides the keys of most blocks."""
MANY_COLUMNS = 6 if NUM_REGISTERS == 32 else 4
"""Of a tile of dot products that makes more sums of what it loads."""
LINE_BYTES = 64
"""Of a line of a CPU's caches."""
_VECTORS = 4 if NUM_REGISTERS == 32 else 3  # of a tile of sums of rows, side by side


@intrinsic(prefer_literal=True)
def dot_products(
    typing_context: Any,
    bfloat16_x: Any,
    bfloat16_weight: Any,
    columns: Any,
    lines: Any,
    rows: Any,
    x: Any,
    x_stride: Any,
    weight: Any,
    weight_stride: Any,
    k: Any,
    y: Any,
    y_stride: Any,
    ahead: Any,
    advance: Any,
) -> Any:
    """Sets y[r, f] to the sum over i < k of x[r, i] * weight[f, i], for `columns` f.

    Both operands lie along what is summed over. Sums are float32, and so is y.

    Args:
      typing_context: Numba's.
      bfloat16_x: 1 for bfloat16, 0 for float32; a constant, as the next three. With 1 the weight is
        bfloat16 too, and the CPU one that `MULTIPLIES_BFLOAT16`.
      bfloat16_weight: 1 for bfloat16, 0 for float32.
      columns: `FEW_COLUMNS` or `MANY_COLUMNS`.
      lines: how many lines of a CPU's caches each step asks for, which multiplies as many numbers
        of a row as a vector has.
      rows: of x and y, from 1 to `MAX_ROWS`.
      x: the address of the first number, as `weight` and `y`.
      x_stride: bytes from a row to the next, as `weight_stride` and `y_stride`.
      weight: see x.
      weight_stride: see x_stride.
      k: see above.
      y: see x.
      y_stride: see x_stride.
      ahead: the address that the first step asks for.
      advance: bytes from that to what the next step asks for. To ask all along, and not for much
        at once, is what lets the memory work while sums are made.
    """
    constants = bfloat16_x, bfloat16_weight, columns, lines
    is_x_narrow, is_narrow = (bool(constant.literal_value) for constant in constants[:2])
    num_columns, num_lines = columns.literal_value, lines.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, *places = arguments[4:]
        writer = Writer(builder)
        writer.switch(
            rows,
            MAX_ROWS,
            lambda rows: _write_dot_products(
                writer, is_x_narrow, is_narrow, num_columns, num_lines, rows, *places
            ),
        )
        return context.get_dummy_value()

    return types.void(*constants, *[types.intp] * 10), generate


def _write_dot_products(
    writer: Writer,
    is_x_narrow: bool,
    is_narrow: bool,
    columns: int,
    num_lines: int,
    rows: int,
    x: Any,
    x_stride: Any,
    weight: Any,
    weight_stride: Any,
    k: Any,
    y: Any,
    y_stride: Any,
    ahead: Any,
    advance: Any,
) -> None:
    step = 2 * LANES if is_x_narrow else LANES
    x_size, size = (2 if narrow else 4 for narrow in (is_x_narrow, is_narrow))
    rest = writer.builder.urem(k, writer.constant(step))
    whole = writer.builder.sub(k, rest)

    def load(row: Any, i: Any, size: int, mask: Any) -> Any:
        address = writer.behind(row, i, size)
        return (
            writer.load_pairs(address, mask)
            if is_x_narrow
            else writer.load(address, size == 2, mask)
        )

    left = [writer.behind(x, x_stride, r) for r in range(rows)]
    right = [writer.behind(weight, weight_stride, f) for f in range(columns)]
    multiply_add = writer.multiply_add_pairs if is_x_narrow else writer.multiply_add

    def add(i: Any, carried: list[Any], mask: Any = None) -> list[Any]:
        asked, *sums = carried
        for line in range(num_lines):
            writer.prefetch(writer.builder.add(asked, writer.constant(LINE_BYTES * line)))
        loaded = [load(row, i, x_size, mask) for row in left]
        for f, row in enumerate(right):
            one = load(row, i, size, mask)
            for r, other in enumerate(loaded):
                place = columns * r + f
                sums[place] = multiply_add(other, one, sums[place])
        return [writer.builder.add(asked, advance), *sums]

    carried = [ahead] + [writer.zeros()] * (rows * columns)
    carried = writer.loop(writer.constant(0), whole, step, carried, add)
    _, *sums = writer.loop(
        whole, k, step, carried, lambda i, sums: add(i, sums, writer.mask(rest, step))
    )
    places = [writer.behind(y, y_stride, r) for r in range(rows)]
    for r, place in enumerate(places):
        writer.store(writer.add_lanes(*sums[columns * r : columns * r + 4]), place)
    if columns == 4:
        return
    for r in range(0, rows, 2):  # the other two columns, of two rows together
        other = min(r + 1, rows - 1)
        pairs = [sums[columns * row + f] for row in (r, other) for f in (4, 5)]
        for row, pair in zip((r, other), writer.halves(writer.add_lanes(*pairs)), strict=True):
            writer.store(pair, writer.builder.add(places[row], writer.constant(4 * 4)))


@intrinsic(prefer_literal=True)
def add_weighted_rows(
    typing_context: Any,
    bfloat16_values: Any,
    from_zero: Any,
    asks: Any,
    rows: Any,
    weights: Any,
    weights_stride: Any,
    values: Any,
    values_stride: Any,
    count: Any,
    width: Any,
    sums: Any,
    sums_stride: Any,
    distance: Any,
) -> Any:
    """Adds the sum over t < count of weights[r, t] * values[t, d] to sums[r, d], for d < width.

    Or sets sums[r, d] to it.

    Args:
      typing_context: Numba's.
      bfloat16_values: 1 where the values are bfloat16, 0 for float32; a constant. The others are
        float32.
      from_zero: 1 to set the sums, 0 to add to them; a constant.
      asks: 1 to ask the memory for what is read soon; a constant.
      rows: of the weights and sums, from 1 to `MAX_ROWS`.
      weights: the address of the first number, as `values` and `sums`.
      weights_stride: bytes from a row to the next, as `values_stride` and `sums_stride`.
      values: see weights.
      values_stride: see weights_stride.
      count: see above.
      width: see above.
      sums: see weights.
      sums_stride: see weights_stride.
      distance: bytes from each value to what is asked for when it is read.
    """
    constants = bfloat16_values, from_zero, asks
    is_narrow, is_new, is_asking = (bool(constant.literal_value) for constant in constants)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, *places = arguments[3:]
        writer = Writer(builder)
        writer.switch(
            rows,
            MAX_ROWS,
            lambda rows: _write_weighted_rows(writer, is_narrow, is_new, is_asking, rows, *places),
        )
        return context.get_dummy_value()

    return types.void(*constants, *[types.intp] * 10), generate


def _write_weighted_rows(
    writer: Writer,
    is_narrow: bool,
    is_new: bool,
    is_asking: bool,
    rows: int,
    weights: Any,
    weights_stride: Any,
    values: Any,
    values_stride: Any,
    count: Any,
    width: Any,
    sums: Any,
    sums_stride: Any,
    distance: Any,
) -> None:
    size = 2 if is_narrow else 4
    vectors_per_line = max(1, LINE_BYTES // (LANES * size))
    left = [writer.behind(weights, weights_stride, r) for r in range(rows)]
    total = [writer.behind(sums, sums_stride, r) for r in range(rows)]

    def add_columns(first: Any, past: Any, num_vectors: int, mask: Any = None) -> None:
        """Writes a loop over columns, some vectors at a time."""

        def add(d: Any, nothing: list[Any]) -> list[Any]:
            columns = [
                writer.builder.add(d, writer.constant(LANES * v)) for v in range(num_vectors)
            ]
            places = [writer.behind(row, column, 4) for row in total for column in columns]

            def add_row(t: Any, kept: list[Any]) -> list[Any]:
                row = writer.builder.add(values, writer.builder.mul(values_stride, t))
                read = [writer.behind(row, column, size) for column in columns]
                if is_asking:
                    for address in read[::vectors_per_line]:
                        writer.prefetch(builder.add(address, distance))
                loaded = [writer.load(address, is_narrow, mask) for address in read]
                factors = [writer.repeat(writer.behind(one, t, 4)) for one in left]
                products = [(factor, value) for factor in factors for value in loaded]
                return [
                    writer.multiply_add(*pair, one)
                    for pair, one in zip(products, kept, strict=True)
                ]

            kept = [writer.zeros() if is_new else writer.load(at, False, mask) for at in places]
            kept = writer.loop(writer.constant(0), count, 1, kept, add_row)
            for value, place in zip(kept, places, strict=True):
                writer.store(value, place, mask)
            return nothing

        writer.loop(first, past, LANES * num_vectors, [], add)

    builder = writer.builder
    rest = builder.urem(width, writer.constant(LANES))
    whole = builder.sub(width, rest)
    together = builder.sub(whole, builder.urem(whole, writer.constant(LANES * _VECTORS)))
    add_columns(writer.constant(0), together, _VECTORS)
    add_columns(together, whole, 1)
    add_columns(whole, width, 1, writer.mask(rest))


@intrinsic
def turn(typing_context: Any, x: Any, x_stride: Any, y: Any, y_stride: Any) -> Any:
    """Sets y[j, i] to x[i, j], for i and j < `LANES`.

    Args:
      typing_context: Numba's.
      x: the address of the first number, as `y`.
      x_stride: bytes from a row to the next, as `y_stride`.
      y: see x.
      y_stride: see x_stride.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, x_stride, y, y_stride = arguments
        writer = Writer(builder)
        rows = [writer.load(writer.behind(x, x_stride, i), False) for i in range(LANES)]
        for j, column in enumerate(writer.turned(rows)):
            writer.store(column, writer.behind(y, y_stride, j))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), generate


@intrinsic
def mask_row(typing_context: Any, row: Any, first: Any, past: Any, count: Any) -> Any:
    """Sets row[t] to -inf for t < first and t >= past; returns the largest number, NaN left out.

    Args:
      typing_context: Numba's.
      row: the address of the first number.
      first: see above.
      past: see above.
      count: of numbers in the row, a multiple of `LANES`.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row, first, past, count = arguments
        writer = Writer(builder)

        def mask(t: Any, largest: list[Any]) -> list[Any]:
            place = writer.behind(row, t, 4)
            is_before, is_seen = (writer.mask(builder.sub(end, t)) for end in (first, past))
            seen = writer.chosen(is_seen, writer.load(place, False), writer.infinities(-1))
            seen = writer.chosen(is_before, writer.infinities(-1), seen)
            writer.store(seen, place)
            return [writer.larger(seen, *largest)]

        start = [writer.infinities(-1)]
        (largest,) = writer.loop(writer.constant(0), count, LANES, start, mask)
        return writer.largest_lane(largest)

    return types.float32(*[types.intp] * 4), generate
