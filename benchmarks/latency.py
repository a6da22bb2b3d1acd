"""Measures latencies while requests arrive at a given rate.

  python -m benchmarks.latency --request_rate=4
  python -m benchmarks.latency --random_model=100m --length_scale=0.25 --request_rate=2 \
      --goodput=ttft:500,tpot:100 --baseline=static,orca-max

Requests arrive in real time, at --burstiness=1 as a Poisson process, and the engine runs in this
process, without a server. A request's clock starts when it was due. With --baseline the same
arrivals meet the same model over memory reserved in one piece per sequence.
"""

import json
from typing import Any

from absl import flags

from benchmarks import arrivals, metrics, offline, tables
from pallas_paged.models import command_line

_REQUEST_RATE = flags.DEFINE_float("request_rate", 4.0, "Requests per second; inf: all at once.")
_BURSTINESS = flags.DEFINE_float(
    "burstiness", 1.0, "Shape of the gamma distributed gaps: 1 Poisson, below 1 bursts."
)
_GOODPUT = flags.DEFINE_list(
    "goodput", [], "Limits in ms, such as ttft:500,tpot:50,e2el:9000, that good requests keep."
)
_JSON = flags.DEFINE_string("json", None, "Also write the figures to this file.")
ROWS = {
    **metrics.ROWS,
    "mean_running": "mean sequences running",
    "kv_used_share": "share of held KV slots in use",
    "num_preemptions": "preemptions",
    "failed": "failed",
}


def main() -> None:
    """Prints a table with a column per engine."""
    limits_ms = metrics.parse_limits(_GOODPUT.value)
    rate, burstiness, seed = _REQUEST_RATE.value, _BURSTINESS.value, flags.FLAGS.seed
    arrivals.arrival_times(1, rate, burstiness, seed)  # refuses before anything is compiled
    llm = offline.make_llm()
    workload = offline.make_workload(llm)
    due = arrivals.arrival_times(len(workload.requests), rate, burstiness, seed)
    print(offline.describe(llm, workload))
    print(f"arrivals: {rate:g} requests/s, burstiness {burstiness:g}", flush=True)
    runs = offline.run_all(llm, workload, due.tolist())
    figures: dict[str, dict[str, Any]] = {
        name: metrics.summarize(run.times, run.duration_s, limits_ms) | run.figures
        for name, run in runs.items()
    }
    paged = figures["paged"]
    key = "normalized_latency_s_per_token"
    ratios = {
        name: other[key] / paged[key] if other[key] and paged[key] else None
        for name, other in figures.items()
    }
    lines: list[list[Any]] = [["", *figures]]
    lines += [[label, *(f[row] for f in figures.values())] for row, label in ROWS.items()]
    lines.append(["this / paged, normalized latency", *ratios.values()])
    print(tables.render(lines, left=1))
    if _JSON.value:
        baselines = {name: f for name, f in figures.items() if name != "paged"}
        report = paged | {
            "workload": workload.source,
            "request_rate": rate if rate < float("inf") else "inf",
            "burstiness": burstiness,
            "goodput_limits_ms": limits_ms,
            "baselines": baselines,
            "baseline_over_paged": {name: ratios[name] for name in baselines},
        }
        with open(_JSON.value, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=2)


if __name__ == "__main__":
    command_line.run(main)
