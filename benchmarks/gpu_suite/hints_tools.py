"""NVIDIA's tools for the stage "hints": finding them, running them, reading what they print.

No jax here. What they print was taken from their documentation and from published reports; a report
that is not understood is kept whole all the same.
"""

import csv
import gzip
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.gpu_suite.stage import Row

ROOT = pathlib.Path(__file__).parent.parent.parent
MAX_REPORT_BYTES = 1 << 20
"""Of each file that is kept; the middle of a longer one is left out."""
_PLACES = (
    "/usr/local/cuda/bin",
    "/usr/local/cuda*/bin",
    "/usr/local/cuda*/compute-sanitizer",
    "/usr/local/cuda*/nsight-compute*",
    "/opt/nvidia/nsight-compute/*",
    "/opt/nvidia/*/bin",
    "/opt/nvidia/*",
)
_REFUSED = re.compile(
    r"^==[^\n]*(?:ERR_NVGPU|device (?:is )?not supported|driver is not compatible|not permitted"
    r"|failed to (?:initialize|connect|load)|no attachable process|unable to (?:attach|find)"
    r"|driver resource was unavailable|profiling is not supported)[^\n]*",
    re.IGNORECASE | re.MULTILINE,
)
"""Lines in which a tool, not the program that it runs, says that it cannot work here."""
_SUMMARY = re.compile(r"^=+ ERROR SUMMARY: (\d+) errors?\s*$", re.MULTILINE)
_STALL = re.compile(
    r"smsp__average_warps?_(?:latency_)?issue_stalled_(\w+?)(?:_per_issue_active)?\.ratio"
)
_CONFLICTS = "l1tex__data_bank_conflicts_pipe_lsu_mem_shared"
_MICROSECONDS = {
    "ns": 1e-3,
    "nsecond": 1e-3,
    "us": 1.0,
    "usecond": 1.0,
    "ms": 1e3,
    "msecond": 1e3,
    "s": 1e6,
    "second": 1e6,
}
_METRICS = {
    "dram_percent": (
        "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
        "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    ),
    "sm_percent": ("sm__throughput.avg.pct_of_peak_sustained_elapsed",),
    "memory_percent": ("gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed",),
    "occupancy_percent": ("sm__warps_active.avg.pct_of_peak_sustained_active",),
    "max_occupancy_percent": ("sm__maximum_warps_per_active_cycle_pct",),
    "l2_hit_percent": ("lts__t_sector_hit_rate.pct",),
    "registers": ("launch__registers_per_thread",),
    "smem_dynamic_bytes": ("launch__shared_mem_per_block_dynamic",),
    "smem_static_bytes": ("launch__shared_mem_per_block_static",),
    "thread_blocks": ("launch__grid_size",),
    "waves": ("launch__waves_per_multiprocessor",),
}
"""Figures of a profile, and the metrics that give them, by the versions of the tool."""


class Ran(NamedTuple):
    """How a command ended.

    Attributes:
      status: its exit status; None if it was killed because it took too long.
      output: what it and its children printed.
      took_s: how long it took.
    """

    status: int | None
    output: str
    took_s: float


def find_tool(name: str, places: Sequence[str] = _PLACES) -> str:
    """Returns the path of a tool: of the PATH, else of where NVIDIA's packages put it.

    Raises:
      NotImplementedError: it is not there.
    """
    found = shutil.which(name)
    for pattern in places:
        base = pathlib.Path("/")
        for folder in sorted(base.glob(pattern.lstrip("/")), reverse=True):
            found = found or shutil.which(name, path=str(folder))
    if found is None:
        raise NotImplementedError(f"{name} is neither on the PATH nor in {', '.join(places)}")
    return found


def run(
    command: Sequence[str], log: pathlib.Path, limit_s: float, environment: dict[str, str]
) -> Ran:
    """Runs a command; nothing that it starts outlives it, or this process.

    Args:
      command: program and arguments.
      log: the file that its output goes to.
      limit_s: seconds after which it is killed.
      environment: variables beside this process's own.
    """
    begin = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    guard = [sys.executable, "-m", "benchmarks.gpu_suite.guard", *command]
    with log.open("wb") as file:
        process = subprocess.Popen(
            guard,
            cwd=ROOT,
            env=dict(os.environ) | environment,
            stdin=subprocess.PIPE,  # closed by this process's end, see `guard`
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    status: int | None
    try:
        status = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        status = None
    finally:
        _kill_group(process.pid)
        process.wait()
        assert process.stdin is not None
        process.stdin.close()
    output = log.read_text(encoding="utf-8", errors="replace")
    return Ran(status, output, time.monotonic() - begin)


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


def keep(folder: pathlib.Path, name: str, content: str | bytes) -> str:
    """Writes a report, gzipped if the name says so; returns the name, or why it is not kept.

    Of text that is too long the middle is left out; what is binary is kept whole or not at all.
    """
    if isinstance(content, str):
        raw = content.encode()
        if len(raw) > MAX_REPORT_BYTES:
            half = MAX_REPORT_BYTES // 2 - 100
            gap = f"\n[{len(raw) - 2 * half} bytes left out]\n".encode()
            raw = raw[:half] + gap + raw[-half:]
        content = gzip.compress(raw, mtime=0) if name.endswith(".gz") else raw
    if len(content) > MAX_REPORT_BYTES:
        return f"{name} not kept: {len(content)} bytes"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return name


def end_of(output: str, characters: int = 1200) -> str:
    """Returns the end of an output, without empty lines."""
    return "\n".join(line for line in output.splitlines() if line.strip(" ="))[-characters:]


def raise_refusal(tool: str, output: str) -> None:
    """Raises `NotImplementedError` if the tool says that it cannot work here."""
    found = _REFUSED.search(output)
    if found is not None:
        line = found[0].strip("= ")
        raise NotImplementedError(f"{tool}: {line[:600]}\nIts output ends:\n{end_of(output)}")


def sanitizer_figures(output: str) -> Row:
    """Returns what compute-sanitizer found: `errors`, their `kinds`, and how its `report` begins.

    Raises:
      NotImplementedError: it refuses to work here.
      ValueError: it ends without a summary.
    """
    lines = [line for line in output.splitlines() if line.startswith("=========")]
    counts = [int(count) for count in _SUMMARY.findall(output)]
    if not sum(counts):
        raise_refusal("compute-sanitizer", output)
    if not counts:
        raise ValueError(f"compute-sanitizer gave no summary. Its output ends:\n{end_of(output)}")
    kinds: dict[str, int] = {}
    for line in lines:
        text = line.removeprefix("========= ")
        if re.match(r"(?!COMPUTE-SANITIZER|ERROR SUMMARY|=)\S", text):
            kinds[text[:120]] = kinds.get(text[:120], 0) + 1
    row: Row = {"errors": sum(counts)}
    if row["errors"]:
        shown = [line.removeprefix("=========").strip() for line in lines[1:16]]
        row |= {"kinds": kinds, "report": "\n".join(line for line in shown if line)[:1500]}
    return row


def profile_figures(raw_page: str) -> Row:
    """Returns the figures of the first kernel in `ncu --page raw --csv --print-units base`.

    `duration_us`, throughputs in percent of the peak, registers, shared memory in bytes, what warps
    wait for, as `stalls` (warps per issued instruction, the four largest), `bank_conflicts`; `none`
    names what the page does not have.

    Raises:
      ValueError: it has no kernel.
    """
    lines = raw_page.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    table = list(csv.reader(lines[first:]))
    if len(table) < 3:  # names, units, one line per kernel
        raise ValueError(f"ncu's report has no kernel. Its output ends:\n{end_of(raw_page)}")
    names, units, values = table[:3]
    texts = dict(zip(names, values, strict=False))
    numbers = {name: _number(text) for name, text in texts.items()}

    def first_of(candidates: Sequence[str]) -> float | None:
        known = (numbers.get(name) for name in candidates)
        return next((number for number in known if number is not None), None)

    row: Row = {"kernel": texts.get("Kernel Name")}
    duration = numbers.get("gpu__time_duration.sum")
    unit = dict(zip(names, units, strict=False)).get("gpu__time_duration.sum", "")
    row["duration_us"] = (
        None if duration is None or unit not in _MICROSECONDS else duration * _MICROSECONDS[unit]
    )
    row |= {name: first_of(candidates) for name, candidates in _METRICS.items()}
    row["bank_conflicts"] = _bank_conflicts(numbers)
    stalls = {
        match[1]: number
        for name, number in numbers.items()
        if (match := _STALL.fullmatch(name)) and number and not match[1].endswith("not_issued")
    }
    largest = sorted(stalls, key=lambda name: -stalls[name])[:4]
    row["stalls"] = ", ".join(f"{name} {stalls[name]:.3g}" for name in largest) or None
    absent = [name for name, value in row.items() if value is None]
    found = {name: value for name, value in row.items() if value is not None}
    return found | ({"none": absent} if absent else {})


def _bank_conflicts(numbers: dict[str, float | None]) -> float | None:
    """Returns the conflicts of all accesses to shared memory, or of the kinds that are there."""
    total = numbers.get(f"{_CONFLICTS}.sum")
    if total is not None:
        return total
    kinds = (f"{_CONFLICTS}_op_{kind}.sum" for kind in ("ld", "st", "ldsm", "atom"))
    known = [number for kind in kinds if (number := numbers.get(kind)) is not None]
    return sum(known) if known else None


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def thunk_figures(sequence: str) -> Row:
    """Returns what XLA's dump of a thunk sequence holds.

    `thunks` of all levels, `top_level` ones, `command_buffers`, and the `whiles` and `conditionals`
    that are in none: each of those makes the host wait for the device.

    Raises:
      ValueError: it has no thunks.
    """
    row = dict.fromkeys(("thunks", "top_level", "command_buffers", "whiles", "conditionals"), 0)
    around: list[tuple[int, str]] = []  # indentation and kind of the thunks that contain this one
    for indentation, kind in re.findall(r"^( *)\d+: k(\w+)", sequence, re.MULTILINE):
        while around and around[-1][0] >= len(indentation):
            around.pop()
        is_inside = any(outer == "CommandBuffer" for _, outer in around)
        row["thunks"] += 1
        row["top_level"] += not around
        row["command_buffers"] += kind == "CommandBuffer"
        row["whiles"] += kind == "While" and not is_inside
        row["conditionals"] += kind == "Conditional" and not is_inside
        around.append((len(indentation), kind))
    if not row["thunks"]:
        raise ValueError(f"no thunks in a dump of {len(sequence)} characters: {sequence[:200]}")
    return dict(row)
