"""From a Hugging Face folder to a ported one and back: what the programs `port` and `export` do."""

import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tqdm import tqdm

from pallas_paged.models.checkpoint import (
    TOKENIZER_FILES,
    HFCheckpoint,
    Tensor,
    numpy_dtype,
    read_json,
)
from pallas_paged.models.config import DTYPES
from pallas_paged.models.kv_scales import is_static_scale
from pallas_paged.models.loader import cast, load_config, open_checkpoint
from pallas_paged.models.matching import parameters
from pallas_paged.models.new_folder import new_folder
from pallas_paged.models.other_files import OtherFiles, copy_files, other_files
from pallas_paged.models.ported import (
    MANIFEST,
    PARAMS,
    PortedCheckpoint,
    is_ported,
    write_manifest,
    write_params,
)

_MB = 1e6


def port(hf_dir: Path, out: Path, dtype: str = "auto", *, overwrite: bool = False) -> str:
    """Ports the checkpoint in `hf_dir` to the folder `out`, which is whole when it appears.

    One tensor is in memory at a time.

    Args:
      hf_dir: a Hugging Face folder that `load_model` takes.
      out: the folder to make.
      dtype: "auto" keeps every tensor as it is; another is also written into the `config.json`.
        Static scales of KV caches are kept in either case.
      overwrite: whether `out` is replaced if it is a ported folder already.

    Returns:
      What was done, and the peak of this process's memory, in lines to print.

    Raises:
      FileNotFoundError: `hf_dir` or one of its files is missing.
      ValueError: the checkpoint does not load, its `config.json` is a link to elsewhere, `out`
        exists, or a value is too large for `dtype`.
    """
    begin = time.perf_counter()
    checkpoint = open_checkpoint(hf_dir)
    if not isinstance(checkpoint, HFCheckpoint):
        raise ValueError(f"--hf_dir={hf_dir} is a ported folder already; copy it as it is")
    parameters(hf_dir, checkpoint, load_config(hf_dir))
    tensors = checkpoint.tensors.values()
    if unsupported := [f"{t.name} ({t.dtype})" for t in tensors if t.dtype not in DTYPES]:
        raise ValueError(f"tensors of a dtype that is not supported: {', '.join(unsupported)}")
    if out.exists() and not overwrite:
        raise ValueError(f"--out={out} exists: give --overwrite to replace it, or another name")
    others = other_files(hf_dir)
    before = largest = 0

    with new_folder(out, may_replace=is_ported if overwrite else None) as folder:
        total = sum(_num_bytes(t, _dtype_of(t.name, dtype)) for t in tensors)
        with tqdm(total=total, unit="B", unit_scale=True, desc="port") as progress:

            def value(name: str) -> np.ndarray:
                nonlocal before, largest
                before = before or _peak_bytes()
                array = checkpoint.value(name)
                if (wanted := _dtype_of(name, dtype)) != "auto":
                    array = cast(name, array, numpy_dtype(wanted))
                largest = max(largest, array.nbytes)
                progress.update(array.nbytes)
                return array

            entries = write_params(folder, checkpoint.tensors, value)
        copy_files(hf_dir, others.along, folder)
        if dtype != "auto":
            _set_dtype(folder / "config.json", dtype)
        write_manifest(folder, entries)
    return (
        f"{out}: {len(entries)} tensors, {total / _MB:.1f} MB, in "
        f"{time.perf_counter() - begin:.1f} s\n{_about_files(others)}\n"
        f"peak memory {_peak_bytes() / _MB:.0f} MB, {before / _MB:.0f} MB of it before the first "
        f"tensor; the largest tensor has {largest / _MB:.1f} MB"
    )


def _about_files(others: OtherFiles) -> str:
    """Returns lines that say what went along."""
    lines = [f"copied: {', '.join(others.along)}"]
    if others.left:
        lines.append(f"left where they are: {', '.join(others.left)}")
    if not set(others.along).intersection(TOKENIZER_FILES):
        lines.append("no tokenizer files: the model takes token ids only")
    return "\n".join(lines)


def _set_dtype(config_file: Path, dtype: str) -> None:
    values = read_json(config_file)
    values["torch_dtype" if "torch_dtype" in values else "dtype"] = dtype
    config_file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _dtype_of(name: str, requested: str) -> str:
    """Returns the dtype that a tensor gets: "auto" for its own, which static scales keep."""
    return "auto" if is_static_scale(name) else requested


def _num_bytes(tensor: Tensor, requested: str) -> int:
    dtype = numpy_dtype(tensor.dtype if requested == "auto" else requested)
    return int(np.prod(tensor.shape, dtype=np.int64)) * dtype.itemsize


def _peak_bytes() -> int:
    """Returns the most memory that this program has had resident."""
    if sys.platform == "linux":  # whose ru_maxrss counts what the starting process had, too
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def export(checkpoint_dir: Path, out: Path, *, max_shard_bytes: int) -> str:
    """Writes the tensors of a ported folder as safetensors, with the files that it came with.

    Args:
      checkpoint_dir: the ported folder.
      out: the folder to make; it is whole when it appears.
      max_shard_bytes: of a safetensors file, as far as no single tensor is larger.

    Returns:
      What was done, in lines to print.

    Raises:
      FileNotFoundError: `checkpoint_dir` or its `config.json` is missing.
      ValueError: it is no ported folder or is damaged, or `out` exists.
    """
    checkpoint = open_checkpoint(checkpoint_dir)
    if not isinstance(checkpoint, PortedCheckpoint):
        raise ValueError(f"--checkpoint={checkpoint_dir} is no ported folder: it has no {MANIFEST}")
    parameters(checkpoint_dir, checkpoint, load_config(checkpoint_dir))
    others = other_files(checkpoint_dir, without=(PARAMS, MANIFEST))
    with new_folder(out) as folder:
        shards = _Shards(folder, max_shard_bytes)
        with tqdm(total=len(checkpoint.tensors), desc="export", unit="tensor") as progress:

            def take(name: str, value: np.ndarray) -> None:
                shards.add(name, value)
                progress.update()

            checkpoint.read(checkpoint.tensors, take)
        num_files, total = shards.finish()
        copy_files(checkpoint_dir, others.along, folder)
    return (
        f"{out}: {len(checkpoint.tensors)} tensors, {total / 1e6:.1f} MB, in {num_files} "
        f"safetensors file{'s' * (num_files > 1)}\n{_about_files(others)}"
    )


class _Shards:
    """Safetensors files in the making; one of them is held in memory."""

    def __init__(self, folder: Path, max_bytes: int):
        self._folder = folder
        self._max_bytes = max_bytes
        self._held: dict[str, np.ndarray] = {}
        self._names: list[list[str]] = []
        self._total = 0

    def add(self, name: str, value: np.ndarray) -> None:
        """Adds a tensor to this file, or where it would grow too large to the next."""
        held = sum(array.nbytes for array in self._held.values())
        if self._held and held + value.nbytes > self._max_bytes:
            self._write()
        self._held[name] = value
        self._total += value.nbytes

    def _write(self) -> None:
        file = self._folder / f"{len(self._names)}.safetensors"
        file.touch()
        mode = file.stat().st_mode  # save_file leaves one that the owner alone can read
        save_file(self._held, file, metadata={"format": "pt"})  # transformers takes no other
        file.chmod(mode)
        self._names.append(list(self._held))
        self._held.clear()

    def finish(self) -> tuple[int, int]:
        """Names the files and writes their index; returns their number and all tensors' bytes."""
        self._write()
        count = len(self._names)
        files = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        if count == 1:
            files = ["model.safetensors"]
        for index, file in enumerate(files):
            (self._folder / f"{index}.safetensors").rename(self._folder / file)
        if count > 1:
            weight_map = {
                name: file for file, names in zip(files, self._names, strict=True) for name in names
            }
            index_file = self._folder / "model.safetensors.index.json"
            values = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            index_file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        return count, self._total
