"""All figures, in the paper's order."""

from benchmarks.paper.figures import block_sizes, memory, prefixes, rates, sampling
from benchmarks.paper.figures.figure import Figure

FIGURES: tuple[Figure, ...] = (
    memory.FIGURE,
    rates.FIGURE,
    sampling.FIGURE,
    prefixes.FIGURE,
    block_sizes.FIGURE,
)
MEASURED = ("12", "13", "14", "15", "16", "18a", "18b", "19")
"""Those of which `benchmarks.paper.measured` has something."""
NAMES = tuple(sorted({name for figure in FIGURES for name in figure.names} | set(MEASURED)))
