"""The device: what it is, what it says of itself, and its ceilings."""

import datetime
import functools
import hashlib
import importlib.metadata
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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


SIZES = {"copy bandwidth": 1 << 28, "read bandwidth": 1 << 28, "matmul rate": 8192}
"""Integers, integers, and rows of a square."""
_REPEATS = 10
TOY_SIZES = {"copy bandwidth": 1 << 16, "read bandwidth": 1 << 16, "matmul rate": 64}


def loop(name: str, size: int, turns: int) -> timing.Loop:
    """Returns what measures a ceiling.

    Args:
      name: "copy bandwidth" reads and writes integers by changing them; "read bandwidth" adds them
        up, for comparison, for shares are of the copy's; "matmul rate" is two bfloat16 products.
      size: of `SIZES`.
      turns: of the loop.
    """
    what = f"{name} {size}"
    if name == "matmul rate":
        squares = timing.Normal(0, (size, size)), timing.Normal(1, (size, size), size**-0.5)
        return timing.Loop(what, _multiply, squares, turns)
    integers = timing.Host(functools.partial(np.arange, size, dtype=np.int32), (size,))
    if name == "copy bandwidth":
        return timing.Loop(what, _change, (integers,), turns, in_place=True)
    return timing.Loop(what, _add_up, (timing.zeros((), "int32"), integers), turns)


def _multiply(turn: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    del turn
    return (a @ b) @ b  # one product alone would be copied into the loop's state


def _change(turn: jax.Array, x: jax.Array) -> jax.Array:
    return x ^ (turn + 1)


def _add_up(turn: jax.Array, total: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.sum(x ^ total, dtype=jnp.int32) + turn


def rate(loop: timing.Loop, per_turn: float, unit: str, context: Context) -> Row:
    """Returns a ceiling; a turn of the loop moves `per_turn` bytes, or is so many operations.

    The fastest repeat counts: other processes prepare meanwhile, and some of them use the device.
    """
    timed = timing.run([loop], timing.make(loop.operands, context), context, _REPEATS)
    (seconds,) = timed.seconds
    return {"per_second": per_turn / min(seconds), "unit": unit} | timing.figures(seconds)


def _cases(context: Context) -> list[Case]:
    cases = [Case("description", describe, run_s=0.2)]
    sizes, turns = (SIZES, 20) if context.on_gpu else (TOY_SIZES, 2)
    for name, size in sizes.items():
        is_product = name == "matmul rate"
        amount = 4 * size**3 if is_product else 4 * size * (2 if name == "copy bandwidth" else 1)
        it = loop(name, size, turns)
        of_it = functools.partial(timing.unique, (it.program, *timing.drawn_by(it.operands)))
        measure = functools.partial(rate, it, amount, "FLOP/s" if is_product else "B/s")
        cases.append(Case(name, measure, programs=of_it, run_s=2.0))
    return [*cases, Case("target description", target_description, run_s=0.2)]


_COLUMNS = ("per_second", "unit", "us", "noise", "file")
# All shares of the device are of its ceilings, and no process has started when the time begins: far
# more than this stage needs.
STAGE = Stage("device", 100, _cases, _COLUMNS, toy=False, aims=4)
