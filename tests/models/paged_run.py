"""Runs a model through a paged KV cache, without an engine."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_paged.kv_cache import AttentionMetadata, KVCache
from pallas_paged.models import CausalLM, ModelConfig

BLOCK_SIZE = 4
MAX_LEN = 128


def nan_caches(config: ModelConfig, num_blocks: int, dtype: Any) -> tuple[KVCache, ...]:
    """Returns caches of which every slot is poisoned; in integers, by its scale."""

    def poisoned(array: jax.Array) -> jax.Array:
        return jnp.full_like(array, jnp.nan) if jnp.issubdtype(array.dtype, jnp.floating) else array

    specs = config.cache_specs(BLOCK_SIZE, dtype)
    return tuple(jax.tree.map(poisoned, spec.zeros(num_blocks)) for spec in specs)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=5)
def step(
    graph: Any, max_query_len: int, state: Any, input_ids: Any, places: Any, kv_caches: Any
) -> Any:
    """Returns the logits of all tokens, and the caches: as the engine calls a model.

    `places` are the arrays of an `AttentionMetadata`, by name.
    """
    model = nnx.merge(graph, state)
    metadata = AttentionMetadata(**places, max_query_len=max_query_len)
    hidden, kv_caches = model(input_ids, metadata, kv_caches)
    return model.compute_logits(hidden), kv_caches


class PagedRun:
    """B sequences in one pool of shuffled blocks, each with room for `MAX_LEN` tokens."""

    def __init__(self, model: CausalLM, num_seqs: int, dtype: Any = jnp.float32):
        self.graph, self.state = nnx.split(model)
        blocks_per_seq = MAX_LEN // BLOCK_SIZE
        blocks = 1 + np.random.default_rng(0).permutation(num_seqs * blocks_per_seq)
        self.block_tables = blocks.reshape(num_seqs, blocks_per_seq).astype(np.int32)
        self.kv_caches = nan_caches(model.config, 1 + len(blocks), dtype)
        self.seq_lens = np.zeros(num_seqs, np.int32)

    def __call__(self, new_tokens: Sequence[np.ndarray], max_query_len: int) -> list[np.ndarray]:
        """Appends tokens to each sequence and returns their logits, `[new tokens, V]` each.

        A call with the same `max_query_len` compiles nothing; rows with no new tokens are padding.
        """
        counts = np.array([len(tokens) for tokens in new_tokens], np.int32)
        starts, self.seq_lens = self.seq_lens, self.seq_lens + counts
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        input_ids, positions, slots = np.zeros((3, len(counts) * max_query_len), np.int32)
        for row, tokens in enumerate(new_tokens):
            at = slice(offsets[row], offsets[row + 1])
            place = np.arange(starts[row], self.seq_lens[row])
            input_ids[at], positions[at] = tokens, place
            blocks = self.block_tables[row, place // BLOCK_SIZE]
            slots[at] = blocks * BLOCK_SIZE + place % BLOCK_SIZE
        places = {
            "positions": positions,
            "slot_mapping": slots,
            "block_tables": self.block_tables * (counts > 0)[:, None],
            "seq_lens": self.seq_lens * (counts > 0),
            "query_start_loc": offsets,
        }
        logits, self.kv_caches = step(
            self.graph, max_query_len, self.state, input_ids, places, self.kv_caches
        )
        return np.split(np.asarray(logits), offsets[1:])[:-1]

    def in_chunks(self, sequences: Sequence[np.ndarray], chunk: int) -> list[np.ndarray]:
        """Appends whole sequences, at most `chunk` tokens of each at a time; returns all logits."""
        parts = [
            self([tokens[at : at + chunk] for tokens in sequences], chunk)
            for at in range(0, max(map(len, sequences)), chunk)
        ]
        return [np.concatenate(of_row) for of_row in zip(*parts, strict=True)]
