"""The summary: a table to read, one for a README, and JSON."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from benchmarks import tables
from benchmarks.paper.claims import HEAD, Row
from benchmarks.paper.scale import Scale


def write(folder: pathlib.Path, rows: Sequence[Row], scale: Scale, head: str) -> str:
    """Writes `summary.json`, `summary.txt` and `summary.md`; returns the text."""
    lines = [HEAD, *(row.cells() for row in rows)]
    text = f"{head}\n\n{tables.render(lines, left=len(HEAD))}\n\n{counts(rows)}\n"
    (folder / "summary.txt").write_text(text, encoding="utf-8")
    (folder / "summary.md").write_text(markdown(rows, head), encoding="utf-8")
    report: dict[str, Any] = {
        "scale": scale.name,
        "about": head,
        "rows": [row.as_dict() for row in rows],
    }
    (folder / "summary.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return text


def markdown(rows: Sequence[Row], head: str) -> str:
    """Returns the table in Markdown."""
    lines = [HEAD, ["---"] * len(HEAD), *(row.cells() for row in rows)]
    return f"{head}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def counts(rows: Sequence[Row]) -> str:
    """Returns how many claims were checked, and how many of them are in the paper's range."""
    checked = [row for row in rows if row.agrees is not None]
    agree = sum(bool(row.agrees) for row in checked)
    unmeasured = sum(row.how == "unmeasured" for row in rows)
    return (
        f"{agree} of {len(checked)} figures are in the paper's range; {unmeasured} unmeasured; "
        f"{len(rows) - len(checked) - unmeasured} rows have no figure of the paper's"
    )
