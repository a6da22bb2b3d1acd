"""What GPUs can do, by their data sheets or, where a run of the GPU suite is kept, as measured.

Memory and bandwidth are those of `pallas_paged.targets`, one file per GPU. Rates of products, links
and host copies are stated here, from NVIDIA's data sheets of the A100 (2021), H100 and H200 (2024),
SXM boards. A data sheet's figure is a peak; `Hardware` carries the share of it that programs get,
which is our assumption until somebody measures: see `SHARE_OF_BANDWIDTH` and `SHARE_OF_RATE`.
"""

import dataclasses
import json
import pathlib

from pallas_paged.deviceless import target_bandwidth, target_memory_bytes

RESULTS = pathlib.Path(__file__).parents[1] / "results"
SHARE_OF_BANDWIDTH = 0.80
"""Of the peak, what kernels that only read get; an assumption."""
SHARE_OF_RATE = 0.60
"""Of the peak, what large products get; an assumption."""
LAUNCH_S = 4e-6
"""From one kernel to the next in a CUDA graph; an assumption."""
SHARE_OF_LINKS = 0.80
"""Of the peak of PCIe and NVLink, what copies get; an assumption."""


@dataclasses.dataclass(frozen=True)
class Hardware:
    """A device, or several that share a model.

    Attributes:
      name: of the device.
      bytes_per_s: of device memory, as programs get it.
      flops_per_s: of 16-bit products, as programs get them.
      host_bytes_per_s: to and from pinned host memory, one way.
      link_bytes_per_s: between two devices, one way.
      memory_bytes: of device memory.
      launch_s: from one kernel to the next.
      num_devices: how many hold the model together.
      source: where the figures are from.
    """

    name: str
    bytes_per_s: float
    flops_per_s: float
    host_bytes_per_s: float
    link_bytes_per_s: float
    memory_bytes: float
    launch_s: float = LAUNCH_S
    num_devices: int = 1
    source: str = "data sheet"


_PEAKS = {
    # Operations per second of dense bfloat16 products, PCIe and NVLink bytes per second one way.
    "a100-40gb": (312e12, 32e9, 300e9),
    "a100-80gb": (312e12, 32e9, 300e9),
    "h100": (989e12, 64e9, 450e9),
    "h200": (989e12, 64e9, 450e9),
}
NAMES = tuple(_PEAKS)


def hardware(name: str, num_devices: int = 1, results: pathlib.Path = RESULTS) -> Hardware:
    """Returns a GPU of `NAMES`: measured where `results` has a run on one, else by its data sheet.

    Raises:
      ValueError: there is no such GPU.
    """
    if name not in _PEAKS:
        raise ValueError(f"gpu={name!r} is not known; choose one of {', '.join(_PEAKS)}")
    rate, pcie, link = _PEAKS[name]
    found = Hardware(
        name,
        SHARE_OF_BANDWIDTH * target_bandwidth(name),
        SHARE_OF_RATE * rate,
        SHARE_OF_LINKS * pcie,
        SHARE_OF_LINKS * link,
        target_memory_bytes(name),
        num_devices=num_devices,
        source=f"data sheet, {SHARE_OF_BANDWIDTH:.0%} of its bandwidth and {SHARE_OF_RATE:.0%} of "
        "its rate",
    )
    measured = _measured(name, results)
    if measured is None:
        return found
    folder, bandwidth, flops = measured
    return dataclasses.replace(
        found, bytes_per_s=bandwidth, flops_per_s=flops, source=f"measured, {folder}"
    )


def _measured(name: str, results: pathlib.Path) -> tuple[str, float, float] | None:
    """Returns the last run's folder on such a GPU, its read bandwidth and its rate of products."""
    for path in sorted(results.glob("*/device.jsonl"), reverse=True):
        if not all(part in path.parent.name.lower() for part in name.split("-")):
            continue
        rows = {row["case"]: row for row in map(json.loads, path.read_text().splitlines())}
        needed = [
            rows.get(case, {}).get("per_second") for case in ("read bandwidth", "matmul rate")
        ]
        if all(needed):
            return path.parent.name, *needed
    return None
