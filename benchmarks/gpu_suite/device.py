"""The device: what it is, what it says of itself, and its ceilings."""

import datetime
import hashlib
import importlib.metadata
import pathlib
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
    count = (1 << 28) if context.on_gpu else 1 << 16
    x = jnp.arange(count, dtype=jnp.int32)
    seconds = timing.seconds_per_turn(
        lambda turn, x: x ^ turn, x, turns=40 if context.on_gpu else 2
    )
    return {"per_second": 2 * x.nbytes / seconds, "us": 1e6 * seconds, "unit": "B/s"}


def read_bandwidth(context: Context) -> Row:
    """Bytes read per second by adding up 1 GiB: for comparison, shares are of the copy's."""
    count = (1 << 28) if context.on_gpu else 1 << 16
    x = jnp.arange(count, dtype=jnp.int32)
    seconds = timing.seconds_per_turn(
        lambda turn, total, x: jnp.sum(x ^ total, dtype=jnp.int32) + turn,
        jnp.int32(0),
        x,
        turns=40 if context.on_gpu else 2,
    )
    return {"per_second": x.nbytes / seconds, "us": 1e6 * seconds, "unit": "B/s"}


def matmul_rate(context: Context) -> Row:
    """Operations per second of a large bfloat16 product."""
    size = 8192 if context.on_gpu else 64
    a = timing.random(0, (size, size))
    b = timing.random(1, (size, size)) * jnp.asarray(size**-0.5, jnp.bfloat16)
    seconds = timing.seconds_per_turn(
        lambda turn, a, b: a @ b, a, b, turns=20 if context.on_gpu else 2
    )
    return {"per_second": 2 * size**3 / seconds, "us": 1e6 * seconds, "unit": "FLOP/s"}


def _cases(context: Context) -> list[Case]:
    return [
        Case("description", describe),
        Case("copy bandwidth", copy_bandwidth),
        Case("matmul rate", matmul_rate),
        Case("read bandwidth", read_bandwidth),
        Case("target description", target_description),
    ]


STAGE = Stage("device", 60, 40, _cases, ("device", "per_second", "unit", "us", "file"), toy=False)
