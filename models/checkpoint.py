"""What a model folder holds before it is a model: files, and tensors by name.

A checkpoint is a Hugging Face folder (here) or a ported one (`pallas_paged.models.ported`); to the
loader both are names, shapes and values.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import safetensors

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)
"""A folder with none of them has no tokenizer."""

_HUB_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*/[A-Za-z0-9_-][A-Za-z0-9._-]*")

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

_MAPPED_BYTES = 64 << 20
"""Of a file's tensor that are mapped at once where a slice of it is read."""

Slices = tuple[slice, ...]
"""Of an array, with a start and a stop for each axis, and no step."""

Take = Callable[[str, np.ndarray], object]
"""Called with a tensor's name and its value, which it may keep."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a checkpoint, without its value.

    Attributes:
      name: in the checkpoint.
      shape: of the value.
      dtype: numpy's name of the type, or for types we have none for the file format's.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str


class Checkpoint(Protocol):
    """Tensors by name, in a folder."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All of them by name."""

    def read(self, names: Collection[str], take: Take) -> None:
        """Calls `take` once with each of the tensors `names`; one value is in memory at a time.

        Raises:
          ValueError: the files are damaged; what `take` raises.
        """

    def read_slices(self, name: str, slices: Sequence[Slices]) -> list[np.ndarray]:
        """Returns slices of one tensor; the whole of it is not in memory, unless they are that.

        Raises:
          ValueError: the files are damaged, as far as what is read of them can show it.
        """


def model_file(path: str | os.PathLike[str], name: str) -> Path:
    """Returns an existing file of the model folder.

    Raises:
      FileNotFoundError: no such folder, or no such file in it.
    """
    folder = Path(path)
    if not folder.is_dir():
        hub_name = os.fspath(path) if _HUB_NAME.fullmatch(os.fspath(path)) else "ORG/NAME"
        raise FileNotFoundError(
            f"no folder {folder}: model must be a local folder, nothing is downloaded. To get one "
            f"from the Hugging Face hub: hf download {hub_name} --local-dir FOLDER (a program of "
            "the package huggingface_hub)"
        )
    file = folder / name
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no {name}: it has {sorted(os.listdir(folder))}")
    return file


def read_json(file: Path) -> dict[str, Any]:
    """Returns the JSON object in a file; `ValueError` where there is none."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold a JSON object, not {type(values).__name__}")
    return values


class HFCheckpoint:
    """The safetensors files of a Hugging Face folder.

    Raises:
      FileNotFoundError: the folder has no safetensors files, or not all that its index names.
      ValueError: a file is truncated or corrupt, or the index and the files disagree.
    """

    def __init__(self, folder: Path):
        self.tensors: dict[str, Tensor] = {}
        self._files: dict[str, Path] = {}
        single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
        if single.is_file():
            self._scan(single)
            return
        if not index.is_file():
            raise FileNotFoundError(
                f"{folder} has neither model.safetensors nor {index.name}: it has "
                f"{sorted(os.listdir(folder))}. Weights in another format must be saved as "
                "safetensors first (transformers' save_pretrained does)"
            )
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(file, str) for file in weight_map.values()
        ):
            raise ValueError(f"{index} has no object 'weight_map' of tensor names and file names")
        shards = sorted(set(weight_map.values()))
        if missing := [shard for shard in shards if not (folder / shard).is_file()]:
            raise FileNotFoundError(f"{index} names files that are missing: {', '.join(missing)}")
        for shard in shards:
            self._scan(folder / shard)
        in_files = {(name, file.name) for name, file in self._files.items()}
        if differing := sorted(in_files ^ set(weight_map.items())):
            raise ValueError(f"{index} and its files disagree on (tensor, file): {differing}")

    def _scan(self, file: Path) -> None:
        """Adds what the header of a file says."""
        with _opened(file) as opened:
            for name in opened.keys():  # noqa: SIM118
                entry = opened.get_slice(name)
                dtype = _DTYPES.get(entry.get_dtype(), entry.get_dtype())
                self.tensors[name] = Tensor(name, tuple(entry.get_shape()), dtype)
                self._files[name] = file

    def value(self, name: str) -> np.ndarray:
        """Returns one tensor; `ValueError` if its file has been damaged since."""
        # A file is mapped for one tensor at a time: what of it is resident goes with the mapping.
        with _opened(self._files[name]) as opened:
            return opened.get_tensor(name)

    def read(self, names: Collection[str], take: Take) -> None:
        """See `Checkpoint.read`."""
        for name in names:
            take(name, self.value(name))

    def read_slices(self, name: str, slices: Sequence[Slices]) -> list[np.ndarray]:
        """See `Checkpoint.read_slices`; safetensors files have no checksums."""
        tensor = self.tensors[name]
        if not tensor.shape:
            return [self.value(name) for _ in slices]
        found = [np.empty(size_of(index), numpy_dtype(tensor.dtype)) for index in slices]
        for index, value in zip(slices, found, strict=True):
            # Columns lie all over the file: of the pages between them few are mapped at a time.
            for rows in row_blocks(tensor, index[0], _MAPPED_BYTES):
                with _opened(self._files[name]) as opened:
                    begin = index[0].start
                    target = value[rows.start - begin : rows.stop - begin]
                    target[...] = opened.get_slice(name)[(rows, *index[1:])]
        return found


def numpy_dtype(name: str) -> np.dtype:
    """Returns the NumPy type with a name of `DTYPES`, bfloat16 among them."""
    return np.dtype(getattr(ml_dtypes, name, name))


def size_of(index: Slices) -> tuple[int, ...]:
    """Returns the shape of such a slice."""
    return tuple(axis.stop - axis.start for axis in index)


def row_blocks(tensor: Tensor, rows: slice, num_bytes: int) -> Iterator[slice]:
    """Yields the rows of a tensor in blocks of so many bytes of it, or of one row."""
    of_row = math.prod(tensor.shape[1:]) * numpy_dtype(tensor.dtype).itemsize
    step = max(num_bytes // max(of_row, 1), 1)
    for begin in range(rows.start, rows.stop, step):
        yield slice(begin, min(begin + step, rows.stop))


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safetensors.safe_open(file, framework="np") as tensors:
            yield tensors
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{file} is truncated or not a safetensors file ({error}): copy it again"
        ) from error
