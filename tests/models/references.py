"""The small checkpoints in `data/` and what transformers computes with them.

`record_references.py` made both.
"""

import dataclasses
import functools
from pathlib import Path

import numpy as np

from pallas_paged.models.parity import Reference

DATA = Path(__file__).parent / "data"
REFERENCES = tuple(sorted(path.parent.name for path in DATA.glob("*/reference.npz")))
"""Names of the checkpoints."""

MARGIN = 1e-3
"""Of the top two logits: below it the greedy token may differ, and all that follow it."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class CheckpointReference(Reference):
    """What transformers computes in float32 with one of the checkpoints.

    Attributes:
      path: the model folder.
      inv_freq: f32[D / 2], angle per position of the rotary embedding; None without one.
    """

    path: Path
    inv_freq: np.ndarray | None

    def num_comparable(self, prompt: int) -> int:
        """Returns how many of a prompt's greedy tokens have no margin below `MARGIN` before."""
        ambiguous = np.flatnonzero(self.margins[prompt] < MARGIN)
        return int(ambiguous[0]) if len(ambiguous) else self.greedy.shape[1]


@functools.cache
def load_reference(name: str) -> CheckpointReference:
    """Returns what was recorded for the checkpoint `name`, one of `REFERENCES`."""
    file = DATA / name / "reference.npz"
    with np.load(file) as arrays:
        inv_freq = arrays.get("inv_freq")
    recorded = Reference.load(file)
    fields = {field.name: getattr(recorded, field.name) for field in dataclasses.fields(recorded)}
    return CheckpointReference(path=file.parent, inv_freq=inv_freq, **fields)
