"""All figures, in the paper's order."""

from benchmarks.paper.figures import block_sizes, memory, prefixes, rates, sampling
from benchmarks.paper.figures.figure import Figure
from benchmarks.paper.measured import MEASURED

FIGURES: tuple[Figure, ...] = (
    memory.FIGURE,
    rates.FIGURE,
    sampling.FIGURE,
    prefixes.FIGURE,
    block_sizes.FIGURE,
)
NAMES = tuple(sorted({name for figure in FIGURES for name in figure.names} | set(MEASURED)))
"""What can be asked for."""
