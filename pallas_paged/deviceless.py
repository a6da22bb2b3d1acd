"""Compilation for an NVIDIA GPU on a machine that has none, down to its machine code.

Needs the packages `jax-cuda12-plugin` and `jax-cuda12-pjrt` of jax's own version and
`nvidia-cuda-nvcc-cu12` (none of their dependencies), and on a machine without a GPU the environment
variable `JAX_PLATFORMS=cpu`. A description of the GPU takes the place of the GPU; `targets/` has
some. Matrix products are cuBLAS's then: XLA's own need to be timed, see `compile_lowered`. The
descriptions say CUDA 13.0 for driver, runtime and
toolkit, whichever plugin compiles: without versions XLA records no custom call in a command buffer,
and its dumps show other launches than those of a machine with a recent driver.

JAX assembles all Mosaic GPU kernels of a process for the architecture of the first one: a process
that looks at their machine code should compile for one compute capability only.
"""

import contextlib
import functools
import io
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from pallas_paged.launches import Schedule, schedule

TARGETS = (
    *("a10", "a100-40gb", "a100-80gb", "b200", "h100", "h200"),
    *("l4", "l40s", "rtx3090", "rtx4090"),
)
"""The GPUs whose descriptions come with the package."""


_NO_OPTIONS: Mapping[str, Any] = {}
_UNTIMED = {"xla_gpu_enable_triton_gemm": False}


class KernelResources(NamedTuple):
    """What a Mosaic GPU kernel takes of the chip, as the compiler reports it.

    Attributes:
      name: the kernel's name.
      registers: registers per thread.
      spill_bytes: bytes per thread that did not fit into registers, stored or loaded.
      smem_bytes: shared memory per block of threads, without its barriers; of several kernels that
        are compiled together the most that one of them takes, for they cannot be told apart.
      warnings: what else the compiler had to say, products that it would not overlap included.
    """

    name: str
    registers: int
    spill_bytes: int
    smem_bytes: int
    warnings: tuple[str, ...]


def target_memory_bytes(target: str) -> int:
    """Returns the memory of the GPU named `target`, one of `TARGETS`."""
    return _figure(target, "device_memory_size")


def target_bandwidth(target: str) -> int:
    """Returns the bytes per second of that memory, as the data sheet has them."""
    return _figure(target, "memory_bandwidth")


def _figure(target: str, name: str) -> int:
    found = re.search(rf"{name}: (\d+)", _description(target))
    assert found is not None, f"{target} has no {name}"
    return int(found[1])


def _description(target: str) -> str:
    return resources.files("pallas_paged.targets").joinpath(f"{target}.txtpb").read_text()


def target_device(target: str) -> jax.Device:
    """Returns a compile-only device for the GPU named `target`, one of `TARGETS`.

    Under `jax.default_device(...)` of it, tracing chooses implementations for that GPU.

    Raises:
      ValueError, RuntimeError: as `target_devices`.
    """
    return target_devices(target, 1)[0]


@functools.cache
def target_devices(target: str, num_devices: int) -> tuple[jax.Device, ...]:
    """Returns compile-only devices for so many GPUs of one machine, all like the one `target`.

    Raises:
      ValueError: an unknown target.
      RuntimeError: the packages that compile for CUDA are not there.
    """
    if target not in TARGETS:
        raise ValueError(f"{target=} is unknown; use one of {', '.join(TARGETS)}")
    # XLA lets a program fill four fifths of the memory, and one that takes more computes much of it
    # again. Weights and a KV pool are more, on purpose, and nothing is gained by that.
    memory_bytes = target_memory_bytes(target)
    description = _description(target).replace(str(memory_bytes), str(memory_bytes * 5 // 4))
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=description, topology=f"1x1x{num_devices}"
        )
    except Exception as error:
        raise RuntimeError(
            f"cannot compile for {target}: {error}. On a machine without a GPU this needs "
            f"jax-cuda12-plugin and jax-cuda12-pjrt, both {jax.__version__}, "
            "nvidia-cuda-nvcc-cu12, and JAX_PLATFORMS=cpu in the environment"
        ) from error
    return tuple(topology.devices)


def compile_for(
    target: str, function: Callable[..., Any], *args: Any, donate_argnums: tuple[int, ...] = ()
) -> jax.stages.Compiled:
    """Returns `function` compiled for the GPU named `target`; it can be inspected, not called.

    Args:
      target: one of `TARGETS`.
      function: of arrays, or pytrees of them, only; may be jitted already.
      *args: its arguments, or `jax.ShapeDtypeStruct`s in their place.
      donate_argnums: which of them it may overwrite, if it is not jitted yet.

    Raises:
      ValueError, RuntimeError: as `target_device`.
    """
    lowered = lower_for(target, function, *args, donate_argnums=donate_argnums)
    with without_compilation_cache(), jax.default_device(target_device(target)):
        return compile_lowered(lowered, target_device(target))


def lower_for(
    target: str, function: Callable[..., Any], *args: Any, donate_argnums: tuple[int, ...] = ()
) -> jax.stages.Lowered:
    """Returns what `compile_for`, with the same arguments and errors, gives to the compiler."""
    jitted: Any = function
    if not hasattr(function, "lower"):
        jitted = jax.jit(function, donate_argnums=donate_argnums)
    with jax.default_device(target_device(target)):
        return jitted.lower(*args)


def compile_lowered(
    lowered: jax.stages.Lowered, device: jax.Device, options: Mapping[str, Any] = _NO_OPTIONS
) -> jax.stages.Compiled:
    """Compiles a program for `device`, which may be one of `target_device`.

    Where the GPU is there, XLA times its own kernels for matrix products beside cuBLAS's. Where it
    is not, XLA would generate kernels with small tiles, whatever the shapes, and divide products of
    few rows into parts that are summed afterwards. cuBLAS chooses by the shapes when it runs, and
    adds to a product what the program adds to it.

    Args:
      lowered: the program, lowered under `jax.default_device(device)`.
      device: where it will run, or the description of it.
      options: XLA's own, by name.
    """
    untimed = _UNTIMED if device.client.runtime_type == "compile_only_runtime" else _NO_OPTIONS
    return lowered.compile(compiler_options={**untimed, **options} or None)


def compile_with_schedule(
    lowered: jax.stages.Lowered, device: jax.Device
) -> tuple[jax.stages.Compiled, Schedule]:
    """Returns a program, compiled, and how a host would launch it; see `compile_lowered`."""
    with tempfile.TemporaryDirectory() as folder, without_compilation_cache():
        compiled = compile_lowered(lowered, device, {"xla_dump_to": folder})
        thunks, names = (
            next(pathlib.Path(folder).glob(f"*.{kind}.txt")).read_text()
            for kind in ("thunk_sequence_after_thunk_passes", "thunk_metadata")
        )
    return compiled, schedule(thunks, names)


def kernel_resources(
    target: str, function: Callable[..., Any], *args: Any
) -> tuple[KernelResources, ...]:
    """Compiles like `compile_for`; returns what each Mosaic GPU kernel in `function` takes.

    Not for several threads at once: the compiler reports on the process's standard output, which is
    read meanwhile.

    Raises:
      ValueError, RuntimeError: as `target_device`; no kernel was compiled, because `function` has
        none or this process has compiled them before (h100 and h200 share their code); it was
        assembled for another architecture, for which this process had compiled a kernel before.
    """
    with (
        _captured_output() as report,
        _environment(MOSAIC_GPU_DUMP_PTXAS="1", MOSAIC_GPU_DUMP_RESOURCES="1"),
    ):
        compile_for(target, function, *args)
    kernels = _parse(report[0])
    if not kernels:
        raise RuntimeError("no Mosaic GPU kernel was compiled, or this process had compiled it")
    wanted = f"sm_{target_device(target).compute_capability.replace('.', '')}"
    assembled = set(re.findall(r"Compiling entry function '\w+' for '(\w+)'", report[0]))
    if any(architecture.rstrip("a") != wanted for architecture in assembled):
        raise RuntimeError(
            f"kernels for {target} ({wanted}) were assembled for {', '.join(assembled)}, the "
            "architecture of this process's first kernel; compile for each in its own process"
        )
    return kernels


def kernel_ptx(target: str, function: Callable[..., Any], *args: Any) -> str:
    """Compiles like `compile_for`; returns the Mosaic GPU kernels in `function` as PTX.

    Not for several threads at once, as `kernel_resources`, and with its errors.
    """
    with _captured_output() as report, _environment(MOSAIC_GPU_DUMP_PTX="1"):
        compile_for(target, function, *args)
    if ".entry" not in report[0]:
        raise RuntimeError("no Mosaic GPU kernel was compiled, or this process had compiled it")
    return report[0]


def _parse(report: str) -> tuple[KernelResources, ...]:
    smem = re.findall(r"smem_scratch_bytes=(\d+)", report)
    # Before it names the kernel that it compiles, and some of them as mere information.
    remarks = re.findall(r".*(?:warning|Performance Loss).*", report, re.IGNORECASE)
    found = []
    for part in report.split("Compiling entry function '")[1:]:
        spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", part)
        registers = re.search(r"Used (\d+) registers", part)
        assert registers is not None, f"no register count in the compiler's report: {part}"
        name = part.partition("'")[0]
        found.append(
            KernelResources(
                name=name,
                registers=int(registers[1]),
                spill_bytes=sum(map(int, spills)),
                smem_bytes=max(map(int, smem)),
                warnings=tuple(line for line in remarks if _is_about(line, name, part)),
            )
        )
    return tuple(found)


def _is_about(remark: str, name: str, part: str) -> bool:
    """Whether a line is about the kernel `name`, whose part of the report is `part`."""
    named = re.search(r"function '(\w+)'", remark)
    return remark in part if named is None else named[1] == name


@contextlib.contextmanager
def without_compilation_cache() -> Iterator[None]:
    """JAX's cache would load what it finds, which takes the GPU; and a hit makes no report."""
    enabled = jax.config.jax_enable_compilation_cache
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # JAX looks at the setting once
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _captured_output() -> Iterator[list[str]]:
    """Catches what Python and native code print; at the end it is in the list."""
    captured: list[str] = []
    python = io.StringIO()
    with (
        tempfile.TemporaryFile("w+", errors="replace") as file,
        contextlib.redirect_stdout(python),
    ):
        saved = {fd: os.dup(fd) for fd in (1, 2)}
        try:
            for fd in saved:
                os.dup2(file.fileno(), fd)
            yield captured
        finally:
            for fd, copy in saved.items():
                os.dup2(copy, fd)
                os.close(copy)
            file.seek(0)
            captured.append(python.getvalue() + file.read())
