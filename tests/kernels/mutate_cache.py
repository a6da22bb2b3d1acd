"""Breaks the kernels that write and move blocks on purpose; see `tests.mutations`.

python -m tests.kernels.mutate_cache            # all of them, about a quarter of a minute each
python -m tests.kernels.mutate_cache zeros ...  # some, by name
"""

import sys

from tests.mutations import Mutation, run

_OPS = "pallas_paged/ops"
_WRITE = f"{_OPS}/kv_write/mosaic_gpu.py"
_COPY = f"{_OPS}/block_copy/mosaic_gpu.py"
_TRANSFER = f"{_OPS}/block_transfer/mosaic_gpu.py"
_SHARED = f"{_OPS}/mosaic_gpu.py"
_TESTS = "tests/kernels/test_mosaic_cache_ops.py"


def _mutation(file: str, old: str, new: str, test: str) -> Mutation:
    return Mutation(file, old, new, f"{_TESTS}::{test}")


MUTATIONS = {
    "offsets of blocks in 32 bits": Mutation(
        _SHARED,
        "load(source.at[source_block, at], layout)",
        "load(source.reshape(source.shape[0] * numbers)"
        ".at[pl.ds(source_block * numbers + i * piece, piece)], layout)",
        "tests/kernels/test_wide_offsets.py::test_operations_on_the_cache",
    ),
    "values for keys": _mutation(
        _WRITE, "in zip((k_ref, v_ref), *caches", "in zip((v_ref, k_ref), *caches", "test_write"
    ),
    "the next token's slot": _mutation(
        _WRITE, "slots[token] % block_size", "(slots[token] + 1) % block_size", "test_write"
    ),
    "the null block written": _mutation(
        _WRITE,
        "@pl.when(block != NULL_BLOCK)\n        def _() -> None:\n            for",
        "@pl.when(block >= NULL_BLOCK)\n        def _() -> None:\n            for",
        "test_write",
    ),
    "zeros": _mutation(
        _WRITE,
        "_write_rows(load(x, layout),",
        "_write_rows(0 * load(x, layout),",
        "test_write",
    ),
    "no scale": _mutation(_WRITE, "        store(scales, scale)\n", "", "test_write"),
    "a wrong scale": _mutation(
        _WRITE, "store(scales, scale)", "store(scales, 2 * scale)", "test_write"
    ),
    "another head's scale": _mutation(
        _WRITE,
        "scale.at[block, head, offset]",
        "scale.at[block, 0, offset]",
        "test_write",
    ),
    "static: keys' scales for values": _mutation(
        _WRITE, "return (k, v), refs[num_given:]", "return (k, k), refs[num_given:]", "test_write"
    ),
    "static: the first head's scale": _mutation(
        _WRITE,
        "given = None if static is None else static[head]\n",
        "given = None if static is None else static[0]\n",
        "test_write",
    ),
    "static: not used where heads go together": _mutation(
        _WRITE,
        "cache.at[block, :, offset], scales, given)",
        "cache.at[block, :, offset], scales)",
        "test_write",
    ),
    "static: an infinity becomes finite": Mutation(
        "pallas_paged/quantisation.py",
        "scale = jnp.where(amax < jnp.inf, given, jnp.inf)",
        "scale = given",
        "tests/kernels/test_kv_quantised.py::test_what_is_wrong_does_not_become_finite",
    ),
    "one head for all": _mutation(
        _WRITE, "row = load(x.at[head], layout", "row = load(x.at[0], layout", "test_write"
    ),
    "rotated: the null block written": _mutation(
        _WRITE,
        "@pl.when(block != NULL_BLOCK)\n        def _() -> None:\n            k_cache",
        "@pl.when(block >= NULL_BLOCK)\n        def _() -> None:\n            k_cache",
        "test_rotate_and_write",
    ),
    "rotated: the first token's angle": _mutation(
        _WRITE,
        "cos, sin = cos_ref.at[token], sin_ref.at[token]",
        "cos, sin = cos_ref.at[0], sin_ref.at[token]",
        "test_rotate_and_write",
    ),
    "rotated: the first head's rows": _mutation(
        _WRITE,
        "x, out = rows_ref.at[token, head],",
        "x, out = rows_ref.at[token, 0],",
        "test_rotate_and_write",
    ),
    "rotated: the first queries for all": _mutation(
        _WRITE,
        "rotated(x.at[at], cos, sin, num_rows))",
        "rotated(x.at[_portions(group)[0][0]], cos, sin, num_rows))",
        "test_rotate_and_write",
    ),
    "rotated: the last queries left out": _mutation(
        _WRITE,
        "[*range(0, num_rows - 4, 4), num_rows - 4]",
        "[*range(0, num_rows - 3, 4)]",
        "test_rotate_and_write",
    ),
    "rotated: keys as they are": _mutation(
        _WRITE,
        "keys = rotated(x.at[group], cos, sin, 1)",
        "keys = [load(x.at[group, at], layout_of_rows(1, half)) for at in halves]",
        "test_rotate_and_write",
    ),
    "rotated: keys for values": _mutation(
        _WRITE, "load(x.at[group + 1],", "load(x.at[group],", "test_rotate_and_write"
    ),
    "rotated: another half's scale": _mutation(
        "pallas_paged/quantisation.py",
        "functools.reduce(jnp.maximum, amaxes)",
        "amaxes[-1]",
        "test_rotate_and_write",
    ),
    "rotated, static: keys by their own scale": _mutation(
        _WRITE,
        "quantise_parts(keys, dtype, k_given)",
        "quantise_parts(keys, dtype)",
        "test_rotate_and_write",
    ),
    "rotated, static: values by the first head's": _mutation(
        _WRITE,
        "static is None else static[head] for static",
        "static is None else static[0] for static",
        "test_rotate_and_write",
    ),
    "rotated: no scale": _mutation(
        _WRITE, "                store(k_scale, scale)\n", "", "test_rotate_and_write"
    ),
    "rotated: not rounded before it is quantised": _mutation(
        _WRITE,
        "return [x.astype(q.dtype) for x in rotated_halves(first, second, *angles)]",
        "return [*rotated_halves(first, second, *angles)]",
        "test_rotated_keys_are_rounded_before_they_are_quantised",
    ),
    "rotated: turned the other way": _mutation(
        f"{_OPS}/rotary.py",
        "first * cos - second * sin, second * cos + first * sin",
        "first * cos + second * sin, second * cos - first * sin",
        "test_rotation_turns_pairs_and_no_others",
    ),
    "the pair reversed": _mutation(
        _COPY,
        "source, destination = src_ref[pair], dst_ref[pair]",
        "destination, source = src_ref[pair], dst_ref[pair]",
        "test_copy_gather_and_scatter",
    ),
    "a copy into the null block": _mutation(
        _COPY,
        "destination != NULL_BLOCK",
        "destination >= NULL_BLOCK",
        "test_copy_gather_and_scatter",
    ),
    "the first pair only": _mutation(
        _COPY,
        'pair = jax.lax.axis_index("pair")',
        'pair = 0 * jax.lax.axis_index("pair")',
        "test_copy_gather_and_scatter",
    ),
    "gathered from its own number": _mutation(
        _TRANSFER,
        "move_block(source, ids_ref[i], destination, i)",
        "move_block(source, i, destination, i)",
        "test_copy_gather_and_scatter",
    ),
    "scattered to its own number": _mutation(
        _TRANSFER,
        "move_block(source, i, destination, block)",
        "move_block(source, i, destination, i)",
        "test_copy_gather_and_scatter",
    ),
    "a scatter into the null block": _mutation(
        _TRANSFER, "block != NULL_BLOCK", "block >= NULL_BLOCK", "test_copy_gather_and_scatter"
    ),
    "the first piece left out": _mutation(
        _SHARED,
        'first, step = jax.lax.axis_index("piece"),',
        'first, step = jax.lax.axis_index("piece") + 1,',
        "test_copy_gather_and_scatter",
    ),
    "every piece at the beginning": _mutation(
        _SHARED,
        "at = pl.ds(i * piece, piece)",
        "at = pl.ds(0 * i, piece)",
        "test_copy_gather_and_scatter",
    ),
    "float8 on a chip that does not round to it": _mutation(
        _SHARED, "capability >= (8, 9)", "capability >= (8, 6)", "test_what_the_kernels_refuse"
    ),
    "no float8 on one that does": _mutation(
        _SHARED, "capability >= (8, 9)", "capability >= (9, 0)", "test_what_the_kernels_refuse"
    ),
}


if __name__ == "__main__":
    sys.exit(run(MUTATIONS, sys.argv[1:]))
