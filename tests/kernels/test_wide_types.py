"""Every dtype is named: with `jax_enable_x64` no operation of layer 1 computes in 64 bits.

The reference does, for one index. Its code is what the tables of interpreted kernels are of.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.attention_cases.arguments import AttentionSpec, build
from pallas_paged import (
    AttentionMetadata,
    KVCache,
    copy_blocks,
    gather_blocks,
    paged_attention,
    scatter_blocks,
    write_kv,
)
from pallas_paged import block_tables as bt
from tests.wide_types import wide_types

EVERYTHING = {"sliding_window": 7, "logits_soft_cap": 9.0, "alibi": True, "sinks": True}


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("query_lens", [None, (1, 4, 2)], ids=["decode", "mixed"])
@pytest.mark.parametrize(
    "options",
    [{}, EVERYTHING, {"cache_dtype": "int8"}],
    ids=["plain", "everything", "quantised"],
)
def test_attention(options, query_lens, deterministic):
    arguments = build(AttentionSpec("wide", (20, 9, 2), query_lens, **options))

    def attend(*arrays):
        return paged_attention(
            *arrays,
            **arguments.options,
            return_lse=True,
            deterministic=deterministic,
            implementation="xla",
        )

    assert wide_types(attend, *arguments.arrays) == set()


@pytest.mark.parametrize("dtype", ["float32", "int8", "float8_e4m3fn"])
def test_cache_operations(dtype):
    ids, rows = jnp.zeros(3, jnp.int32), jnp.zeros((3, 2, 16), jnp.bfloat16)

    def operations(cache, ids, rows):
        cache = write_kv(rows, rows, cache, ids, implementation="xla")
        blocks = gather_blocks(cache, ids, implementation="xla")
        cache = scatter_blocks(cache, ids, blocks, implementation="xla")
        return copy_blocks(cache, ids, ids, implementation="xla"), blocks

    assert wide_types(operations, KVCache.zeros(6, 2, 8, 16, dtype), ids, rows) == set()


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_block_tables(dtype):
    """Wider ids are looked at, and then 32 bits."""

    def verbs(rows, mask):
        state = bt.create(10, 3, 4, 4, jnp)
        needed = bt.num_blocks_needed(state, rows)
        state, result = bt.append(state, rows)
        state = bt.fork(state, rows, rows[::-1])
        state = bt.hold(state, rows)
        state = bt.release(bt.replace(state, rows, rows), rows)
        state = bt.truncate(bt.share(state, rows, rows[:, None]), rows)
        state = bt.drop_front(state, rows)
        metadata = AttentionMetadata.for_decode(state.tables, state.seq_lens, state.block_size)
        slots = bt.slot_mapping(state, rows, rows), bt.blocks_in_use(state)
        # Its leaves alone: in place of arrays, a state's own checks would find shapes.
        return jax.tree.leaves((bt.free(state, mask), result, needed, metadata, slots))

    with jax.enable_x64(True):
        rows, mask = jnp.array([0, 1, 2], dtype), jnp.ones(3, bool)
        results = jax.tree.leaves(jax.eval_shape(verbs, rows, mask))
    assert {result.dtype.name for result in results} == {"int32", "bool"}
    if dtype is np.int32:
        assert wide_types(verbs, rows, mask) == set()
