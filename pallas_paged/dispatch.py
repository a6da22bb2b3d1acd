"""Which implementation of an operation runs: the one the caller names, or one chosen and logged.

Every operation keeps a table from name to `Implementation`, in order of preference; a new backend
is one more entry. What an implementation cannot do, it says by itself; nothing falls back in
silence.
"""

import contextlib
import contextvars
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

KNOWN_IMPLEMENTATIONS = ("mosaic_gpu", "numba", "xla", "reference")
"""Every name that may be asked for; an operation offers some of them."""

KERNEL_FAMILIES = {"ampere": ((8, 0), (8, 6), (8, 9)), "hopper": ((9, 0),), "blackwell": ((10, 0),)}
"""CUDA compute capabilities by the family of Mosaic GPU kernels that serves them.

Those that the tests compile for. "ampere" has copies by cp.async and products by mma.sync, "hopper"
those of tensor memory accelerators and warpgroups, "blackwell" products in tensor memory."""

_logger = logging.getLogger(__name__)
# The compute capability of the GPU that is simulated; None where kernels are not interpreted.
_interpreting = contextvars.ContextVar[tuple[int, int] | None]("interpreting", default=None)


def _supports_everything(*args: Any, **kwargs: Any) -> None:
    """No reason to refuse."""


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to run an operation.

    Attributes:
      run: the function itself.
      unsupported: called with what `choose_implementation` is given; returns in words why `run`
        cannot do that on the target device, or None where it can.
    """

    run: Callable[..., Any]
    unsupported: Callable[..., str | None] = _supports_everything


def choose_implementation(
    operation: str,
    offered: Mapping[str, Implementation],
    requested: str | None = None,
    *args: Any,
    **kwargs: Any,
) -> str:
    """Returns the name of the implementation that `operation` runs.

    Args:
      operation: the operation's name, for messages.
      offered: its implementations by name, the preferred one first.
      requested: the name the caller asks for; None takes the first that can do the job, which is
        logged at level DEBUG, once per process and choice, with the reasons of those passed over:
        `logging.getLogger("pallas_paged.dispatch").setLevel(logging.DEBUG)` asks for it.
      *args: what the implementations look at to say whether they can: arrays or their shapes.
      **kwargs: likewise.

    Raises:
      ValueError: `requested` is no implementation's name.
      NotImplementedError: `operation` has no such implementation, or it cannot do this job; the
        message says why.
    """
    names = ", ".join(map(repr, offered))
    if requested is None:
        passed_over: list[str] = []
        for name, implementation in offered.items():
            reason = implementation.unsupported(*args, **kwargs)
            if reason is None:
                # What is not shown is not remembered as shown: a user may ask later.
                if _logger.isEnabledFor(logging.DEBUG):
                    _log_choice(operation, name, target_device().device_kind, tuple(passed_over))
                return name
            passed_over.append(f"not {name!r}: {reason}")
        raise NotImplementedError(f"{operation}: {'; '.join(passed_over)}")
    if requested not in KNOWN_IMPLEMENTATIONS:
        raise ValueError(
            f"{operation}: implementation={requested!r} is unknown; use None or one of {names}"
        )
    if requested not in offered:
        raise NotImplementedError(
            f"{operation} has no {requested!r} implementation in this version; "
            f"use implementation=None or one of {names}"
        )
    reason = offered[requested].unsupported(*args, **kwargs)
    if reason is not None:
        raise NotImplementedError(
            f"{operation}: {requested!r} cannot do this: {reason}; use implementation=None to let "
            "the operation choose"
        )
    return requested


def target_device() -> jax.Device:
    """Returns the device that functions are traced for: JAX's default device.

    `jax.default_device(device)` changes it, to a device of a compile-only topology too. A program
    that places its arrays elsewhere by hand must set it, or name an implementation.
    """
    device = jax.config.jax_default_device
    if isinstance(device, jax.Device):
        return device
    # A platform's name, or None for the default one; of several processes' devices this one's.
    return jax.local_devices(backend=device)[0]


def is_interpreting() -> bool:
    """Whether kernels traced now are interpreted; see `interpret_kernels`."""
    return _interpreting.get() is not None


def unsupported_target(*families: str) -> str | None:
    """Returns why Mosaic GPU kernels cannot run on the target device, or None where they can.

    Args:
      *families: those of `KERNEL_FAMILIES` that there are; none stands for all.
    """
    device = target_device()
    capabilities = sorted(c for name in families or KERNEL_FAMILIES for c in KERNEL_FAMILIES[name])
    *others, last = (f"{major}.{minor}" for major, minor in capabilities)
    wanted = f"{', '.join(others)} or {last}" if others else last
    if not is_interpreting() and device.platform != "gpu":
        return f"it needs an NVIDIA GPU of compute capability {wanted}, not {device.device_kind}"
    capability = compute_capability()
    if capability not in capabilities:
        kind = "what is interpreted" if is_interpreting() else device.device_kind
        return (
            f"it needs compute capability {wanted}, and {kind} has {capability[0]}.{capability[1]}"
        )
    return None


def kernel_family() -> str:
    """Returns which of `KERNEL_FAMILIES` serves the target device, or the one simulated.

    Where `unsupported_target()` has no reason.
    """
    capability = compute_capability()
    return next(name for name, served in KERNEL_FAMILIES.items() if capability in served)


def compute_capability() -> tuple[int, int]:
    """Returns the CUDA compute capability of the target device, or of the one simulated."""
    simulated = _interpreting.get()
    if simulated is not None:
        return simulated
    major, minor = str(target_device().compute_capability).split(".")
    return int(major), int(minor)


@contextlib.contextmanager
def interpret_kernels(
    detect_races: bool = False, compute_capability: tuple[int, int] = (9, 0)
) -> Iterator[None]:
    """Lets "mosaic_gpu" run on a CPU, interpreted: very slow, for tests of the kernels.

    Functions traced inside simulate a GPU: its shared memory, barriers, asynchronous copies and
    threads, but neither layouts nor alignment nor speed.

    Args:
      detect_races: also look for races between threads, which JAX reports on standard output.
      compute_capability: of that GPU. JAX interprets neither products nor copies as those before
        9.0 have them.
    """
    token = _interpreting.set(compute_capability)
    try:
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=detect_races)):
            yield
    finally:
        _interpreting.reset(token)


@functools.cache
def _log_choice(operation: str, choice: str, device: str, passed_over: tuple[str, ...]) -> None:
    reasons = f" ({'; '.join(passed_over)})" if passed_over else ""
    _logger.debug("%s runs as %r on %s by automatic choice%s", operation, choice, device, reasons)
