"""The compiled programs that copy whole blocks: all layers in one launch, a few padded sizes."""

import bisect
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pallas_paged.engine.groups import CopyPairs
from pallas_paged.kv_cache import NULL_BLOCK, KVCache
from pallas_paged.ops.block_copy.api import copy_blocks

Caches = tuple[KVCache, ...]


class BlockPrograms:
    """Copies between blocks of the KV caches.

    A compiled program refuses inputs of any other shape or dtype, so nothing compiles by accident.

    Attributes:
      num_traces: how often each (program, number of blocks) was traced.
    """

    def __init__(self, kv_caches: Caches, max_num_seqs: int):
        """Takes shapes and dtypes from `kv_caches`; a step copies fewer than `max_num_seqs`."""
        self.num_traces: dict[tuple[str, int], int] = {}
        self._caches = jax.eval_shape(lambda: kv_caches)
        self._copy_sizes = _powers(4, max_num_seqs)
        self._compiled: dict[tuple[str, int], jax.stages.Compiled] = {}

    def copy(self, kv_caches: Caches, pairs: CopyPairs) -> Caches:
        """Copies `pairs.src` to `pairs.dst` in every layer; donates `kv_caches`."""
        size = self._copy_sizes[bisect.bisect_left(self._copy_sizes, len(pairs.src))]
        src, dst = (_padded(blocks, size) for blocks in pairs)
        return self._program("copy", size)(kv_caches, src, dst)

    def compile(self) -> None:
        """Compiles every program ahead."""
        for size in self._copy_sizes:
            self._program("copy", size)

    def _program(self, name: str, size: int) -> Callable:
        if (name, size) not in self._compiled:
            self._compiled[name, size] = self._lower(name, size).compile()
        return self._compiled[name, size]

    def _lower(self, name: str, size: int) -> jax.stages.Lowered:
        def copy(kv_caches: Caches, src: jax.Array, dst: jax.Array) -> Caches:
            self.num_traces[name, size] = self.num_traces.get((name, size), 0) + 1
            return tuple(copy_blocks(cache, src, dst) for cache in kv_caches)

        ids = jax.ShapeDtypeStruct((size,), jnp.int32)
        return jax.jit(copy, donate_argnums=0).lower(self._caches, ids, ids)


def _padded(blocks: np.ndarray, size: int) -> np.ndarray:
    padded = np.full(size, NULL_BLOCK, np.int32)
    padded[: len(blocks)] = blocks
    return padded


def _powers(base: int, last: int) -> tuple[int, ...]:
    """Returns base, base**2, ... and `last`."""
    sizes = []
    size = base
    while size < last:
        sizes.append(size)
        size *= base
    return (*sizes, last)
