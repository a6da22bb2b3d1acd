"""Measures how fast a model serves requests that are all there at the start.

  python -m benchmarks.throughput                                  # the demo model
  python -m benchmarks.throughput --random_model=100m --length_scale=0.25 --baseline=static
  python -m benchmarks.throughput --model=FOLDER --dataset=ShareGPT_V3_unfiltered_cleaned_split.json

With --baseline the same requests run through the same model and programs once more, over memory
that is reserved in one piece per sequence, and the last row says what paging gains.

  python -m benchmarks.throughput --random_model=100m --num_requests=32 --logprobs=none,0,1

runs them without log-probabilities, with each token's own and with the likeliest one's besides, in
turns, and prints the medians side by side.
"""

import json
import statistics
from typing import Any

import numpy as np
from absl import flags

from benchmarks import metrics, offline, tables
from benchmarks.drive import drive
from benchmarks.workloads import Workload
from pallas_paged.engine import LLM, RequestOutputKind
from pallas_paged.models import command_line

_JSON = flags.DEFINE_string("json", None, "Also write the figures to this file.")
_LOGPROBS = flags.DEFINE_list(
    "logprobs", [], "Instead of baselines: what requests ask for, as none,0,1, side by side."
)
flags.register_validator(
    "logprobs",
    lambda names: all(name == "none" or name.isdecimal() for name in names),
    "must be a list of integers and none",
)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "With --logprobs: turns of each.", lower_bound=1)
ROWS = {
    "duration": "duration, s",
    "request_throughput": "requests/s",
    "output_throughput": "output tokens/s",
    "total_token_throughput": "all tokens/s",
    "mean_running": "mean sequences running",
    "peak_running": "most sequences running",
    "kv_used_share": "share of held KV slots in use",
    "num_steps": "programs run",
    "num_preemptions": "preemptions",
    "failed": "failed",
}


def compare_logprobs(llm: LLM, workload: Workload) -> dict[str, list[dict[str, Any]]]:
    """Returns the figures of each turn of all that is asked for."""
    llm.warm_up()
    arrivals_s = np.zeros(len(workload.requests)).tolist()
    figures: dict[str, list[dict[str, Any]]] = {name: [] for name in _LOGPROBS.value}
    for turn in range(-1, _ROUNDS.value):
        for name, turns in figures.items():
            run = drive(
                llm.engine,
                workload,
                arrivals_s,
                output_kind=RequestOutputKind.FINAL_ONLY,
                logprobs=None if name == "none" else int(name),
            )
            if turn >= 0:  # before, memory is touched for the first time
                turns.append(metrics.summarize(run.times, run.duration_s, {}) | run.figures)
    return figures


def print_logprobs(figures: dict[str, list[dict[str, Any]]]) -> None:
    """Prints medians, and the medians of each turn's ratios to the first column."""
    rates = {name: [f["output_throughput"] for f in turns] for name, turns in figures.items()}
    first = next(iter(rates.values()))
    ratios = [
        statistics.median(mine / its for mine, its in zip(rate, first, strict=True))
        for rate in rates.values()
    ]
    lines: list[list[Any]] = [["logprobs", *figures]]
    lines.append(["output tokens/s", *map(statistics.median, rates.values())])
    lines.append(["  least", *map(min, rates.values())])
    lines.append(["  most", *map(max, rates.values())])
    lines.append(["programs run", *(turns[0]["num_steps"] for turns in figures.values())])
    lines.append([f"of {next(iter(rates))}", *ratios])
    print(tables.render(lines, left=1))


def main() -> None:
    """Prints a table with a column per engine, or per number of log-probabilities."""
    llm = offline.make_llm()
    workload = offline.make_workload(llm)
    print(offline.describe(llm, workload), flush=True)
    if _LOGPROBS.value:
        found = compare_logprobs(llm, workload)
        print_logprobs(found)
        if _JSON.value:
            with open(_JSON.value, "w", encoding="utf-8") as file:
                json.dump({"workload": workload.source, "logprobs": found}, file, indent=2)
        return
    arrivals_s = np.zeros(len(workload.requests)).tolist()
    runs = offline.run_all(llm, workload, arrivals_s, RequestOutputKind.FINAL_ONLY)
    figures: dict[str, dict[str, Any]] = {
        name: metrics.summarize(run.times, run.duration_s, {}) | run.figures
        for name, run in runs.items()
    }
    paged = figures["paged"]
    ratios = {
        name: paged["output_throughput"] / other["output_throughput"]
        for name, other in figures.items()
    }
    lines: list[list[Any]] = [["", *figures]]
    lines += [[label, *(f[key] for f in figures.values())] for key, label in ROWS.items()]
    lines.append(["paged / this, output tokens/s", *ratios.values()])
    print(tables.render(lines, left=1))
    if _JSON.value:
        baselines = {name: f for name, f in figures.items() if name != "paged"}
        report = paged | {
            "workload": workload.source,
            "baselines": baselines,
            "paged_over_baseline": {name: ratios[name] for name in baselines},
        }
        with open(_JSON.value, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=2)


if __name__ == "__main__":
    command_line.run(main)
