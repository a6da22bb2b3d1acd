"""From the stages' files to one JSON file, one table to read, and a summary of bounded size."""

import collections
import json
import pathlib
from collections.abc import Sequence

from benchmarks import tables
from benchmarks.gpu_suite import stage as stages
from benchmarks.gpu_suite.stage import Stage

SUMMARY_BYTES = 6000
_FIRST_BROKEN = 8
"""Broken cases of a stage that come before any figures."""


def write(folder: pathlib.Path, all_stages: Sequence[Stage]) -> str:
    """Writes `suite.json` and `suite.txt` from what there is by now; returns the text."""
    results = {stage.name: stages.results(folder, stage.name) for stage in all_stages}
    device = results["device"].get("description", {})
    report = {"device": device} | {
        "stages": {name: list(rows.values()) for name, rows in results.items()}
    }
    (folder / "suite.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    parts = [_heading(folder)]
    parts += [_table(stage, results[stage.name]) for stage in all_stages]
    text = "\n\n".join(parts) + "\n"
    (folder / "suite.txt").write_text(text, encoding="utf-8")
    return text


def summary(folder: pathlib.Path, all_stages: Sequence[Stage], first: str, last: str) -> str:
    """Returns what matters most in at most `SUMMARY_BYTES` bytes.

    All counts; then what is wrong; then figures, those of the stages' aims first.

    Args:
      folder: with the results.
      all_stages: in order.
      first, last: lines for its beginning and its end.
    """
    lines: list[tuple[int, str]] = [(0, line) for line in (first, *_heading(folder).split("\n"))]
    for stage in all_stages:
        rows = stages.results(folder, stage.name)
        if not rows:
            continue
        lines.append((0, _title(stage, rows)))
        shown = broken = 0
        for row in rows.values():
            text = f"  {row['case']}: "
            if row["status"] in stages.BROKEN:
                reason = " ".join(str(row.get("reason") or _figures(stage, row)).split())
                line = f"{text}{row['status'].upper()}: {reason[:180]}"
                lines.append((1 if broken < _FIRST_BROKEN else 3, line))
                broken += 1
            elif row["status"] == "ok" and _figures(stage, row):
                lines.append((2 if shown < stage.aims else 4, text + _figures(stage, row)))
                shown += 1
    lines.append((0, last))
    left = SUMMARY_BYTES - 100
    kept = set()
    for priority in sorted({priority for priority, _ in lines}):
        for number, (own, line) in enumerate(lines):
            size = len(line.encode()) + 1
            if own == priority and size <= left:
                left -= size
                kept.add(number)
    chosen = [line for number, (_, line) in enumerate(lines) if number in kept]
    if len(kept) < len(lines):
        chosen.insert(-1, f"({len(lines) - len(kept)} lines more in suite.txt, see results.tar.gz)")
    return "\n".join(chosen) + "\n"


def _heading(folder: pathlib.Path) -> str:
    """Returns what was measured, and where, in a few lines."""
    device = stages.results(folder, "device").get("description", {})
    versions = ", ".join(f"{name} {v}" for name, v in device.get("versions", {}).items())
    lines = [
        f"{device.get('device', 'device unknown')}, {device.get('date', 'not dated')}",
        f"{versions}; sources {device.get('sources', 'unknown')}",
        str(device.get("runtime", "")),
    ]
    if device.get("platform") not in (None, "gpu"):
        lines.append(
            "NO GPU: kernels are interpreted, and no figure below is a measurement of one."
        )
    return "\n".join(line for line in lines if line)


def _title(stage: Stage, rows: dict[str, stages.Row]) -> str:
    counts = collections.Counter(row["status"] for row in rows.values())
    return f"{stage.name}: " + ", ".join(f"{count} {status}" for status, count in counts.items())


def _figures(stage: Stage, row: stages.Row) -> str:
    return ", ".join(
        f"{column} {stages.figure(row[column])}"
        for column in stage.columns
        if row.get(column) is not None
    )


def _table(stage: Stage, rows: dict[str, stages.Row]) -> str:
    if not rows:
        return f"{stage.name}: unmeasured, it was not run"
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
    return "\n".join([_title(stage, rows), tables.render(lines, left=2), *notes])
