"""Breaks the reading of shared prefixes at once, in attention and in the engine, on purpose.

python -m tests.engine.mutate_cascade            # all of them, about half a minute each
python -m tests.engine.mutate_cascade sinks ...  # some, by name
"""

import sys

from tests.mutations import Mutation, run

_OP = "pallas_paged/ops/attention/cascade.py"
_CHECKS = "pallas_paged/ops/attention/checks.py"
_FIND = "pallas_paged/engine/core/shared_prefix.py"
_BUCKETS = "pallas_paged/engine/core/buckets.py"
_PLANNER = "pallas_paged/engine/core/planner.py"
_TESTS = "tests/kernels/test_cascade.py"
_ENGINE = "tests/engine/test_shared_prefix.py"

MUTATIONS = {
    "sinks in both parts": Mutation(
        _OP,
        "of_prefix, lse_of_prefix = attend(rows, step, slopes, None)",
        "sinks = None if sinks is None else jnp.tile(sinks, num_together)\n"
        "    of_prefix, lse_of_prefix = attend(rows, step, slopes, sinks)",
        _TESTS,
    ),
    "slopes of other heads": Mutation(
        _OP,
        "heads = jnp.broadcast_to(alibi_slopes,",
        "heads = jnp.broadcast_to(alibi_slopes[::-1],",
        _TESTS,
    ),
    "distances from the prefix's end": Mutation(
        _OP, "distances = (length - 1 - positions)", "distances = (0 * positions)", _TESTS
    ),
    "heads of another KV head": Mutation(
        _OP,
        "    heads = jnp.swapaxes(heads, 1, 2)\n    return",
        "    return",
        _TESTS,
    ),
    "lengths with the prefix": Mutation(
        _OP, "seq_lens=metadata.seq_lens - gone * block_size", "seq_lens=metadata.seq_lens", _TESTS
    ),
    "tables with the prefix": Mutation(
        _OP,
        "columns = jnp.arange(width, dtype=jnp.int32)[None] + gone[:, None]",
        "columns = jnp.arange(width, dtype=jnp.int32)[None] + 0 * gone[:, None]",
        _TESTS,
    ),
    "those without it too": Mutation(
        _OP,
        "is_shared = prefix.is_shared[sequences] & is_real & (prefix.num_blocks > 0)",
        "is_shared = is_real",
        _TESTS,
    ),
    "an empty prefix too": Mutation(
        _OP, " & is_real & (prefix.num_blocks > 0)", " & is_real", _TESTS
    ),
    "sums of equal weight": Mutation(
        _OP, "jax.nn.sigmoid(lse - other_lse)", "jax.nn.sigmoid(0 * lse)", _TESTS
    ),
    "some rows without the prefix": Mutation(
        _OP, "(rows[:-1] * num_together < num_shared)", "(rows[:-1] < 1)", _TESTS
    ),
    "a prefix behind the query": Mutation(
        _CHECKS, "prefix.is_shared & has_room", "prefix.is_shared", _TESTS
    ),
    "blocks behind the query": Mutation(
        _FIND, "batch.starts // self._memory.block_size", "batch.starts // 1", _ENGINE
    ),
    "the null block": Mutation(
        _FIND,
        "(piece == piece[0]).all(axis=0) & (piece[0] != GIVEN_BACK)",
        "(piece == piece[0]).all(axis=0)",
        _ENGINE,
    ),
    "the first that is found": Mutation(
        _FIND, "saved >= MIN_SAVED and saved > most", "saved >= MIN_SAVED and not most", _ENGINE
    ),
    "what has changed forgotten": Mutation(
        _FIND, "            return not len(changed)\n", "            return True\n", _ENGINE
    ),
    "rows that have changed not looked at": Mutation(
        _FIND, "(tables[sharing, :count] == tables[self._found.row, :count]).all()", "True", _ENGINE
    ),
    "others in the same rows": Mutation(
        _FIND, "np.array_equal(batch.numbers, self._numbers) and ", "", _ENGINE
    ),
    "never": Mutation(
        _BUCKETS,
        "shares_prefix &= bool(self.sharing_seqs) and not is_full",
        "shares_prefix &= False",
        _ENGINE,
    ),
    "of another row": Mutation(
        _PLANNER, "x.prefix.prefix_row[0] = prefix.row", "x.prefix.prefix_row[0] = 15", _ENGINE
    ),
    "everyone's": Mutation(
        _PLANNER,
        "x.prefix.shares_prefix[:B] = prefix.is_shared",
        "x.prefix.shares_prefix[:B] = 1",
        _ENGINE,
    ),
}


if __name__ == "__main__":
    sys.exit(run(MUTATIONS, sys.argv[1:]))
