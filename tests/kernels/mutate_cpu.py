"""Breaks the attention kernel for CPUs on purpose; see `tests.mutations`.

python -m tests.kernels.mutate_cpu             # all of them, about half a minute each
python -m tests.kernels.mutate_cpu "sums" ...  # some, by name
"""

import sys

from tests.mutations import Mutation, run

_CPU = "pallas_paged/ops/attention/cpu"
_KERNEL, _ROWS, _CALL = f"{_CPU}/kernel.py", f"{_CPU}/rows.py", f"{_CPU}/xla_call.py"
_ATTENTION, _OWN = "tests/kernels/test_attention.py", "tests/kernels/test_cpu_attention.py"


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
        "first = min(max(0, position0 - window + 1 - key0 - j * block_size), past)",
        "first = 0",
    ),
    "NaN behind the end": _mutation(
        _KERNEL, "past = min(block_size, count - j * block_size)", "past = block_size"
    ),
    "no correction": _mutation(_KERNEL, "factor = exp(maxima[r] - largest)", "factor = F32(1.0)"),
    "sinks without weight": _mutation(_KERNEL, "exp(sinks[head] - maxima[r])", "F32(0.0)"),
    "the slopes of another head": _mutation(
        _KERNEL, "slopes[h * group + r % group]", "slopes[h * group]"
    ),
    "no scales of keys": _mutation(
        _KERNEL, "s[r, t] *= k_scales[block, h, t % block_size]", "pass"
    ),
    "no scales of values": _mutation(
        _KERNEL, "s[r, t] *= v_scales[block, h, t % block_size]", "pass"
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
        _ROWS, "(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16", "(bits - 0x7FFF) >> 16"
    ),
    "rows beyond the fours": _mutation(
        _ROWS, "for r in range(row_fours, end):", "for r in range(row_fours, end - 1):"
    ),
    "a wrong tanh": _mutation(_ROWS, "F32(-2.0) * abs(x)", "F32(-1.9) * abs(x)"),
    "the next head's keys": _mutation(
        _KERNEL,
        "keys = block_rows(k_cache[block, head0 + i], key_copy)",
        "keys = block_rows(k_cache[block, head0 + num_heads_here - 1 - i], key_copy)",
    ),
    "nobody waits": _mutation(_KERNEL, "            wait_for_items(job)\n", "            pass\n"),
    "nobody helps": _mutation(
        _CALL, "for _ in range(min(most, num_threads - 1)):", "for _ in range(0):"
    ),
    "an item twice": _mutation(
        _CALL, "item = add(job + 8 * _NEXT, 1)", "item = add(job + 8 * _NEXT, 1) // 2"
    ),
}


if __name__ == "__main__":
    sys.exit(run(MUTATIONS, sys.argv[1:]))
