"""The chunks that a ported folder keeps a tensor in, and slices that are read from them.

Neither OCDBT nor zarr notices a byte that has changed in a value, and a checksum of a tensor says
nothing of a slice. So the manifest has one of every chunk, and to read a slice is to read and check
the chunks that it touches. Older folders have one per tensor: all of it is read, piece by piece.
"""

import itertools
import math
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pallas_paged.models.checkpoint import Slices, Tensor, numpy_dtype, size_of

CHUNK_BYTES = 4 << 20
"""The most of a chunk, but for axes of large prime factors, which would be cut into crumbs.

A slice reads up to one chunk more than it needs along each axis.
"""
_AT_ONCE = 8
"""Chunks that are asked for together."""
_NODES_BYTES = 100_000_000
"""Of OCDBT's index that are kept: it is read once, not once per tensor."""


class Checksums(NamedTuple):
    """What a manifest says of a tensor's bytes.

    Attributes:
      whole: CRC-32 of all of them.
      shape: of a chunk, or None where the manifest knows of no chunks.
      chunks: CRC-32 of each chunk, those along the last axis next to each other.
    """

    whole: int
    shape: tuple[int, ...] | None = None
    chunks: tuple[int, ...] = ()

    @classmethod
    def of(cls, value: np.ndarray) -> "Checksums":
        """Returns those of a tensor in chunks as Orbax cuts it."""
        shape = chunk_shape(value.shape, value.dtype.itemsize)
        sums = tuple(crc32(value[index]) for index in chunks_of(value.shape, shape))
        return cls(sums[0] if len(sums) == 1 else crc32(value), shape, sums)

    @classmethod
    def from_json(cls, entry: Any, shape: tuple[int, ...]) -> "Checksums":
        """Returns what an entry of a manifest says of a tensor of that shape.

        Raises:
          KeyError, TypeError, ValueError: it is damaged.
        """
        chunks = entry.get("chunks")
        if chunks is None:
            return cls(entry["crc32"])
        sums = cls(entry["crc32"], tuple(chunks["shape"]), tuple(chunks["crc32"]))
        if len(sums.chunks) != len(list(chunks_of(shape, tuple(chunks["shape"])))):
            raise ValueError(f"chunks of {chunks['shape']} in {shape} are not {len(sums.chunks)}")
        return sums

    def to_json(self) -> dict[str, Any]:
        """Returns the fields of an entry."""
        assert self.shape is not None, "new manifests have checksums of chunks"
        chunks = {"shape": list(self.shape), "crc32": list(self.chunks)}
        return {"crc32": self.whole, "chunks": chunks}


def crc32(value: np.ndarray, begin: int = 0) -> int:
    """Returns the CRC-32 of an array's bytes, behind those that gave the checksum `begin`."""
    return zlib.crc32(np.ascontiguousarray(value).reshape(-1).view(np.uint8), begin)


def chunk_bytes(shape: tuple[int, ...], itemsize: int) -> int:
    """Returns the size of chunks to ask Orbax for, see `CHUNK_BYTES`."""
    limit = CHUNK_BYTES
    while math.prod(_cut(shape, itemsize, limit)) * itemsize < min(
        CHUNK_BYTES // 16, math.prod(shape) * itemsize
    ):
        limit *= 2
    return limit


def chunk_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Returns the shape of the chunks that Orbax makes of an array."""
    return _cut(shape, itemsize, chunk_bytes(shape, itemsize))


def _cut(shape: tuple[int, ...], itemsize: int, limit: int) -> tuple[int, ...]:
    """Returns the shape of chunks that Orbax chooses for a size in bytes.

    The longest axis goes down to its next divisor until a chunk is small enough. Were it another,
    slices would still be right, and read more.
    """
    chunk = list(shape)
    while math.prod(chunk) * itemsize > limit:
        axis = chunk.index(max(chunk))
        smaller = range(1, chunk[axis])
        chunk[axis] = max(length for length in smaller if shape[axis] % length == 0)
    return tuple(chunk)


def chunks_of(shape: tuple[int, ...], chunk: tuple[int, ...]) -> Iterator[Slices]:
    """Yields where each chunk is in an array of that shape, in the order of its elements."""
    axes = (
        [slice(begin, min(begin + step, length)) for begin in range(0, length, step)]
        for length, step in zip(shape, chunk, strict=True)
    )
    return itertools.product(*axes)


class ChunkReader:
    """Reads slices of the arrays in an Orbax checkpoint that uses OCDBT and zarr, as ours do.

    TensorStore is asked itself: Orbax reads whole arrays, or slices into `jax.Array`s alone. No
    other process takes part.

    Args:
      params: folder of the checkpoint.
    """

    def __init__(self, params: Path):
        import tensorstore

        self._tensorstore = tensorstore
        self._base = {"driver": "file", "path": f"{params.absolute()}/"}
        nodes = {"cache_pool#nodes": {"total_bytes_limit": _NODES_BYTES}}
        self._context = tensorstore.Context(nodes)

    def read(
        self, tensor: Tensor, checksums: Checksums, slices: Sequence[Slices]
    ) -> list[np.ndarray]:
        """Returns slices of a tensor, made of chunks that are what their checksums say.

        No other chunk is read; with a checksum of the whole tensor alone, all of it is.

        Raises:
          ValueError: what is read is not what was ported, or TensorStore cannot read it.
        """
        store = self._open(tensor)
        found = [np.empty(size_of(index), numpy_dtype(tensor.dtype)) for index in slices]
        shape, expected = checksums.shape, checksums.chunks
        if shape is None:  # blocks of rows: their bytes are one after the other in the tensor's
            shape = (*store.chunk_layout.read_chunk.shape[:1], *tensor.shape[1:])
        chunks = list(chunks_of(tensor.shape, shape))
        of_chunks = [*zip(chunks, expected or itertools.repeat(None), strict=False)]
        if expected:
            of_chunks = [c for c in of_chunks if any(_common(c[0], index) for index in slices)]
        whole = 0
        for batch in itertools.batched(of_chunks, _AT_ONCE if expected else 1):
            reads = [store[chunk].read() for chunk, _ in batch]
            for (chunk, crc), pending in zip(batch, reads, strict=True):
                value = pending.result()
                whole = crc32(value, 0 if expected else whole)
                if crc is not None and crc != whole:
                    raise ValueError(f"a chunk of {tensor.name} has not the checksum of its port")
                for index, target in zip(slices, found, strict=True):
                    _copy(chunk, value, index, target)
        if not expected and whole != checksums.whole:
            raise ValueError(f"{tensor.name} has not the checksum it was ported with")
        return found

    def _open(self, tensor: Tensor) -> Any:
        kvstore = {
            "driver": "ocdbt",
            "base": self._base,
            "path": f"{tensor.name}/",
            "cache_pool": "cache_pool#nodes",
        }
        spec = {"driver": "zarr", "kvstore": kvstore}
        store = self._tensorstore.open(spec, open=True, read=True, context=self._context).result()
        found = (tuple(store.shape), store.dtype.name)
        if found != (tensor.shape, tensor.dtype):
            raise ValueError(f"{tensor.name} is {found}, ported was {tensor.dtype} {tensor.shape}")
        return store


def _common(one: Slices, other: Slices) -> Slices | None:
    """Returns what two slices of an array have in common, if they have."""
    both = tuple(
        slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(one, other, strict=True)
    )
    return both if all(axis.start < axis.stop for axis in both) else None


def _copy(chunk: Slices, value: np.ndarray, index: Slices, target: np.ndarray) -> None:
    """Copies what a chunk has of the slice `index` into that."""
    if (both := _common(chunk, index)) is not None:
        target[_within(both, index)] = value[_within(both, chunk)]


def _within(part: Slices, whole: Slices) -> Slices:
    """Returns where a slice of an array is in another slice of it."""
    return tuple(
        slice(a.start - b.start, a.stop - b.start) for a, b in zip(part, whole, strict=True)
    )
