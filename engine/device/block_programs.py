"""The compiled programs that copy whole blocks: all layers in one launch, a few padded sizes."""

import bisect
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from pallas_paged.engine.device.placement import BY_HEAD, DEFAULT_DEVICE, WHOLE, Placement
from pallas_paged.engine.kv.host_pool import BlockMove, chunk_sizes
from pallas_paged.engine.kv.sharing import CopyPairs
from pallas_paged.kv_cache import NULL_BLOCK, KVCache
from pallas_paged.ops.block_copy.api import copy_blocks
from pallas_paged.ops.block_transfer.api import gather_blocks, scatter_blocks

Caches = tuple[KVCache, ...]

KINDS = ("copy", "gather", "scatter")
"""What the programs do."""


class BlockPrograms:
    """Copies between blocks of the KV caches, and to host memory and back.

    A compiled program refuses inputs of any other shape or dtype, so nothing compiles by accident.

    Attributes:
      num_traces: how often each (program, number of blocks) was traced.
    """

    def __init__(
        self,
        kv_caches: Caches,
        max_num_seqs: int,
        *,
        swaps: bool,
        implementation: str | None = None,
        placement: Placement = DEFAULT_DEVICE,
    ):
        """Takes shapes and dtypes from `kv_caches`; a step copies fewer than `max_num_seqs`.

        `swaps` tells whether `gather` and `scatter` are compiled ahead; `implementation` is that of
        all three operations; `placement` is that of the caches, by default JAX's default device.
        """
        self._implementation = implementation
        self.num_traces: dict[tuple[str, int], int] = {}
        self._placement = placement
        self._caches = placement.cache_shapes(kv_caches)
        self._copy_sizes = _powers(4, max_num_seqs)
        num_blocks = jax.tree.leaves(kv_caches)[0].shape[0]
        self._chunk_sizes = chunk_sizes(num_blocks - 1) if swaps else ()
        self._compiled: dict[tuple[str, int], jax.stages.Compiled] = {}

    def copy(self, kv_caches: Caches, pairs: CopyPairs) -> Caches:
        """Copies `pairs.src` to `pairs.dst` in every layer; donates `kv_caches`."""
        size = self._copy_sizes[bisect.bisect_left(self._copy_sizes, len(pairs.src))]
        src, dst = (self._blocks(blocks, size) for blocks in pairs)
        return self._program("copy", size)(kv_caches, src, dst)

    def swap_out(self, kv_caches: Caches, move: BlockMove) -> Caches:
        """Returns blocks of every layer in host memory; copies in one launch, without waiting."""
        size = move.chunk.num_blocks
        gathered = self._program("gather", size)(kv_caches, self._blocks(move.block_ids, size))
        return self._placement.moved(gathered, self._placement.host_blocks)

    def swap_in(self, kv_caches: Caches, move: BlockMove, chunk: Caches) -> Caches:
        """Copies blocks of every layer back from what `swap_out` returned; donates `kv_caches`."""
        size = move.chunk.num_blocks
        blocks = self._placement.moved(chunk, self._placement.kv_caches)
        ids = self._blocks(move.block_ids, size)
        return self._program("scatter", size)(kv_caches, ids, blocks)

    def names(self) -> list[tuple[str, int]]:
        """Returns every program that copies may run: what it does, and to how many blocks."""
        moves = [(name, size) for size in self._chunk_sizes for name in ("gather", "scatter")]
        return [("copy", size) for size in self._copy_sizes] + moves

    def adopt(self, compiled: Mapping[tuple[str, int], jax.stages.Compiled]) -> None:
        """Takes programs that were compiled elsewhere, for the same arguments and devices."""
        self._compiled.update(compiled)

    def compile(self) -> None:
        """Compiles every program ahead."""
        for name, size in self.names():
            self._program(name, size)

    def _program(self, name: str, size: int) -> Callable:
        if (name, size) not in self._compiled:
            lowered = self.lower(name, size)
            with self._placement.as_target():
                self._compiled[name, size] = lowered.compile()
        return self._compiled[name, size]

    def lower(self, name: str, size: int) -> jax.stages.Lowered:
        """Traces one of the programs of `names`."""
        with self._placement.as_target():
            return self._lower(name, size)

    def _lower(self, name: str, size: int) -> jax.stages.Lowered:
        self.num_traces[name, size] = self.num_traces.get((name, size), 0) + 1
        ids = self._placement.input_shapes(jax.ShapeDtypeStruct((size,), jnp.int32))
        copy, gather, scatter = (
            self._placement.per_device(
                functools.partial(function, implementation=self._implementation), specs, BY_HEAD
            )
            for function, specs in (
                (_copy, (BY_HEAD, WHOLE, WHOLE)),
                (_gather, (BY_HEAD, WHOLE)),
                (_scatter, (BY_HEAD, WHOLE, BY_HEAD)),
            )
        )
        if name == "copy":
            return jax.jit(copy, donate_argnums=0).lower(self._caches, ids, ids)
        if name == "gather":
            return jax.jit(gather).lower(self._caches, ids)
        blocks = self._placement.cache_shapes(jax.eval_shape(gather, self._caches, ids))
        return jax.jit(scatter, donate_argnums=0).lower(self._caches, ids, blocks)

    def _blocks(self, block_ids: np.ndarray, size: int) -> np.ndarray | jax.Array:
        """Returns i32[`size`], blocks and padding, where a program takes them from."""
        padded = _padded(block_ids, size)
        # A program on one device takes the host's arrays as they are, which is faster.
        return padded if self._placement.num_devices == 1 else self._placement.put_inputs(padded)


def _copy(
    kv_caches: Caches, src: jax.Array, dst: jax.Array, *, implementation: str | None
) -> Caches:
    return tuple(
        copy_blocks(cache, src, dst, implementation=implementation, promise_in_bounds=True)
        for cache in kv_caches
    )


def _gather(kv_caches: Caches, block_ids: jax.Array, *, implementation: str | None) -> Caches:
    return tuple(
        gather_blocks(cache, block_ids, implementation=implementation, promise_in_bounds=True)
        for cache in kv_caches
    )


def _scatter(
    kv_caches: Caches, block_ids: jax.Array, blocks: Caches, *, implementation: str | None
) -> Caches:
    return tuple(
        scatter_blocks(
            cache, block_ids, part, implementation=implementation, promise_in_bounds=True
        )
        for cache, part in zip(kv_caches, blocks, strict=True)
    )


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
