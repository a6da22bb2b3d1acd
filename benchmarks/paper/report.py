"""The summary: a table to read, one for a README, and JSON."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from benchmarks import tables
from benchmarks.paper.claims import HEAD, Row
from benchmarks.paper.scale import Scale

_SHORT = 7
"""Columns of the table in Markdown."""


def write(
    folder: pathlib.Path, rows: Sequence[Row], scale: Scale, head: str, name: str = "summary"
) -> str:
    """Writes `summary.json`, `summary.txt` and `summary.md`, or by that name; returns the text."""
    lines = [HEAD, *(row.cells() for row in rows)]
    text = f"{head}\n\n{tables.render(lines, left=len(HEAD))}\n\n{counts(rows)}\n"
    (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    (folder / f"{name}.md").write_text(markdown(rows, head), encoding="utf-8")
    report: dict[str, Any] = {
        "scale": scale.name,
        "about": head,
        "rows": [row.as_dict() for row in rows],
    }
    saved = json.dumps(report, indent=1, allow_nan=False)
    (folder / f"{name}.json").write_text(saved + "\n", encoding="utf-8")
    return text


def markdown(rows: Sequence[Row], head: str) -> str:
    """Returns what is compared with the paper's figures as a table in Markdown, without notes."""
    compared = [row.cells() for row in rows if row.paper is not None]
    lines = [HEAD, ["---"] * len(HEAD), *compared]
    table = "\n".join("| " + " | ".join(line[:_SHORT]) + " |" for line in lines)
    return f"{head}\n\n{table}\n\n{counts(rows)}\n"


def counts(rows: Sequence[Row]) -> str:
    """Returns how many claims were checked, and how many of them are in the paper's range."""
    checked = [row for row in rows if row.agrees is not None and not row.chosen]
    orders = [row for row in checked if row.paper is not None and row.paper.is_order]
    ranges = [row for row in checked if row not in orders]
    chosen = sum(bool(row.chosen) for row in rows)
    unmeasured = sum(row.how == "unmeasured" for row in rows)
    others = len(rows) - len(checked) - chosen - unmeasured
    return (
        f"{sum(bool(row.agrees) for row in ranges)} of {len(ranges)} figures are in the paper's "
        f"range, {sum(bool(row.agrees) for row in orders)} of {len(orders)} orders hold; by "
        f"{chosen} figures something was chosen; {unmeasured} unmeasured; {others} rows have no "
        "figure of the paper's"
    )
