"""Measures the host memory that loading a model takes, whole and in shards.

  python -m benchmarks.load_memory                            # 100 million parameters, float32
  python -m benchmarks.load_memory --random_model=smollm2

A checkpoint with random weights is written to a temporary folder, as safetensors and ported, and
loaded by processes of their own: on one device; on several simulated devices of one process, where
weights are split and the process needs all of them; and by several processes with one device each,
which `jax.distributed` joins over the loopback interface, where each needs its share. `peak` is the
most memory that was resident during the load, less what was before: parameters, which are in host
memory here, pages of files that were mapped, and whatever the load took besides.
"""

import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np
from absl import flags
from flax import nnx
from safetensors.numpy import save_file

from benchmarks import random_models, tables
from pallas_paged.models import command_line, init_model, load_config, load_model
from pallas_paged.models.porting import port
from pallas_paged.models.tensors import tensors_of

_RANDOM_MODEL = flags.DEFINE_enum(
    "random_model", "100m", list(random_models.CONFIGS), "The shape of the model."
)
_DEVICES = flags.DEFINE_integer("devices", 2, "Simulated devices of one process.", lower_bound=2)
_PROCESSES = flags.DEFINE_integer("processes", 2, "Processes of one device.", lower_bound=2)
_JSON = flags.DEFINE_string("json", None, "Also write the figures to this file.")

_MB = 1e6
_SPLIT = ("vocab", "kv_heads", "heads", "mlp")
_PROGRAM = "import sys; from benchmarks import load_memory; load_memory.load(*sys.argv[1:])"


def _status(field: str) -> int:
    """Returns a figure of this process's memory, in bytes."""
    text = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(text.partition(f"{field}:")[2].split()[0])


def split_over_all(axes: tuple[str, ...], shape: tuple[int, ...]) -> jax.sharding.Sharding:
    """Returns where a parameter goes that is split over all devices of all processes."""
    devices = np.array(jax.devices())
    spec = (
        "model" if axis in _SPLIT and length % devices.size == 0 else None
        for axis, length in zip(axes, shape, strict=True)
    )
    return jax.sharding.NamedSharding(jax.sharding.Mesh(devices, ("model",)), jax.P(*spec))


def load(folder: str, number: str, count: str, coordinator: str) -> None:
    """Loads a model and prints what that took, as one of `count` processes if those are several.

    Args:
      folder: the checkpoint.
      number: of this process.
      count: of all processes.
      coordinator: where they meet.
    """
    import orbax.checkpoint  # noqa: F401  its code is not the load's

    if int(count) > 1:
        jax.distributed.initialize(coordinator, int(count), int(number))
    num_devices = len(jax.devices())
    config = load_config(folder).for_devices(num_devices)
    sharding = split_over_all if num_devices > 1 else None
    for device in jax.local_devices():
        jax.block_until_ready(jax.device_put(np.zeros(1, np.float32), device))
    before, began = _status("VmRSS"), time.perf_counter()
    params = jax.tree.leaves(nnx.state(load_model(folder, sharding=sharding, config=config)))
    jax.block_until_ready(params)
    figures = {
        "seconds": time.perf_counter() - began,
        "model MB": sum(x.nbytes for x in params) / _MB,
        "shards MB": sum(s.data.nbytes for x in params for s in x.addressable_shards) / _MB,
        "peak MB": (_status("VmHWM") - before) / _MB,
    }
    print(json.dumps(figures))


def write_checkpoint(name: str, folder: pathlib.Path) -> None:
    """Writes a checkpoint of a named shape with random weights, as safetensors."""
    random_models.write_config(name, folder)
    tensors = tensors_of(nnx.state(init_model(folder)))
    save_file({k: np.asarray(x) for k, x in tensors.items()}, folder / "model.safetensors")


def run(folder: pathlib.Path, num_processes: int, num_devices: int) -> list[dict[str, float]]:
    """Returns what each of some processes, with so many devices each, took to load.

    Raises:
      ValueError: one failed; the message is its last line.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    xla_flags = f"--xla_force_host_platform_device_count={num_devices}"
    settings = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(folder), f"{i}", f"{num_processes}", coordinator],
            env=os.environ | settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(num_processes)
    ]
    found = []
    for process in processes:
        out, errors = process.communicate()
        if process.returncode:
            raise ValueError(f"a load failed: {(errors.strip() or 'no message').splitlines()[-1]}")
        found.append(json.loads(out.strip().splitlines()[-1]))
    return found


def measure() -> list[dict[str, Any]]:
    """Returns a row for each form of the checkpoint and each process that loads it."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        hf, ported = (pathlib.Path(temporary, name) for name in ("safetensors", "ported"))
        hf.mkdir()
        write_checkpoint(_RANDOM_MODEL.value, hf)
        port(hf, ported)
        kinds = {
            "whole": (1, 1),
            f"{_DEVICES.value} devices": (1, _DEVICES.value),
            f"{_PROCESSES.value} processes": (_PROCESSES.value, 1),
        }
        for folder in (hf, ported):
            for kind, shape in kinds.items():
                for number, figures in enumerate(run(folder, *shape)):
                    rows.append({"form": folder.name, "load": kind, "process": number, **figures})
    return rows


def main() -> None:
    """Prints the table."""
    if sys.platform != "linux":
        raise ValueError("only Linux tells in /proc what a process has resident")
    rows = measure()
    tables.show(f"memory of a load, random {_RANDOM_MODEL.value}", rows)
    if _JSON.value:
        pathlib.Path(_JSON.value).write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    command_line.run(main)
