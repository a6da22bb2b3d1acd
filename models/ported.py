"""Ported folders: the tensors of a Hugging Face folder as an Orbax checkpoint.

    params/       the checkpoint: a tree of arrays, a tensor's name split at its dots
    port.json     written last: every tensor's dtype, shape and CRC-32, and those of its chunks
                  (see `pallas_paged.models.chunks`), every file's size
    config.json and all other files but weights, as in the source (see `other_files`)

Orbax is handed one array at a time, in both directions, through a type handler of ours. To anybody
else `params` is a plain checkpoint, such as `orbax.checkpoint.PyTreeCheckpointer().restore` reads.
Slices of arrays are read by TensorStore, which Orbax reads with.
"""

import contextlib
import functools
import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pallas_paged.models.checkpoint import Slices, Take, Tensor, read_json
from pallas_paged.models.chunks import Checksums, ChunkReader, chunk_bytes, crc32

PARAMS, MANIFEST = "params", "port.json"
_FORMAT = 1


def is_ported(folder: Path) -> bool:
    """Returns whether the folder holds a whole port.

    Raises:
      ValueError: it holds a part of one.
    """
    if (folder / MANIFEST).is_file():
        return True
    if any(folder.glob(f"{PARAMS}*/")):
        raise ValueError(
            f"{folder} is an incomplete port: it has {PARAMS} and no {MANIFEST}, which is written "
            "last. Port the checkpoint again, or copy the folder again"
        )
    return False


class PortedCheckpoint:
    """The tensors of a ported folder.

    Raises:
      ValueError: a file is missing or has not the size that it had; all are listed.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        manifest = read_json(folder / MANIFEST)
        if manifest.get("format") != _FORMAT:
            raise ValueError(
                f"{folder / MANIFEST}: format={manifest.get('format')!r} is not supported, only "
                f"{_FORMAT}: port the checkpoint again"
            )
        try:
            self.tensors = {
                name: Tensor(name, tuple(entry["shape"]), entry["dtype"])
                for name, entry in manifest["tensors"].items()
            }
            self._checksums = {
                name: Checksums.from_json(entry, self.tensors[name].shape)
                for name, entry in manifest["tensors"].items()
            }
            sizes = dict(manifest["files"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{folder / MANIFEST} is damaged ({error!r}): port again") from error
        found = _sizes(folder)
        if differing := [name for name, size in sizes.items() if found.get(name) != size]:
            raise self._damaged(
                "; ".join(
                    f"{name} has {found[name]} bytes instead of {sizes[name]}"
                    if name in found
                    else f"{name} is missing"
                    for name in differing
                )
            )

    def read(self, names: Collection[str], take: Take) -> None:
        """See `Checkpoint.read`; every value is held against its checksum."""
        wanted = set(names)
        failure: list[Exception] = []

        def checked(name: str, value: np.ndarray) -> None:
            wanted.remove(name)
            try:
                self._check(name, value)
                take(name, value)
            except Exception as error:
                failure.append(error)
                raise

        try:
            _restore(self._folder / PARAMS, frozenset(names), checked)
        except Exception as error:
            if failure:
                raise failure[0] from None
            raise self._damaged(f"Orbax cannot read {PARAMS} ({error})") from error
        if wanted:
            raise self._damaged(f"{PARAMS} has no {', '.join(sorted(wanted))}")

    def read_slices(self, name: str, slices: Sequence[Slices]) -> list[np.ndarray]:
        """See `Checkpoint.read_slices`; what is read is held against its checksums."""
        try:
            return self._reader.read(self.tensors[name], self._checksums[name], slices)
        except Exception as error:  # of whichever kinds TensorStore has
            raise self._damaged(f"{name} cannot be read ({error})") from error

    @functools.cached_property
    def _reader(self) -> ChunkReader:
        return ChunkReader(self._folder / PARAMS)

    def _check(self, name: str, value: np.ndarray) -> None:
        tensor = self.tensors[name]
        if (value.shape, value.dtype.name) != (tensor.shape, tensor.dtype):
            raise self._damaged(
                f"{name} is {value.dtype.name} {value.shape}, ported was {tensor.dtype} "
                f"{tensor.shape}"
            )
        if crc32(value) != self._checksums[name].whole:
            raise self._damaged(f"{name} has not the checksum it was ported with")

    def _damaged(self, what: str) -> ValueError:
        return ValueError(f"{self._folder} is damaged: {what}. Copy it or port it again")


def write_params(
    folder: Path, names: Collection[str], value: Callable[[str], np.ndarray]
) -> dict[str, dict[str, Any]]:
    """Writes the tensors `names` as the Orbax checkpoint of a ported folder.

    Args:
      folder: a folder without one.
      names: of the tensors, no one a parent of another.
      value: returns a tensor; called once for each, and the value is dropped before the next call.

    Returns:
      For `write_manifest`: what it says of each tensor.
    """
    entries: dict[str, dict[str, Any]] = {}

    def read(name: str) -> np.ndarray:
        array = value(name)
        entries[name] = {
            "dtype": array.dtype.name,
            "shape": list(array.shape),
            **Checksums.of(array).to_json(),
        }
        return array

    import orbax.checkpoint as ocp  # about a second to import

    tree: dict[str, Any] = {}
    for name in names:
        _insert(tree, name, _Leaf(name))
    with _checkpointer(_Leaf, read=read) as checkpointer:
        checkpointer.save((folder / PARAMS).absolute(), args=ocp.args.PyTreeSave(tree))
    return entries


def write_manifest(folder: Path, tensors: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes the file that makes a folder a whole port; nothing in `params` may change then."""
    manifest = {"format": _FORMAT, "files": _sizes(folder), "tensors": tensors}
    partial = folder / f"{MANIFEST}.partial"
    partial.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    partial.rename(folder / MANIFEST)


def _sizes(folder: Path) -> dict[str, int]:
    """Returns the size in bytes of each file in the Orbax checkpoint, by its path."""
    files = (folder / PARAMS).rglob("*")
    return {str(f.relative_to(folder)): f.stat().st_size for f in files if f.is_file()}


def _insert(tree: dict[str, Any], name: str, leaf: Any) -> None:
    *parents, last = name.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[last] = leaf


def _restore(params: Path, names: Collection[str], take: Take) -> None:
    import orbax.checkpoint as ocp

    with _checkpointer(np.ndarray, names=names, take=take) as checkpointer:
        checkpointer.restore(params.absolute(), args=ocp.args.PyTreeRestore())


class _Leaf:
    """Stands for an array in the tree that is saved."""

    def __init__(self, name: str):
        self.name = name


class _OneByOne:
    """An Orbax type handler that has one array in memory at a time.

    It writes and reads as Orbax's own handler of NumPy arrays, which it is given, but asks for a
    value only when the one before is written, and hands a value on before it reads the next.
    """

    def __init__(
        self,
        arrays: Any,
        *,
        read: Callable[[str], np.ndarray] | None = None,
        names: Collection[str] = (),
        take: Take | None = None,
    ):
        self._arrays = arrays
        self._read = read
        self._names = names
        self._take = take

    def typestr(self) -> str:
        return self._arrays.typestr()

    async def metadata(self, infos: Sequence[Any]) -> Sequence[Any]:
        return await self._arrays.metadata(infos)

    async def serialize(
        self, values: Sequence[_Leaf], infos: Sequence[Any], args: Sequence[Any]
    ) -> Sequence[Any]:
        assert self._read is not None
        for leaf, info, arg in zip(values, infos, args, strict=True):
            value = self._read(leaf.name)
            arg.chunk_byte_size = chunk_bytes(value.shape, value.itemsize)
            for future in await self._arrays.serialize([value], [info], [arg]):
                future.result()
        return []

    async def deserialize(self, infos: Sequence[Any], args: Any = None) -> Sequence[Any]:
        assert self._take is not None
        for info in infos:
            if info.name in self._names:
                (value,) = await self._arrays.deserialize([info])
                self._take(info.name, value)
        return [None] * len(infos)

    def finalize(self, directory: Any) -> None:
        self._arrays.finalize(directory)


@contextlib.contextmanager
def _checkpointer(kind: type, **options: Any) -> Iterator[Any]:
    """Yields an Orbax checkpointer that handles leaves of type `kind` one by one."""
    import jax
    import orbax.checkpoint as ocp

    handlers = ocp.type_handlers
    registry = handlers.create_type_handler_registry(
        (jax.Array, handlers.ArrayHandler()),  # without it Orbax warns that it is missing
        (kind, _OneByOne(handlers.NumpyHandler(deepcopy_host_arrays=False), **options)),
    )
    # Weights hardly compress, and chunks as they are can be read by any part.
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(max(level, logging.WARNING))  # else it has a line to say about every array
    try:
        with ocp.Checkpointer(
            ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False)
        ) as checkpointer:
            yield checkpointer
    finally:
        log.setLevel(level)
