"""A folder that is there whole or not at all."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def new_folder(
    target: str | os.PathLike[str], *, may_replace: Callable[[Path], bool] | None = None
) -> Iterator[Path]:
    """Yields an empty folder beside `target`, which takes its place when the block has ended well.

    After an error the folder is removed. A process that is killed leaves it, under a name with a
    dot before it and `.incomplete` behind, until the next run with this target; `target` is then
    what it was. Only a kill between the two renames that replace a folder leaves none there: the
    old one is then called `.replaced`, and the next run puts it back. It is called `.deleted` while
    it is deleted, so that no half of it is ever put back.

    Args:
      target: the folder to be; its parents are made.
      may_replace: whether a folder that is there may be replaced; None refuses all.

    Raises:
      ValueError: `target` is there and may not be replaced, or another process is making it.
    """
    target = Path(os.path.realpath(target))
    work, old, deleted = (
        target.with_name(f".{target.name}.{end}") for end in ("incomplete", "replaced", "deleted")
    )
    if old.exists() and not target.exists():
        old.rename(target)
    if os.path.lexists(target):
        if may_replace is None:
            raise ValueError(f"{target} exists: remove it, or choose another name")
        if not target.is_dir() or not may_replace(target):
            raise ValueError(f"{target} exists and is not one of ours to replace: remove it first")
    work.mkdir(parents=True, exist_ok=True)
    with _locked(work):
        for left in work.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        try:
            yield work
            _flush(work)
        except BaseException:
            shutil.rmtree(work)
            raise
        if target.exists():
            _delete(old, deleted)
            target.rename(old)
        work.rename(target)
        _flush(target.parent, deep=False)
    _delete(old, deleted)


def _delete(folder: Path, deleted: Path) -> None:
    """Deletes a folder, if it is there, under the name `deleted`: under its own it is whole."""
    shutil.rmtree(deleted, ignore_errors=True)
    if folder.exists():
        folder.rename(deleted)
        shutil.rmtree(deleted, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, which the system takes back from a process that dies."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process is writing {folder}: wait for it") from error
        yield
    finally:
        os.close(descriptor)


def _flush(folder: Path, deep: bool = True) -> None:
    """Waits until the folder, and with `deep` all that is in it, is on the disk."""
    for path in (folder, *(folder.rglob("*") if deep else ())):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
