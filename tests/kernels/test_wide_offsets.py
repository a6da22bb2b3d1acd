"""Offsets into caches of more than 2^31 numbers: kernels compute them in 64 bits.

A block's place is its number times the numbers of a block. What moves through registers multiplies
in 64 bits. Copies by TMA leave that to the hardware: it takes coordinates of 32 bits, of which a
block's number times KV heads is the largest, and strides of 64 bits. So nothing in a kernel may be
multiplied in 32 bits by as much as a block holds, which is read in the machine's assembly.
"""

import re

import pytest

from benchmarks.attention_cases.decode import make_case
from pallas_paged.deviceless import kernel_ptx
from tests.kernels.test_mosaic_cache_ops import operations, shapes

NUM_BLOCKS = 300_000
_SHIFT = re.compile(r"shl\.b32\s+%\w+, %\w+, (\d+);")
_PRODUCT = re.compile(r"(?:mul|mad)\.lo\.[su]32\s+%\w+, %\w+, (-?\d+)[,;]")


def largest_factor(ptx: str) -> int:
    """Returns the largest number that something of 32 bits is multiplied by, in 32 bits."""
    shifts = (1 << int(bits) for bits in _SHIFT.findall(ptx))
    return max([*shifts, *(abs(int(factor)) for factor in _PRODUCT.findall(ptx))], default=1)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize(
    "name", ["write_kv", "rotate_and_write", "copy_blocks", "gather_blocks", "scatter_blocks"]
)
def test_operations_on_the_cache(name, dtype):
    sizes = (8, 32, 128, dtype)
    operation, arguments = operations(sizes)[name]
    cache = shapes(NUM_BLOCKS, *sizes)
    assert cache.k.size > 2**33
    ptx = kernel_ptx("h100", operation, cache, *arguments)
    assert largest_factor(ptx) < 8 * 32 * 128


@pytest.mark.parametrize("cache_dtype", ["bfloat16", "int8"])
def test_decode(cache_dtype):
    """Blocks of more numbers than shared memory has, whose offsets are multiplied too."""
    case = make_case(4, 128, 128, cache_dtype=cache_dtype)
    ptx = kernel_ptx("h100", case.function, *case.arguments(num_blocks=NUM_BLOCKS))
    assert largest_factor(ptx) < 8 * 128 * 128
