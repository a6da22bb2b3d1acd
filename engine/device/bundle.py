"""Bundles: an engine's compiled programs in a folder, for an engine that then compiles none.

A bundle is a folder with `manifest.json` and a file per program. The manifest says what the
programs are for (`fingerprint`), which they are, and each file's size and SHA-256. A file is a
pickle of what `jax.experimental.serialize_executable` makes of a program. Whoever can write a
bundle can run any code in the process that loads it: checksums tell damage, not who made it.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import pickle
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import serialize_executable

from pallas_paged.engine.config import EngineConfig
from pallas_paged.engine.core.buckets import Bucket, Buckets
from pallas_paged.engine.device.block_programs import KINDS, BlockPrograms
from pallas_paged.engine.device.fingerprint import differences, fingerprint
from pallas_paged.engine.device.kernel_check import CHECK, KernelCheck
from pallas_paged.engine.device.pool_size import BundledPool
from pallas_paged.engine.device.programs import Name, StepPrograms

logger = logging.getLogger(__name__)

FORMAT = 1
"""Of the manifest; another one is refused."""
_MANIFEST = "manifest.json"
_THREADS = 4  # that load programs


@dataclasses.dataclass(frozen=True)
class Entry:
    """A program in a bundle.

    Attributes:
      name: which it is; a bucket as a mapping of its fields.
      file: its file's name.
      num_bytes: the file's size.
      sha256: of the file.
      temporary_bytes: what the program needs beside its arguments and results.
      peak_bytes: the most that it needs at a time, arguments and results included.
    """

    name: Mapping[str, Any] | list[Any]
    file: str
    num_bytes: int
    sha256: str
    temporary_bytes: int
    peak_bytes: int


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a bundle says of itself.

    Attributes:
      options: the fields of `EngineConfig` that shape programs, as they were asked for.
      fingerprint: see there.
      num_blocks: size of the pool that the programs are for.
      temporary_bytes: of the largest step, as in `PoolPlan`.
      programs: what is in the bundle.
      format: `FORMAT`.
    """

    options: Mapping[str, Any]
    fingerprint: Mapping[str, str]
    num_blocks: int
    temporary_bytes: int | None
    programs: tuple[Entry, ...]
    format: int = FORMAT

    @property
    def pool(self) -> BundledPool:
        """The pool that the programs are for."""
        return BundledPool(self.num_blocks, self.temporary_bytes)

    def has_pool_of(self, num_blocks: int) -> bool:
        """Whether the programs are for a pool of that size; a warning says if not."""
        if num_blocks == self.num_blocks:
            return True
        _warn([f"num_blocks: {self.num_blocks} in the bundle, {num_blocks} in this engine"])
        return False


def is_bundle(folder: pathlib.Path) -> bool:
    """Whether a folder is a bundle, or is empty and can become one."""
    return (folder / _MANIFEST).is_file() or not any(folder.iterdir())


def check_replaceable(folder: pathlib.Path) -> None:
    """Raises `ValueError` if there is something that no bundle may replace."""
    if folder.exists() and not (folder.is_dir() and is_bundle(folder)):
        raise ValueError(f"{folder} exists and is no bundle: remove it, or choose another name")


def write_program(folder: pathlib.Path, name: Name, compiled: jax.stages.Compiled) -> Entry:
    """Writes a program into a folder that is to become a bundle.

    Args:
      folder: see `pallas_paged.models.new_folder`.
      name: which program.
      compiled: itself, compiled by this process and not taken from JAX's cache.
    """
    content = pickle.dumps(serialize_executable.serialize(compiled))
    is_step = isinstance(name, Bucket)
    file = f"{'step' if is_step else 'other'}-{_digest(str(name).encode())[:16]}.bin"
    (folder / file).write_bytes(content)
    memory = compiled.memory_analysis()
    assert memory is not None, "XLA gave no memory analysis of a compiled program"
    return Entry(
        dataclasses.asdict(name) if isinstance(name, Bucket) else list(name),
        file,
        len(content),
        _digest(content),
        memory.temp_size_in_bytes,
        memory.peak_memory_in_bytes,
    )


def write_manifest(folder: pathlib.Path, manifest: Manifest) -> None:
    """Writes what makes the folder a bundle, after all programs."""
    text = json.dumps(dataclasses.asdict(manifest), indent=1)
    (folder / _MANIFEST).write_text(text, encoding="utf-8")


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Returns what a bundle says of itself; runs nothing of it.

    Raises:
      FileNotFoundError: there is no such folder, or no bundle in it.
      ValueError: the manifest is damaged, or of another format.
    """
    path = pathlib.Path(folder, _MANIFEST)
    if not path.is_file():
        raise FileNotFoundError(
            f"bundle={os.fspath(folder)!r} is no bundle, it has no {_MANIFEST}: "
            "python -m pallas_paged.engine.compile makes one"
        )
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields["format"] != FORMAT:
            raise ValueError(f"its format is {fields['format']!r}, and {FORMAT} is read")
        names = {field.name for field in dataclasses.fields(EngineConfig)}
        if unknown := set(fields["options"]) - names:
            raise ValueError(f"it has options that no engine has: {sorted(unknown)}")
        programs = tuple(Entry(**entry) for entry in fields.pop("programs"))
        return Manifest(programs=programs, **fields)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} cannot be read: {type(error).__name__}: {error}; compile the bundle again"
        ) from error


def open_matching(folder: str | os.PathLike[str], programs: StepPrograms) -> Manifest | None:
    """Returns a bundle's manifest if its programs are those of an engine.

    Otherwise None, and one warning that says what differs.

    Raises:
      FileNotFoundError, ValueError: as `read_manifest`.
    """
    manifest = read_manifest(folder)
    found = differences(manifest.fingerprint, fingerprint(programs))
    if found:
        _warn(found)
        return None
    return manifest


def adopt(
    folder: str | os.PathLike[str],
    manifest: Manifest,
    programs: StepPrograms,
    block_programs: BlockPrograms,
    buckets: Buckets,
) -> None:
    """Gives an engine the programs of a bundle; those that it lacks are compiled when needed.

    Args:
      folder, manifest: the bundle, which matches the engine.
      programs, block_programs: the engine's.
      buckets: the shapes of the engine's steps.

    Raises:
      ValueError: as `load_programs`.
    """
    begin = time.perf_counter()
    entries = [entry for entry in manifest.programs if not _is_check(entry)]
    loaded = load_programs(folder, entries, programs.placement.devices)
    for name, compiled in loaded.items():
        if isinstance(name, Bucket) or name[0] not in KINDS:
            programs.adopt({name: compiled})
        else:
            block_programs.adopt({name: compiled})
    seconds = time.perf_counter() - begin
    logger.info("loaded %d programs of the bundle %s in %.1f s", len(loaded), folder, seconds)
    missing = [str(b) for b in buckets.all() if b.is_common and b not in loaded]
    if missing:
        logger.warning("the bundle has no programs of %s: compiled when needed", "; ".join(missing))


def load_checks(
    folder: str | os.PathLike[str],
    manifest: Manifest,
    checks: Sequence[KernelCheck],
    device: jax.Device,
) -> dict[Name, jax.stages.Compiled]:
    """Returns the programs of kernel checks, as far as a bundle has them; see `load_programs`."""
    names = {check.name for check in checks}
    entries = [entry for entry in manifest.programs if _is_check(entry) and _name(entry) in names]
    if len(entries) < len(names):
        logger.warning(
            "the bundle has no check of some kernels: it is compiled; see verify_kernels"
        )
    return load_programs(folder, entries, [device])


def load_programs(
    folder: str | os.PathLike[str], entries: Sequence[Entry], devices: Sequence[jax.Device]
) -> dict[Name, jax.stages.Compiled]:
    """Returns programs of a bundle, ready to run on one device, or on all that share a model.

    What they call must be known to XLA before, see `register_for_loading`. Unpickles the files: the
    bundle must be from somebody who may run code here.

    Args:
      folder: the bundle.
      entries: which of its manifest.
      devices: as many as they were compiled for, and like these.

    Raises:
      ValueError: a file is missing or damaged, or XLA refuses a program.
    """

    def load(entry: Entry) -> jax.stages.Compiled:
        path = pathlib.Path(folder, entry.file)
        content = _checked(path, entry)
        try:
            payload, in_tree, out_tree = pickle.loads(content)
            return serialize_executable.deserialize_and_load(
                payload, in_tree, out_tree, devices[0].client, devices
            )
        except Exception as error:  # whatever the parts of JAX and XLA raise
            raise ValueError(
                f"{path} is whole, but cannot be loaded: {type(error).__name__}: {error}; compile "
                "the bundle again, or leave it out"
            ) from error

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        compiled = list(pool.map(load, entries))
    return dict(zip(map(_name, entries), compiled, strict=True))


def _is_check(entry: Entry) -> bool:
    return not isinstance(entry.name, Mapping) and entry.name[0].startswith(CHECK)


def _name(entry: Entry) -> Name:
    if isinstance(entry.name, Mapping):
        return Bucket(**entry.name)
    kind, size = entry.name
    return kind, size


def _checked(path: pathlib.Path, entry: Entry) -> bytes:
    """Returns the content of a program's file, which is what the manifest says."""
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: compile the bundle again") from error
    if len(content) != entry.num_bytes or _digest(content) != entry.sha256:
        raise ValueError(
            f"{path} is damaged: {len(content)} bytes with another checksum than the manifest's "
            f"{entry.num_bytes}; compile the bundle again"
        )
    return content


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _warn(found: list[str]) -> None:
    logger.warning(
        "the bundle is not for this engine, which compiles its own programs: %s", "; ".join(found)
    )
