"""The device: what it is, what it says of itself, and its ceilings."""

import datetime
import hashlib
import importlib.metadata
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.lib import xla_client

from benchmarks.gpu_suite import timing
from benchmarks.gpu_suite.stage import Case, Context, Row, Stage

ROOT = pathlib.Path(__file__).parent.parent.parent
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch")


def source_hash() -> str:
    """Returns a hash of everything that is measured, and of what measures it."""
    digest = hashlib.sha256()
    for folder in ("pallas_paged", "models", "engine", "benchmarks/gpu_suite"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def identity() -> Row:
    """Returns what must be equal for results to stand in one table."""
    device = jax.devices()[0]
    versions: dict[str, str] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "runtime": " ".join(device.client.platform_version.split()),
        "versions": versions,
        "sources": source_hash(),
    }


def describe(context: Context) -> Row:
    """Returns the identity, the date and the memory."""
    del context
    stats = jax.devices()[0].memory_stats() or {}
    return identity() | {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "memory_bytes": stats.get("bytes_limit"),
    }


def target_description(context: Context) -> Row:
    """Writes the device's own target description, from which others can compile for it."""
    if not context.on_gpu:
        raise NotImplementedError("only a GPU has a target description")
    client: Any = xla_client
    topology = client.get_topology_for_devices(jax.devices()[:1])
    path = context.results / "target_config.txtpb"
    path.write_text(str(topology.target_config), encoding="utf-8")
    return {"file": path.name}


def copy_bandwidth(context: Context) -> Row:
    """Bytes read and written per second by changing 1 GiB in the device's memory."""
    return _rate(context, lambda turn, x: x ^ turn, lambda: (_integers(context),), 2, "B/s")


def read_bandwidth(context: Context) -> Row:
    """Bytes read per second by adding up 1 GiB: for comparison, shares are of the copy's."""

    def work(turn: jax.Array, total: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(x ^ total, dtype=jnp.int32) + turn

    return _rate(context, work, lambda: (jnp.int32(0), _integers(context)), 1, "B/s")


def matmul_rate(context: Context) -> Row:
    """Operations per second of a large bfloat16 product."""
    size = 8192 if context.on_gpu else 64

    def make() -> tuple[jax.Array, jax.Array]:
        a, b = timing.random(0, (size, size)), timing.random(1, (size, size))
        return a, b * jnp.asarray(size**-0.5, jnp.bfloat16)

    # A rate per byte of a square of bfloat16: 2 n^3 operations over 2 n^2 bytes.
    return _rate(context, lambda turn, a, b: a @ b, make, size, "FLOP/s")


def _integers(context: Context) -> jax.Array:
    return jnp.arange((1 << 28) if context.on_gpu else 1 << 16, dtype=jnp.int32)


def _rate(
    context: Context,
    work: Callable[..., Any],
    make: Callable[[], tuple[jax.Array, ...]],
    per_byte: float,
    unit: str,
) -> Row:
    """Returns `per_byte` times the bytes of the last array over the time of the work."""
    loop = timing.Loop(work, make, turns=20) if context.on_gpu else timing.Loop(work, make, 2, 1)
    us = timing.microseconds({"it": lambda: loop})["it"]
    if isinstance(us, Exception):
        raise us
    last = jax.eval_shape(make)[-1]
    num_bytes = last.size * last.dtype.itemsize
    return {"per_second": per_byte * num_bytes / (us / 1e6), "us": us, "unit": unit}


def _cases(context: Context) -> list[Case]:
    return [
        Case("description", describe),
        Case("copy bandwidth", copy_bandwidth),
        Case("matmul rate", matmul_rate),
        Case("read bandwidth", read_bandwidth),
        Case("target description", target_description),
    ]


STAGE = Stage("device", 40, _cases, ("per_second", "unit", "us", "file"), toy=False, aims=4)
