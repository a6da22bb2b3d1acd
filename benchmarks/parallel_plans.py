"""What models on several GPUs need before anybody rents these: exchanges, memory, a simulated rate.

  python -m benchmarks.parallel_plans --out=DIR

Everything is compiled for GPUs that are not here, with `pallas_paged.deviceless`, at full depth:

- collectives: number and bytes of a decode step's exchanges, read from the compiled text, beside
  the least that dividing heads, MLP and vocabulary needs;
- memory: where an engine's bytes go on each device, and the KV slots that fit, for the models and
  GPUs of the PagedAttention paper, beside its Table 1, and for Llama-70B;
- scaling: tokens per second of decode steps on 1, 2, 4 and 8 GPUs, simulated from the compiled
  steps' bytes and collectives and the bandwidths of data sheets.

Prints tables, and writes them as text, CSV and JSON into --out. Six minutes on two cores.
"""

import csv
import json
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags

from benchmarks import tables
from benchmarks.parallel import compiled, scaling
from benchmarks.parallel.compiled import Case, Processes, Step
from benchmarks.parallel.memory import row_of
from benchmarks.simulation import hardware
from pallas_paged.deviceless import target_memory_bytes
from pallas_paged.engine.compiling import NOT_OURS_BYTES
from pallas_paged.models import command_line

_PARTS = flags.DEFINE_multi_enum(
    "part", ["collectives", "memory", "scaling"], ["collectives", "memory", "scaling"], "Tables."
)
_MODELS = flags.DEFINE_list(
    "models", ["opt-13b", "opt-66b", "opt-175b", "llama-70b"], "Of collectives and scaling."
)
_TARGETS = flags.DEFINE_list("targets", ["a100-80gb", "h100"], "GPUs of collectives and scaling.")
_MEMORY = flags.DEFINE_list(
    "memory",
    [
        *("opt-13b:a100-40gb:1", "opt-66b:a100-40gb:4", "opt-175b:a100-80gb:8"),
        *("llama-70b:h100:4", "llama-70b:h100:8"),
    ],
    "Engines of the table of memory, as model:GPU:number.",
)
_NUM_DEVICES = flags.DEFINE_list("num_devices", ["1", "2", "4", "8"], "Of collectives and scaling.")
_BATCH = flags.DEFINE_integer("batch", 32, "Sequences of a decode step.", lower_bound=1)
_CONTEXT = flags.DEFINE_integer("context", 512, "Tokens of each of them.", lower_bound=1)
_MAX_NUM_SEQS = flags.DEFINE_integer("max_num_seqs", 256, "Of the engines of memory.")
_MAX_NUM_BATCHED_TOKENS = flags.DEFINE_integer("max_num_batched_tokens", 2048, "Likewise.")
_SHARES = flags.DEFINE_list(
    "gpu_memory_utilization",
    ["0.90", "0.95"],
    "Shares of a GPU's memory, of which XLA_CLIENT_MEM_FRACTION must allow as much.",
)
_LAYERS = flags.DEFINE_integer("layers", None, "Only so many of the models' layers, to try it.")
_OUT = flags.DEFINE_string("out", None, "Folder for tables as text, CSV and JSON.", required=True)

Row = dict[str, Any]


def main() -> None:
    """Compiles, prints and writes."""
    logging.getLogger("pallas_paged").setLevel(logging.WARNING)
    out = pathlib.Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    figures: dict[str, list[Row]] = {}
    texts = []
    with Processes() as processes:
        steps: list[Step] = []
        too_large: list[tuple[Case, int]] = []
        if {"collectives", "scaling"} & set(_PARTS.value):
            steps, too_large = _steps(processes)
        for part in _PARTS.value:
            if part == "memory":
                title, rows = _memories(processes)
            elif part == "collectives":
                title, rows = _exchanged(steps)
            else:
                title, rows = _scaled(steps, too_large)
            figures[part] = rows
            shown = [_by_number(rows), rows] if part == "scaling" else [rows]
            texts.append("\n".join([title, *map(_text, shown)]))
            print(texts[-1], flush=True)
            with open(out / f"{part}.csv", "w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
    (out / "summary.txt").write_text("\n".join(texts))
    (out / "plans.json").write_text(json.dumps({"jax": jax.__version__} | figures, indent=1))


def _text(rows: Sequence[Row]) -> str:
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    return f"\n{tables.render(lines, left=3)}\n"


# --- decode steps ---------------------------------------------------------------------------------


def _steps(processes: Processes) -> tuple[list[Step], list[tuple[Case, int]]]:
    """Returns the steps that fit; and what does not, with the bytes that one device would need."""
    batch = _BATCH.value, _CONTEXT.value
    cases = [
        Case(model, target, int(number), _LAYERS.value)
        for model in _MODELS.value
        for target in _TARGETS.value
        for number in _NUM_DEVICES.value
    ]
    needed = processes.map(compiled.needed_bytes, cases, *batch)
    fits = [case for case, size in zip(cases, needed, strict=True) if size <= _room(case)]
    too_large = [each for each in zip(cases, needed, strict=True) if each[0] not in fits]
    steps = []
    for step in processes.map(compiled.decode_step, fits, *batch):
        if step.peak_bytes <= _room(step.case):
            steps.append(step)
        else:
            too_large.append((step.case, step.peak_bytes))
    return steps, too_large


def _room(case: Case) -> int:
    share = min(map(float, _SHARES.value))
    return compiled.room_bytes(target_memory_bytes(case.target), share)


def _exchanged(steps: Sequence[Step]) -> tuple[str, list[Row]]:
    """Returns the table of collectives."""
    rows = []
    for step in steps:
        if step.case.num_devices == 1:
            continue
        found = {one.kind: one for one in step.exchanges}
        needed = {one.kind: one for one in step.least_exchanges}
        for kind in sorted({*found, *needed}):
            here, there = found.get(kind), needed.get(kind)
            rows.append(
                {
                    "model": step.case.model,
                    "GPU": step.case.target,
                    "collective": kind,
                    "GPUs": step.case.num_devices,
                    "layers": step.case.shape.num_layers,
                    "compiled": here.count if here else 0,
                    "least": there.count if there else 0,
                    "compiled MB": (here.num_bytes if here else 0) / 1e6,
                    "least MB": (there.num_bytes if there else 0) / 1e6,
                    "copies of weights or caches": step.num_moves,
                    "launches": step.num_launches,
                    "command buffers": step.num_buffers,
                    "compile s": round(step.compile_s, 1),
                }
            )
    title = (
        f"Collectives of a decode step of {_BATCH.value} sequences, read from the compiled text, "
        "in which each of the layers is.\nLeast: two all-reduces of 16-bit activations [batch, "
        "hidden] in each layer and one of the embeddings, and the\nall-gather of float32 logits "
        "[batch, vocabulary]. MB are 10^6 bytes of what each device has afterwards."
    )
    return title, rows


# --- memory ---------------------------------------------------------------------------------------


def _memories(processes: Processes) -> tuple[str, list[Row]]:
    """Returns the table of memory."""
    cases = []
    for text in _MEMORY.value:
        model, target, number = text.split(":")
        cases.append(Case(model, target, int(number), _LAYERS.value))
    limits = _MAX_NUM_SEQS.value, _MAX_NUM_BATCHED_TOKENS.value
    rows = []
    for found in processes.map(compiled.memory, cases, *limits):
        for share in map(float, _SHARES.value):
            rows.append(row_of(found, share))
    title = (
        f"Memory of each device, compiled: an engine with max_num_seqs={limits[0]}, "
        f"max_num_batched_tokens={limits[1]}, bfloat16, blocks of {compiled.BLOCK_SIZE} tokens.\n"
        "GiB are 2^30 bytes. The share is of the GPU's memory: gpu_memory_utilization; "
        "XLA_CLIENT_MEM_FRACTION must be as much.\nBeside weights, temporaries of the largest "
        f"step, block tables and penalties {NOT_OURS_BYTES >> 20} MiB are left free. An engine "
        "rounds\nthe pool down, to 8 sizes per power of two; num_blocks asks for all that fit. The "
        "paper's slots are those of its\nTable 1; the last column is the share at which they fit."
    )
    return title, rows


# --- a simulated scaling --------------------------------------------------------------------------


def _scaled(steps: Sequence[Step], too_large: Sequence[tuple[Case, int]]) -> tuple[str, list[Row]]:
    """Returns the table of simulated decode rates."""
    rows: list[Row] = []
    sources = {}
    for model in _MODELS.value:
        for target in _TARGETS.value:
            device = hardware.hardware(target)
            sources[target] = (
                f"{target}: {device.bytes_per_s / 1e12:.2f} TB/s of memory, "
                f"{device.flops_per_s / 1e12:.0f} TFLOP/s ({device.source}); "
                + ", ".join(
                    f"{link.name} {link.bytes_per_s / 1e9:.0f} GB/s and {link.latency_s * 1e6:.0f}"
                    " us"
                    for link in scaling.links_of(device)
                )
            )
            here = [s for s in steps if s.case[:2] == (model, target)]
            for step in here:
                for link in scaling.links_of(device)[: None if step.case.num_devices > 1 else 1]:
                    rows.append(_scaling_row(step, link, device))
            for case, size in too_large:
                if case[:2] == (model, target):
                    rows.append(_row_of_too_large(case, size))
    rows.sort(key=lambda row: (_MODELS.value.index(row["model"]), row["GPU"], row["GPUs"]))
    lines = "\n".join(f"  {source}" for source in sources.values())
    title = (
        f"Simulated decode rates in tokens/s, nothing measured: {_BATCH.value} sequences of "
        f"{_CONTEXT.value} tokens each, bfloat16, one token for each in\na step. A step takes what "
        "reading weights, keys and values takes, or multiplying if that is longer; then "
        f"{hardware.LAUNCH_S * 1e6:.0f} us from each\nlaunch to the next, and its collectives, one "
        "after the other: latency, and in a ring 2 (n - 1) / n of an all-reduce's\nbytes and "
        "(n - 1) / n of an all-gather's over a device's link. Launches, bytes and collectives are "
        "the compiled step's.\nRates of links are "
        f"{hardware.SHARE_OF_LINKS:.0%} of the data sheet's; these shares, the time between "
        "launches and the latencies are assumptions.\nThe host costs nothing. PCIe is 4.0 x16 on "
        "A100s and 5.0 x16 on H100s, not shared; InfiniBand is one 400 Gb/s port for\neach GPU. "
        f"What fits, does so in {min(map(float, _SHARES.value)):.0%} of the memory.\n{lines}"
    )
    return title, rows


def _scaling_row(step: Step, link: scaling.Link, device: hardware.Hardware) -> Row:
    found = scaling.simulate(step, device, link)
    is_alone = step.case.num_devices == 1
    return {
        "model": step.case.model,
        "GPU": step.case.target,
        "link": "-" if is_alone else link.name,
        "GPUs": step.case.num_devices,
        "simulated tokens/s": round(found.tokens_per_s),
        "per GPU": round(found.tokens_per_s / step.case.num_devices),
        "step ms": found.step_s * 1e3,
        "memory ms": found.memory_s * 1e3,
        "launches ms": found.launches_s * 1e3,
        "collectives ms": found.collectives_s * 1e3,
        "GiB of each": step.peak_bytes / 2**30,
    }


def _by_number(rows: Sequence[Row]) -> list[Row]:
    """Returns a row for each model, GPU and link: the rates by the number of GPUs."""
    numbers = sorted({row["GPUs"] for row in rows})
    found: dict[tuple[str, str, str], Row] = {}
    for model, gpu in dict.fromkeys((row["model"], row["GPU"]) for row in rows):
        here = [row for row in rows if (row["model"], row["GPU"]) == (model, gpu)]
        links = list(dict.fromkeys(row["link"] for row in here if row["link"] != "-")) or ["-"]
        for link in links:
            rates = {
                row["GPUs"]: row["simulated tokens/s"] for row in here if row["link"] in (link, "-")
            }
            found[model, gpu, link] = {"model": model, "GPU": gpu, "link": link} | {
                f"{number} GPU{'s' if number > 1 else ''}": rates.get(number) for number in numbers
            }
    return list(found.values())


def _row_of_too_large(case: Case, num_bytes: int) -> Row:
    return {
        "model": case.model,
        "GPU": case.target,
        "link": "-",
        "GPUs": case.num_devices,
        "simulated tokens/s": "does not fit",
        "per GPU": None,
        "step ms": None,
        "memory ms": None,
        "launches ms": None,
        "collectives ms": None,
        "GiB of each": num_bytes / 2**30,
    }


if __name__ == "__main__":
    command_line.run(main)
