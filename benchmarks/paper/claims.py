"""What the paper claims, beside what we find: the rows of the summary.

All claims are those of Kwon et al. 2023 (arXiv 2309.06180), sections 2, 6 and 7.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any, Literal

How = Literal["simulated", "measured on this CPU", "unmeasured"]

_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t for 95 % of both sides, with 1, 2, ... degrees of freedom."""


@dataclasses.dataclass(frozen=True)
class Range:
    """What the paper says of a figure.

    Attributes:
      text: as it says it.
      low: from here on we agree.
      high: up to here.
      value: the single figure that the range is around, if there is one.
      is_order: whether only an order is claimed: what is above 1 agrees.
    """

    text: str
    low: float
    high: float
    value: float | None = None
    is_order: bool = False

    @classmethod
    def about(cls, value: float, text: str, tolerance: float = 0.25) -> "Range":
        """Returns a range around a single figure of the paper's."""
        return cls(text, value * (1 - tolerance), value * (1 + tolerance), value)

    @classmethod
    def order(cls, text: str) -> "Range":
        """Returns the claim that a ratio is above 1."""
        return cls(text, 1.0, float("inf"), is_order=True)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the summary.

    Attributes:
      figure: of the paper.
      what: is compared.
      paper: what it says; None where we show what it does not have.
      values: ours, one for each seed.
      how: whether simulated or measured.
      data: where the requests are from.
      unit: behind a value.
      note: why it differs, or what is left out.
      chosen: what of the simulation was chosen so that this comes out; then it confirms nothing.
    """

    figure: str
    what: str
    paper: Range | None
    values: tuple[float, ...]
    how: How
    data: str
    unit: str = ""
    note: str = ""
    chosen: str = ""

    @property
    def mean(self) -> float | None:
        """Of the seeds; None where nothing was measured."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def half_width(self) -> float | None:
        """Of the 95 % confidence interval of the mean over seeds; None with fewer than two."""
        return half_width(self.values)

    @property
    def agrees(self) -> bool | None:
        """Whether our mean is in the paper's range; None where one of both is missing."""
        if self.paper is None or self.mean is None:
            return None
        return self.paper.low <= self.mean <= self.paper.high

    @property
    def verdict(self) -> str:
        """Whether it is in the range, or by how much it is not."""
        if self.paper is None:
            return ""
        if self.mean is None:
            return "unmeasured"
        if self.paper.is_order:
            return "order holds" if self.agrees else "order does not hold"
        edge = self.paper.value
        if edge is None:
            edge = self.paper.low if self.mean < self.paper.low else self.paper.high
        off = f"{abs(self.mean / edge - 1):.0%} {'below' if self.mean < edge else 'above'}"
        found = "in range" if self.agrees else off
        if self.agrees and self.paper.value is not None:
            found += f", {off}"
        return f"chosen; {found}" if self.chosen else found

    @property
    def ours(self) -> str:
        """As text, with the interval."""
        if self.mean is None:
            return "-"
        number = _number(self.mean)
        if self.half_width is not None:
            number += f" ± {_number(self.half_width)}"
        return f"{number}{self.unit}"

    def cells(self) -> list[str]:
        """Returns the columns of `HEAD`."""
        paper = "-" if self.paper is None else self.paper.text
        seeds = str(len(self.values) or "-")
        cells = (self.figure, self.what, paper, self.ours, self.verdict, self.how, seeds, self.data)
        chosen = f"{self.chosen} chosen so" if self.chosen else ""
        return [*cells, "; ".join(filter(None, (chosen, self.note)))]

    def as_dict(self) -> dict[str, Any]:
        """Returns what the JSON file has of it."""
        fields = dataclasses.asdict(self)
        if self.paper is not None and self.paper.high == float("inf"):
            fields["paper"]["high"] = None
        return fields | {
            "mean": self.mean,
            "half_width": self.half_width,
            "verdict": self.verdict,
        }


HEAD = ["figure", "what", "paper", "ours", "verdict", "how", "runs", "data", "note"]


def half_width(values: Sequence[float]) -> float | None:
    """Returns half of the 95 % confidence interval of a mean, by Student's t."""
    if len(values) < 2:
        return None
    t = _T_95[min(len(values) - 1, len(_T_95)) - 1]
    return t * statistics.stdev(values) / len(values) ** 0.5


def _number(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"
