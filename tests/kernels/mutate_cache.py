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
        _WRITE, "parts = zip((k_ref, v_ref),", "parts = zip((v_ref, k_ref),", "test_write"
    ),
    "the next token's slot": _mutation(
        _WRITE, "slots[token] % block_size", "(slots[token] + 1) % block_size", "test_write"
    ),
    "the null block written": _mutation(
        _WRITE, "@pl.when(block != NULL_BLOCK)", "@pl.when(block >= NULL_BLOCK)", "test_write"
    ),
    "zeros": _mutation(_WRITE, "x = load(row, layout)", "x = 0 * load(row, layout)", "test_write"),
    "no scale": _mutation(_WRITE, "            store(scales, scale)\n", "", "test_write"),
    "a wrong scale": _mutation(
        _WRITE, "store(scales, scale)", "store(scales, 2 * scale)", "test_write"
    ),
    "another head's scale": _mutation(
        _WRITE,
        "scale.at[block, head, offset]",
        "scale.at[block, 0, offset]",
        "test_write",
    ),
    "one head for all": _mutation(
        _WRITE, "write_heads(x.at[head], cache", "write_heads(x.at[0], cache", "test_write"
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
