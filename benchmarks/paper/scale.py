"""How much of the evaluation is run, and on which data."""

import dataclasses

from benchmarks.paper.traces import Data


@dataclasses.dataclass(frozen=True)
class Scale:
    """How long traces are, how many seeds and rates there are.

    Attributes:
      name: in the report.
      minutes: of a trace.
      beam_minutes: of a trace of beam searches, whose steps take the host longer.
      searches: rates that are tried to find the sustained one.
      seeds: of the figures with a confidence interval.
      num_beam_seeds: how many of them beam searches and the larger models have.
      limit_s: normalized latency up to which a rate is sustained, s/token. The paper compares rates
        "at similar latency", where its curves rise, and draws them up to 1. In a short trace they
        rise later: the queue has less time to grow.
      measured_seeds: of what is measured.
      measured_requests: of each of those runs.
      block_sizes: of what is measured; 16 is one of them.
      every_system: whether all baselines are run with each model and kind of sampling.
    """

    name: str
    minutes: float
    beam_minutes: float
    searches: int
    seeds: tuple[int, ...]
    num_beam_seeds: int
    measured_seeds: tuple[int, ...]
    measured_requests: int
    block_sizes: tuple[int, ...]
    every_system: bool = False
    limit_s: float = 0.5

    def from_seed(self, first: int) -> "Scale":
        """Returns the same with other seeds."""
        seeds, measured = (
            tuple(first + seed for seed in mine) for mine in (self.seeds, self.measured_seeds)
        )
        return dataclasses.replace(self, seeds=seeds, measured_seeds=measured)

    @property
    def few_seeds(self) -> tuple[int, ...]:
        """Those of the longer runs."""
        return self.seeds[: self.num_beam_seeds]


_SIZES = (8, 16, 32, 64, 128)
SCALES = {
    "quick": Scale("quick", 1.0, 0.5, 4, (0,), 1, (0,), 12, (16, 64), limit_s=0.2),
    "all": Scale("all", 10.0, 3.0, 5, (0, 1, 2), 1, (0, 1, 2), 48, _SIZES),
    "full": Scale("full", 60.0, 60.0, 5, (0, 1, 2), 3, (0, 1, 2, 3, 4), 96, _SIZES, True),
}


@dataclasses.dataclass(frozen=True)
class Sources:
    """Where requests come from.

    Attributes:
      sharegpt: a published file's lengths, or None for drawn ones.
      alpaca: likewise.
    """

    sharegpt: Data | None = None
    alpaca: Data | None = None

    def data(self, name: str, prefix: int = 0) -> Data:
        """Returns a data set, see `traces`."""
        file = {"sharegpt": self.sharegpt, "chat": self.sharegpt, "alpaca": self.alpaca}.get(name)
        if file is None:
            return Data(name, prefix)
        return dataclasses.replace(file, name=name, prefix=prefix)
