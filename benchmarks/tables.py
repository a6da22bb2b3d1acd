"""Tables on standard output."""

from collections.abc import Sequence
from typing import Any


def cell(value: Any) -> str:
    """Returns a figure as text; what was not measured is a dash."""
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def render(lines: Sequence[Sequence[Any]], left: int = 0) -> str:
    """Returns lines of cells in columns; the first `left` columns are flush left."""
    cells = [[cell(value) for value in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rows = [
        "  ".join(
            text.ljust(width) if i < left else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]
    return "\n".join(row.rstrip() for row in rows)


def show(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Prints rows with the same keys as a table."""
    print(f"\n{title}")
    print(render([list(rows[0]), *(list(row.values()) for row in rows)]))
