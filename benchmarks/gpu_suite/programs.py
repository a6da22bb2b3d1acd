"""Programs that one process compiles and another one loads and runs.

A compiled program is a file in a folder: `Context.work / "programs"`, or one that was filled on a
machine without a GPU, see `carry.py`. Its name has a hash of everything that the program depends
on, so that one of other sources, of another JAX or for another chip is never found. The files are
loaded with pickle: do not load what somebody else made.

Arrays that are worked out ahead, as inputs and expected results, lie beside them.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import pickle
import re
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.experimental import serialize_executable

from benchmarks.gpu_suite.stage import Context, Program, Row, failure
from pallas_paged import deviceless

ROOT = pathlib.Path(__file__).parent.parent.parent
_SOURCES = (
    "engine/**/*.py",
    "models/*.py",
    "pallas_paged/*.py",
    "pallas_paged/ops/**/*.py",
    "pallas_paged/ops/attention/tuned/*.json",
    "pallas_paged/targets/*.txtpb",
    "benchmarks/random_models.py",
    "benchmarks/attention_cases/*.py",
    "benchmarks/gpu_suite/*.py",
)
_NOT_COMPILED = (
    "__main__",
    "archive",
    "carry",
    "conduct",
    "guard",
    "hints_child",
    "hints_tools",
    "plan",
    "preparation",
    "report",
    "supervise",
    "worker",
)
"""Modules of the suite that have no part in what is compiled."""

COMPILE_LIMIT_S = 240.0
"""Seconds that a program may take to compile, its products measured, beside many others."""


class Loaded:
    """A compiled program.

    Attributes:
      source: "compiled" ahead in this run, "carried" from elsewhere, or why it was compiled "here".
    """

    def __init__(self, compiled: jax.stages.Compiled, source: str) -> None:
        self.source = source
        self._compiled = compiled

    def __call__(self, *arguments: Any) -> tuple[jax.Array, ...]:
        """Returns the leaves of the results."""
        return self._compiled(*jax.tree.leaves(arguments))

    def temporary_bytes(self) -> int | None:
        """Returns the bytes that it needs beside its arguments and what is in their place.

        None where XLA does not know, as it may not of a program that was loaded.
        """
        analysis = self._compiled.memory_analysis()
        if analysis is None:
            return None
        in_place = analysis.alias_size_in_bytes
        return analysis.temp_size_in_bytes + analysis.output_size_in_bytes - in_place


class NotCompiledError(Exception):
    """A program that other processes could not compile; says why, and with what status."""

    def __init__(self, row: Row) -> None:
        super().__init__(f"{row['status']} while compiling: {row.get('reason', '')}")
        self.row = row


@functools.cache
def version(platform: str) -> str:
    """Returns a hash of what all programs depend on."""
    digest = hashlib.sha256(f"{importlib.metadata.version('jax')} {platform}".encode())
    if platform != "cpu":
        digest.update(_cuda().encode())
    for pattern in _SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            if "gpu_suite" not in pattern or path.stem not in _NOT_COMPILED:
                digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _cuda() -> str:
    """Returns for which CUDA this environment's JAX compiles."""
    for plugin in ("jax-cuda13-plugin", "jax-cuda12-plugin"):
        try:
            return f"{plugin} {importlib.metadata.version(plugin)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return "no CUDA"


def file_name(name: str, version: str) -> str:
    """Returns the name, without suffix, of the files of a program or of prepared arrays."""
    short = re.sub(r"[^A-Za-z0-9]+", "-", name)[:60].strip("-")
    return f"{short}-{hashlib.sha256(f'{version} {name}'.encode()).hexdigest()[:12]}"


def path_of(name: str, context: Context, suffix: str) -> pathlib.Path:
    """Returns where this run keeps a program (.bin), its failure (.json), or arrays (.npz)."""
    return context.work / "programs" / f"{file_name(name, version(context.platform))}{suffix}"


def find(name: str, context: Context) -> tuple[pathlib.Path, str] | None:
    """Returns the file of a compiled program, and "compiled" or "carried"; None without one."""
    path = path_of(name, context, ".bin")
    if path.exists():
        return path, "compiled"
    for folder in context.carried:
        if (folder / path.name).exists():
            return folder / path.name, "carried"
    return None


def is_settled(name: str, context: Context) -> bool:
    """Whether a program is compiled, or is known not to compile."""
    return find(name, context) is not None or path_of(name, context, ".json").exists()


def compile_ahead(program: Program, context: Context) -> Row:
    """Compiles a program and keeps it, or why it failed.

    Returns that, and as `seconds` the processor's time that it took: another process beside this
    one changes that little.
    """
    begin = time.process_time()
    try:
        content = serialized(program, context.target, context.work / "autotuned")
        write(path_of(program.name, context, ".bin"), content)
        row: Row = {"status": "ok"}
    except Exception as error:
        row = failure(error)
        keep_failure(program.name, context, row)
    return row | {"seconds": time.process_time() - begin}


def keep_failure(name: str, context: Context, row: Row) -> None:
    """Lets `load` of a program raise `NotCompiledError` with `row`."""
    write(path_of(name, context, ".json"), json.dumps(row).encode())


def serialized(
    program: Program, target: str | None = None, autotuned: pathlib.Path | None = None
) -> bytes:
    """Returns the file content of a compiled program.

    Args:
      program: what to compile.
      target: one of `deviceless.TARGETS`, or None for this process's own device.
      autotuned: XLA's cache of what it measured on a GPU, a folder.
    """
    flat, leaves, donated = _flattened(program)
    device = jax.devices()[0] if target is None else deviceless.target_device(target)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]
    # Not from JAX's cache: what comes from there is not whole.
    with deviceless.without_compilation_cache(), jax.default_device(device):
        lowered = jax.jit(flat, donate_argnums=donated, keep_unused=True).lower(*shapes)
        compiled = lowered.compile(compiler_options=_options(program, device, autotuned))
    try:
        return pickle.dumps(serialize_executable.serialize(compiled))
    except NotImplementedError as error:  # JAX's, not that of an implementation which refuses
        raise RuntimeError(f"the compiled program cannot be written: {error}") from error


def load(program: Program, context: Context) -> Loaded:
    """Returns a program that is called with `program.arguments`'s kind of arguments.

    One that cannot be loaded is compiled here, and its `source` says so.

    Raises:
      NotCompiledError: other processes tried to compile it, and it failed.
      NotImplementedError: likewise, because an implementation refuses it.
    """
    found = find(program.name, context)
    if found is not None:
        path, source = found
        try:
            return Loaded(_deserialized(path), source)
        except Exception as error:
            reason = f"{source}, but not loaded: {type(error).__name__}: {error}"[:300]
    else:
        failed = path_of(program.name, context, ".json")
        if failed.exists():
            row = json.loads(failed.read_text())
            if row["status"] == "unsupported":
                raise NotImplementedError(row["reason"])
            raise NotCompiledError(row)
        reason = "not compiled ahead"
    context.more_time(COMPILE_LIMIT_S)
    flat, leaves, donated = _flattened(program)
    lowered = jax.jit(flat, donate_argnums=donated, keep_unused=True).lower(*leaves)
    options = _options(program, jax.devices()[0], context.work / "autotuned")
    return Loaded(lowered.compile(compiler_options=options), f"here: {reason}")


def _options(
    program: Program, device: jax.Device, autotuned: pathlib.Path | None
) -> dict[str, str]:
    """Returns XLA's options, which only its compiler for GPUs knows."""
    if device.platform == "cpu":
        return {}
    options = dict(program.options)
    if autotuned is not None:
        autotuned.mkdir(parents=True, exist_ok=True)
        options["xla_gpu_per_fusion_autotune_cache_dir"] = str(autotuned)
        options["xla_gpu_experimental_autotune_cache_mode"] = "AUTOTUNE_CACHE_MODE_UPDATE"
    return options


def cannot_use(some: Iterable[Program], context: Context) -> str | None:
    """Returns why carried programs cannot be used here, or None; runs the first one, on zeros."""
    for program in some:
        found = find(program.name, context)
        if found is not None and found[1] == "carried":
            try:
                leaves = jax.tree.leaves(program.arguments())
                zeros = [np.zeros(leaf.shape, leaf.dtype) for leaf in leaves]
                jax.block_until_ready(_deserialized(found[0])(*zeros))
            except Exception as error:
                return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
            return None
    return "none of them is of these sources, this jax and this platform"


def _deserialized(path: pathlib.Path) -> jax.stages.Compiled:
    payload, in_tree, out_tree = pickle.loads(path.read_bytes())
    return serialize_executable.deserialize_and_load(
        payload, in_tree, out_tree, execution_devices=jax.devices()[:1]
    )


def _flattened(program: Program) -> tuple[Any, list[Any], tuple[int, ...]]:
    """Returns the program as a function of leaves to leaves, the leaves, and which are donated."""
    arguments = program.arguments()
    leaves, tree = jax.tree.flatten(arguments)
    counts = [len(jax.tree.leaves(argument)) for argument in arguments]
    donated = tuple(sum(counts[:i]) + j for i in program.donate for j in range(counts[i]))

    def flat(*leaves: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(jax.tree.leaves(program.function(*jax.tree.unflatten(tree, leaves))))

    return flat, leaves, donated


def write(path: pathlib.Path, content: bytes) -> None:
    """Writes a file at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    partial.write_bytes(content)
    partial.replace(path)


def _partial(path: pathlib.Path) -> pathlib.Path:
    """Returns where a process writes first; several may write the same file at a time."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def save_arrays(path: pathlib.Path, arrays: Mapping[str, Any]) -> None:
    """Writes arrays of any of JAX's dtypes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    host = {name: np.asarray(array) for name, array in arrays.items()}
    raw: dict[str, Any] = {
        f"{name}:{array.dtype.name}": array.view(f"u{array.dtype.itemsize}")
        if array.dtype.kind == "V" or hasattr(ml_dtypes, array.dtype.name)
        else array
        for name, array in host.items()
    }
    partial = _partial(path)
    with partial.open("wb") as file:
        np.savez(file, **raw)
    partial.replace(path)


def load_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns what `save_arrays` wrote."""
    arrays = {}
    with np.load(path) as file:
        for key in file.files:
            name, _, dtype = key.rpartition(":")
            own = getattr(ml_dtypes, dtype, None)
            arrays[name] = file[key] if own is None else file[key].view(own)
    return arrays
