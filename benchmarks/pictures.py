"""Pictures of what benchmarks measure: matplotlib, which only the extra `bench` installs."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> "Figure":
    """Returns an empty figure; programs ask for it before they measure.

    Args:
      width: in inches.
      height: in inches.

    Raises:
      ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            "--plot needs matplotlib, which the extra `bench` installs; --json needs nothing"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: "Figure", path: str) -> None:
    """Writes `figure` to `path`, in the format that its ending names."""
    figure.savefig(path, dpi=120)
