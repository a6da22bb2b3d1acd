"""From the stages' files to one JSON file and one table to read."""

import collections
import json
import pathlib
from collections.abc import Sequence

from benchmarks import tables
from benchmarks.gpu_suite import stage as stages
from benchmarks.gpu_suite.stage import Stage


def write(folder: pathlib.Path, all_stages: Sequence[Stage]) -> str:
    """Writes `suite.json` and `suite.txt` from what there is by now; returns the text."""
    results = {stage.name: stages.results(folder, stage.name) for stage in all_stages}
    device = results["device"].get("description", {})
    report = {"device": device} | {
        "stages": {name: list(rows.values()) for name, rows in results.items()}
    }
    (folder / "suite.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    versions = ", ".join(f"{name} {v}" for name, v in device.get("versions", {}).items())
    parts = [
        f"{device.get('device', 'device unknown')}, {device.get('date', 'not dated')}\n"
        f"{versions}; sources {device.get('sources', 'unknown')}\n"
        f"{device.get('runtime', '')}"
    ]
    if device.get("platform") not in (None, "gpu"):
        parts.append(
            "NO GPU: kernels are interpreted, and no figure below is a measurement of one."
        )
    parts += [_table(stage, results[stage.name]) for stage in all_stages]
    text = "\n\n".join(parts) + "\n"
    (folder / "suite.txt").write_text(text, encoding="utf-8")
    return text


def _table(stage: Stage, rows: dict[str, stages.Row]) -> str:
    if not rows:
        return f"{stage.name}: unmeasured, it was not run"
    counts = collections.Counter(row["status"] for row in rows.values())
    title = f"{stage.name}: " + ", ".join(f"{count} {status}" for status, count in counts.items())
    shown = [column for column in stage.columns if any(column in r for r in rows.values())]
    lines = [["", "", *shown]]
    for row in rows.values():
        figures = [stages.figure(row.get(column)) for column in shown]
        lines.append([row["case"], row["status"], *figures])
    reasons = collections.defaultdict(list)
    for row in rows.values():
        for key, reason in row.items():
            if key == "reason" or key.endswith("_reason"):
                what = "" if key == "reason" else f" {key.removesuffix('_reason')}"
                reasons[f"{row['status']}{what}: {' '.join(str(reason).split())[:200]}"].append(row)
    notes = [f"  {reason} ({len(of)} x, {of[0]['case']})" for reason, of in reasons.items()]
    return "\n".join([title, tables.render(lines, left=2), *notes])
