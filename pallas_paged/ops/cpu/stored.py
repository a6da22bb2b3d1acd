"""Numbers as arrays store them, and as kernels for CPUs compute with them.

bfloat16 goes by the name of uint16, for Numba does not know it.
"""

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from pallas_paged.ops.cpu.xla_call import COMPILED_ONLY


def wide(x: Any) -> Any:
    """Returns a stored number as float32."""
    raise NotImplementedError("compiled code only")


@overload(wide, strict=False, jit_options=COMPILED_ONLY)
def _wide(x: Any) -> Any:
    if x == types.uint16:
        return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    return lambda x: np.float32(x)


def narrow(x: Any, like: Any) -> Any:
    """Returns a float32 as it is stored beside the number `like`, rounded to the nearest."""
    raise NotImplementedError("compiled code only")


@overload(narrow, strict=False, jit_options=COMPILED_ONLY)
def _narrow(x: Any, like: Any) -> Any:
    if like == types.float32:
        return lambda x, like: x

    def to_bfloat16(x: Any, like: Any) -> Any:
        bits = np.float32(x).view(np.uint32)
        if np.isnan(x):
            return np.uint16(0x7FC0)
        return np.uint16((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)

    return to_bfloat16
