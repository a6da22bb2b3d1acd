"""What an engine's compiled programs are for, as texts by field, and how two of these differ."""

import functools
import hashlib
import importlib.metadata
import itertools
import os
import pathlib
import platform
from collections.abc import Mapping
from typing import Any

import jax

import pallas_paged
from pallas_paged.engine.device.programs import StepPrograms

_SOURCES = (
    *("*.py", "ops/**/*.py", "ops/**/*.json", "models/*.py"),
    *("engine/core/*.py", "engine/device/*.py"),
)
"""Files of the package that decide what a program computes, and a few that do not."""
_SETTINGS = ("jax_default_matmul_precision", "jax_enable_x64")
_LONG = 80


def fingerprint(programs: StepPrograms) -> dict[str, str]:
    """Returns what compiled programs are for; those of an engine with the same serve it.

    The number of blocks, and which steps there are, is left out.

    Args:
      programs: the steps of an engine, whatever the size of its pool.
    """
    return {
        **_software(),
        **_device(programs.placement.device),
        "tensor_parallel_size": str(programs.placement.num_devices),
        **_model(programs.model.config),
        "weights": _shapes(jax.tree.leaves(programs.params)),
        "kv_caches": _shapes(jax.tree.leaves(programs.kv_caches), first_axis=1),
        **{
            name: str(getattr(programs, name))
            for name in (
                "max_num_seqs",
                "max_blocks_per_seq",
                "logprobs_width",
                "implementation",
                "cache_implementation",
                "deterministic",
                "logprobs_mode",
            )
        },
    }


def differences(bundled: Mapping[str, str], own: Mapping[str, str]) -> list[str]:
    """Returns for each field that differs its name, the bundle's value and the engine's."""
    found = []
    for name in sorted({*bundled, *own}):
        theirs, ours = bundled.get(name, "nothing"), own.get(name, "nothing")
        if theirs != ours:
            if max(len(theirs), len(ours)) > _LONG:  # then only what one of them has
                words = theirs.split(), ours.split()
                theirs, ours = (
                    " ".join(word for word in some if word not in others) or "nothing more"
                    for some, others in (words, words[::-1])
                )
            found.append(f"{name}: {theirs} in the bundle, {ours} in this engine")
    return found


def _software() -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in ("flax", "jax", "jaxlib")}
    return {
        **versions,
        "python": ".".join(platform.python_version_tuple()[:2]),
        "code": _code(),
        "XLA_FLAGS": " ".join(os.environ.get("XLA_FLAGS", "").split()),
        **{name: str(getattr(jax.config, name)) for name in _SETTINGS},
    }


@functools.cache
def _code() -> str:
    """Returns a hash of the package's sources, as they are when it is first asked for."""
    root = pathlib.Path(pallas_paged.__file__).parent
    digest = hashlib.sha256()
    for path in sorted({path for pattern in _SOURCES for path in root.glob(pattern)}):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _device(device: jax.Device) -> dict[str, str]:
    fields = {
        "platform": device.platform,
        "device": device.device_kind,
        "device_id": str(device.id),  # programs are loaded for the device that they name
    }
    if device.platform != "cpu":
        fields["compute_capability"] = str(device.compute_capability)
        fields["multiprocessors"] = str(device.core_count)  # kernels divide their work among them
        return {**fields, "plugin": _cuda_plugin()}
    from llvmlite import binding  # a part of Numba

    features = binding.get_host_cpu_features()
    return {
        **fields,
        "cpu": binding.get_host_cpu_name(),  # XLA compiles for it, as LLVM names and knows it
        "cpu_features": " ".join(sorted(name for name, is_there in features.items() if is_there)),
        "cpu_threads": str(os.cpu_count()),  # which XLA divides loops among
    }


def _cuda_plugin() -> str:
    """Returns the builds of JAX for CUDA that are installed, for a program is one build's."""
    found = []
    for name in ("jax-cuda12-pjrt", "jax-cuda13-pjrt"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def _model(config: Any) -> dict[str, str]:
    """Returns the fields of a model's configuration, many of which are constants in programs."""
    fields = {name: repr(value) for name, value in vars(config).items()}
    del fields["checkpoint_dtype"]  # the parameters' own dtype is with their shapes
    return {
        "model": type(config).__name__,
        **{f"model.{name}": value for name, value in fields.items()},
    }


def _shapes(arrays: list[Any], first_axis: int = 0) -> str:
    """Returns dtypes and shapes of arrays in their order, from an axis on, repeats counted."""
    each = [f"{x.dtype.name}{list(x.shape[first_axis:])}".replace(" ", "") for x in arrays]
    runs = [(text, len(list(run))) for text, run in itertools.groupby(each)]
    return " ".join(f"{count}*{text}" for text, count in runs)
