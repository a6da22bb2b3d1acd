"""Products of few rows with a weight, compiled by Numba: each weight is read once, as it lies.

A product's features are cut into items, at which XLA's threads work together. Within an item a few
of the weight's rows meet all rows of `x` before the next few are read.
"""

from typing import Any

import numba
import numpy as np

from pallas_paged.ops.cpu import registration, team, tile, vectors, xla_call
from pallas_paged.ops.cpu.team import (
    call_helpers,
    close_job,
    enter,
    is_job,
    item_is_done,
    note_of,
    open_job,
    take_item,
)
from pallas_paged.ops.cpu.tile import FEW_COLUMNS, LINE_BYTES, MANY_COLUMNS, MAX_ROWS, dot_products
from pallas_paged.ops.cpu.vectors import LANES, MULTIPLIES_BFLOAT16
from pallas_paged.ops.cpu.xla_call import (
    num_threads,
    operand,
    operand_address,
    own_address,
    result,
    result_address,
    size,
)

ITEMS_PER_THREAD = 8
"""At least, where the weight has so many features."""
FEW_ROWS = 12
"""Up to so many rows the memory is what holds a product up."""
MIN_SHARED_PRODUCTS = 2**17
"""Multiplications up to which one thread does all."""


def load_kernel(is_bfloat16: bool) -> str:
    """Makes XLA know the kernel for such a weight, and returns its name there.

    It takes a second or two the first time; what is compiled is kept, see `xla_call.compiled`.
    """
    name = f"pallas_paged.product.{'bfloat16' if is_bfloat16 else 'float32'}"
    return registration.register(name, lambda: compile_kernel(is_bfloat16))


def compile_kernel(is_bfloat16: bool) -> Any:
    """Returns the kernel, called with x [n, k], weight [out, k] and i32[1]; it gives f32[n, out].

    The number is how many of x's rows are in use, the first ones; those behind give 0.

    Args:
      is_bfloat16: whether the weight is, and not float32. So is x, where the CPU multiplies such
        numbers; else it is float32.
    """
    others = xla_call.digest(tile, vectors, team, xla_call)
    narrow_x, narrow_weight = int(is_bfloat16 and MULTIPLIES_BFLOAT16), int(is_bfloat16)
    x_size, weight_size = 4 - 2 * narrow_x, 4 - 2 * narrow_weight
    columns = FEW_COLUMNS if narrow_x else MANY_COLUMNS
    step = LANES * (1 + narrow_x)  # of what is summed over
    # Lines that a step asks for: as many as it reads, or twice as many.
    many_lines = max(1, columns * step * weight_size // LINE_BYTES)
    few_lines = 2 * many_lines

    def multiply(address: int) -> int:
        job, is_helper = address, is_job(address)
        frame, item = enter(address)
        if frame == 0 or others < 0:  # which makes it part of what is kept
            return 0
        all_rows, k, out = size(frame, 0, 0), size(frame, 0, 1), size(frame, 1, 0)
        n = min(all_rows, numba.carray(operand(frame, 2), 1, np.int32)[0])
        x, weight, y = (
            operand_address(frame, 0),
            operand_address(frame, 1),
            result_address(frame, 0),
        )
        if not is_helper:
            numba.carray(result(frame, 0), all_rows * out, np.float32)[n * out :] = 0
            num_tiles = -(-out // columns) if n > 0 else 0
            tiles_per_item = max(1, num_tiles // (ITEMS_PER_THREAD * num_threads(frame)))
            num_items = -(-num_tiles // tiles_per_item)
            job = open_job(frame, own_address(), num_items, tiles_per_item)
            if n * k * out > MIN_SHARED_PRODUCTS:
                call_helpers(job, num_items - 1)
            item = take_item(job)
        item_features = note_of(job) * columns
        stride, x_stride, y_stride = k * weight_size, k * x_size, out * 4
        # All rows of a tile together ask for the weights of one behind. Several of their steps ask
        # for the same lines, for early is better than once; the more rows the less it helps.
        is_few, share = n <= FEW_ROWS, columns * stride // max(1, -(-n // MAX_ROWS))
        tiles_ahead, advance = 2 if is_few else 1, share // max(1, -(-k // step))
        # With all threads at work, a thread's next item is likely to be as many behind this one.
        to_next_item = (num_threads(frame) - 1) * item_features * stride
        while item >= 0:
            feature, past = item * item_features, min(out, (item + 1) * item_features)
            while feature < past:
                # The last tile lies over the one before, if the features are no multiple.
                f = min(feature, out - columns)
                w = weight + f * stride
                ahead = w + tiles_ahead * columns * stride
                if feature + tiles_ahead * columns >= past:
                    ahead += to_next_item
                for r in range(0, n, MAX_ROWS):
                    rows, here, place = (
                        min(n - r, MAX_ROWS),
                        x + r * x_stride,
                        y + r * y_stride + 4 * f,
                    )
                    if is_few:
                        dot_products(
                            narrow_x,
                            narrow_weight,
                            columns,
                            few_lines,
                            rows,
                            here,
                            x_stride,
                            w,
                            stride,
                            k,
                            place,
                            y_stride,
                            ahead,
                            advance,
                        )
                    else:
                        dot_products(
                            narrow_x,
                            narrow_weight,
                            columns,
                            many_lines,
                            rows,
                            here,
                            x_stride,
                            w,
                            stride,
                            k,
                            place,
                            y_stride,
                            ahead,
                            advance,
                        )
                    ahead += share
                feature += columns
            item_is_done(job)
            item = take_item(job)
        if not is_helper:
            close_job(job)
        return 0

    return xla_call.compiled(multiply, set())
