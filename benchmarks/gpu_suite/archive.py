"""What a run leaves behind: few files of bounded size, which the next run can begin with."""

import io
import pathlib
import tarfile
import zlib
from collections.abc import Collection, Iterable
from typing import NamedTuple

from benchmarks.gpu_suite import programs

MAX_FILE_BYTES = 15 << 20
"""Of each archive."""
MAX_PROGRAM_ARCHIVES = 2
_MAX_LOG_BYTES = 200_000
_MAX_RESULT_BYTES = 2 << 20


class Left(NamedTuple):
    """What an archive could not hold.

    Attributes:
      files: how many files of compiled programs and caches that were left out.
      num_bytes: their size.
    """

    files: int
    num_bytes: int


def write(out: pathlib.Path, work: pathlib.Path, keep: Collection[str]) -> Left:
    """Writes `results.tar.gz` and `programs-1.tar`, ... of a work folder.

    Args:
      out: folder for the archives.
      work: with results, logs, programs and the compilers' caches.
      keep: names of the files of programs that are wanted; others are of older sources.
    """
    out.mkdir(parents=True, exist_ok=True)
    _write(out / "results.tar.gz", _results(work), work)
    files = [*_caches(work), *(p for p in _files(work / "programs") if p.name in keep)]
    parts, left = _parts(files)
    for number, part in enumerate(parts, 1):
        _write(out / f"programs-{number}.tar", ((path, path.read_bytes()) for path in part), work)
    for number in range(len(parts) + 1, MAX_PROGRAM_ARCHIVES + 1):
        (out / f"programs-{number}.tar").unlink(missing_ok=True)
    return Left(len(left), sum(path.stat().st_size for path in left))


def read(previous: pathlib.Path, work: pathlib.Path) -> None:
    """Unpacks the archives of an earlier run into a work folder.

    Raises:
      ValueError: there are none in `previous`, or one is damaged.
    """
    archives = sorted(previous.rglob("results.tar.gz")) + sorted(previous.rglob("programs-*.tar"))
    if not any(path.name == "results.tar.gz" for path in archives):
        raise ValueError(f"--previous={previous} holds no results.tar.gz of an earlier run")
    for path in archives:
        try:
            with tarfile.open(path) as archive:
                archive.extractall(work, filter="data")
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error


def wanted_files(names: Iterable[str], version: str) -> set[str]:
    """Returns the names of the files of compiled programs; failures are not kept."""
    return {f"{programs.file_name(name, version)}.bin" for name in names}


def _results(work: pathlib.Path) -> Iterable[tuple[pathlib.Path, bytes]]:
    """Yields results and the ends of logs; what is larger than results are is cut off."""
    for path in _files(work / "results"):
        yield path, path.read_bytes()[:_MAX_RESULT_BYTES]
    for path in _files(work / "logs"):
        yield path, path.read_bytes()[-_MAX_LOG_BYTES:]


def _caches(work: pathlib.Path) -> list[pathlib.Path]:
    return [*_files(work / "autotuned"), *_files(work / "jax_cache")]


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name[0] != ".")


def _parts(files: list[pathlib.Path]) -> tuple[list[list[pathlib.Path]], list[pathlib.Path]]:
    """Returns the files divided among archives, and those that no archive has room for."""
    parts: list[list[pathlib.Path]] = []
    sizes: list[int] = []
    left = []
    for path in files:
        size = path.stat().st_size + 2048  # its header and padding
        if size > MAX_FILE_BYTES - 20480:
            left.append(path)
            continue
        fitting = [i for i, used in enumerate(sizes) if used + size <= MAX_FILE_BYTES - 20480]
        if fitting:
            parts[fitting[0]].append(path)
            sizes[fitting[0]] += size
        elif len(parts) < MAX_PROGRAM_ARCHIVES:
            parts.append([path])
            sizes.append(size)
        else:
            left.append(path)
    return parts, left


def _write(
    archive: pathlib.Path, files: Iterable[tuple[pathlib.Path, bytes]], root: pathlib.Path
) -> None:
    """Writes an archive at once or not at all."""
    partial = archive.with_name(f".{archive.name}.part")
    try:
        with tarfile.open(partial, "w:gz" if archive.suffix == ".gz" else "w") as tar:
            for path, content in files:
                info = tarfile.TarInfo(path.relative_to(root).as_posix())
                info.size, info.mtime = len(content), int(path.stat().st_mtime)
                tar.addfile(info, io.BytesIO(content))
        partial.replace(archive)
    finally:
        partial.unlink(missing_ok=True)
