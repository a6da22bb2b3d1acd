"""Measures how fast a model serves requests that are all there at the start.

  python -m benchmarks.throughput                                  # the demo model
  python -m benchmarks.throughput --random_model=100m --length_scale=0.25 --baseline=static
  python -m benchmarks.throughput --model=FOLDER --dataset=ShareGPT_V3_unfiltered_cleaned_split.json

With --baseline the same requests run through the same model and programs once more, over memory
that is reserved in one piece per sequence, and the last row says what paging gains.
"""

import json
from typing import Any

import numpy as np
from absl import flags

from benchmarks import metrics, offline, tables
from pallas_paged.engine import RequestOutputKind
from pallas_paged.models import command_line

_JSON = flags.DEFINE_string("json", None, "Also write the figures to this file.")
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


def main() -> None:
    """Prints a table with a column per engine."""
    llm = offline.make_llm()
    workload = offline.make_workload(llm)
    print(offline.describe(llm, workload), flush=True)
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
