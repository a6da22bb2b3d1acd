"""Breaks the kernels for CPUs on purpose; see `tests.mutations`.

python -m tests.kernels.mutate_cpu             # all of them, about half a minute each
python -m tests.kernels.mutate_cpu "sums" ...  # some, by name
"""

import sys

from tests.mutations import Mutation, run

_KERNEL, _ROWS = (f"pallas_paged/ops/attention/cpu/{name}.py" for name in ("kernel", "rows"))
_STORED, _TEAM, _TILE, _VECTORS = (
    f"pallas_paged/ops/cpu/{name}.py" for name in ("stored", "team", "tile", "vectors")
)
_PRODUCT = "pallas_paged/ops/product/cpu/kernel.py"
_ATTENTION, _OWN = "tests/kernels/test_attention.py", "tests/kernels/test_cpu_attention.py"
_PRODUCTS = "tests/kernels/test_product.py"


def _mutation(file: str, old: str, new: str, tests: str = f"{_ATTENTION} {_OWN}") -> Mutation:
    return Mutation(file, old, new, tests)


MUTATIONS = {
    "a key too many": _mutation(
        _KERNEL, "min(count, position + 1 - key0)", "min(count, position + 2 - key0)"
    ),
    "a wider window": _mutation(
        _KERNEL, "max(0, position - window + 1 - key0)", "max(0, position - window - key0)"
    ),
    "NaN left of the window": _mutation(
        _KERNEL,
        "first = min(max(0, first_seen - j * block_size), past)",
        "first = 0",
    ),
    "NaN left of the window of many rows": _mutation(
        _KERNEL, "values = value_copy[first_seen:count]", "values = value_copy[:count]"
    ),
    "NaN behind the end": _mutation(
        _KERNEL, "min(block_size, count - j * block_size)", "block_size"
    ),
    "NaN behind the end of many rows": _mutation(
        _KERNEL, "values = value_copy[first_seen:count]", "values = value_copy[first_seen:]"
    ),
    "scores before the window": _mutation(
        _TILE,
        "seen = writer.chosen(is_before, writer.infinities(-1), seen)",
        "seen = writer.chosen(is_before, seen, seen)",
    ),
    "the largest of too few lanes": _mutation(
        _VECTORS,
        "vector = self.larger(*self.halves(vector))",
        "vector = self.larger(*self.halves(vector)[:1] * 2)",
    ),
    "keys turned but for one stage": _mutation(
        _VECTORS, "while distance < LANES:", "while distance < LANES // 2:"
    ),
    "scores on top of the last chunk's": _mutation(
        _TILE, "[writer.zeros() if is_new else", "[writer.zeros() if is_narrow else"
    ),
    "a tile's first tokens left out": _mutation(
        _KERNEL, "num_tokens = past_token - token0", "num_tokens = past_token - (token0 + 1)"
    ),
    "no correction": _mutation(_KERNEL, "factor = exp(maxima[r] - largest)", "factor = F32(1.0)"),
    "sinks without weight": _mutation(_KERNEL, "exp(sinks[head] - maxima[r])", "F32(0.0)"),
    "the slopes of another head": _mutation(
        _KERNEL, "slopes[h * group + r % group]", "slopes[h * group]"
    ),
    "scales of the next row": _mutation(
        _ROWS, "lambda stored, scales, t: scales[t]", "lambda stored, scales, t: scales[t - 1]"
    ),
    "values with the scales of keys": _mutation(
        _KERNEL, "scales = v_scales[block, head0 + i]", "scales = k_scales[block, head0 + i]"
    ),
    "padding untouched": _mutation(
        _KERNEL,
        "for token in range(starts[B], T):\n                lse[token], out[token] = -np.inf, 0",
        "for token in range(starts[B], T):\n                pass",
    ),
    "the exponential's last term": _mutation(
        _ROWS, "p = p * r + F32(5.0000001201e-1)", "p = p * r + F32(5.0001e-1)"
    ),
    "bfloat16 cut off": _mutation(
        _STORED, "(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16", "(bits - 0x7FFF) >> 16"
    ),
    "scores of the last keys": _mutation(
        _ROWS, "t = min(column, num_keys - FEW_COLUMNS)", "t = min(column, num_keys - 5)"
    ),
    "values without the last columns": _mutation(
        _TILE, "    add_columns(whole, width, 1, writer.mask(rest))\n", ""
    ),
    "values without a vector": _mutation(_TILE, "    add_columns(together, whole, 1)\n", ""),
    "a wrong tanh": _mutation(_ROWS, "F32(-2.0) * abs(x)", "F32(-1.9) * abs(x)"),
    "the next head's keys": _mutation(
        _KERNEL,
        "keys = k_cache[block, head0 + i]",
        "keys = k_cache[block, head0 + num_heads_here - 1 - i]",
    ),
    "nobody waits": _mutation(
        _TEAM, "while add(place + 8 * _DONE, 0) < num_items:", "while num_items < 0:"
    ),
    "nobody helps": _mutation(_TEAM, "for _ in range(missing):", "for _ in range(0):"),
    "an item twice": _mutation(
        _TEAM,
        "            return state & _COUNT_MASK\n",
        "            return (state & _COUNT_MASK) // 2\n",
    ),
    "the items of the next job": _mutation(
        _TEAM,
        "if _job(slot, state) != job or not _has_items(state):",
        "if not _has_items(state):",
        f"{_OWN} {_PRODUCTS}",
    ),
    "a lane too many": _mutation(
        _TILE, "writer.mask(rest, step)", "writer.mask(k, step)", _PRODUCTS
    ),
    "lanes that are left out": _mutation(
        _VECTORS, "while total.type.count > 4:", "while total.type.count > 8:", _PRODUCTS
    ),
    "the last columns of a row in another one's": _mutation(
        _TILE, "writer.builder.add(places[row]", "writer.builder.add(places[r]", _PRODUCTS
    ),
    "the last columns of two rows are one row's": _mutation(
        _TILE,
        "for row in (r, other) for f in (4, 5)",
        "for row in (r, r) for f in (4, 5)",
        _PRODUCTS,
    ),
    "the wrong halves of bfloat16": _mutation(
        _VECTORS, "[16] * LANES", "[15] * LANES", f"{_PRODUCTS} {_ATTENTION}"
    ),
    "products without the last rows": _mutation(
        _PRODUCT,
        "for r in range(0, n, MAX_ROWS):",
        "for r in range(0, n - 1, MAX_ROWS):",
        _PRODUCTS,
    ),
    "products without the last features": _mutation(
        _PRODUCT,
        "f = min(feature, out - columns)",
        "f = min(feature, out - columns - 1)",
        _PRODUCTS,
    ),
}


if __name__ == "__main__":
    sys.exit(run(MUTATIONS, sys.argv[1:]))
