"""The small checkpoints in `data/` and what transformers computes with them.

`record_references.py` made both.
"""

import dataclasses
import functools
from pathlib import Path

import numpy as np

DATA = Path(__file__).parent / "data"
REFERENCES = tuple(sorted(path.parent.name for path in DATA.glob("*/reference.npz")))
"""Names of the checkpoints."""

MARGIN = 1e-3
"""Of the top two logits: below it the greedy token may differ, and all that follow it."""


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """What transformers computes in float32 with one checkpoint.

    Attributes:
      path: the model folder.
      prompts: i32[length] each, of many lengths.
      logits: f32[length, V] at every position of each of the first `len(logits)` prompts.
      greedy: i32[P, G], the greedy continuation of each prompt; no token ends it.
      margins: f32[P, G], difference of the top two logits where each greedy token was chosen.
      inv_freq: f32[D / 2], angle per position of the rotary embedding; None without one.
    """

    path: Path
    prompts: tuple[np.ndarray, ...]
    logits: tuple[np.ndarray, ...]
    greedy: np.ndarray
    margins: np.ndarray
    inv_freq: np.ndarray | None

    def num_comparable(self, prompt: int) -> int:
        """Returns how many of a prompt's greedy tokens have no margin below `MARGIN` before."""
        ambiguous = np.flatnonzero(self.margins[prompt] < MARGIN)
        return int(ambiguous[0]) if len(ambiguous) else self.greedy.shape[1]


@functools.cache
def load_reference(name: str) -> Reference:
    """Returns what was recorded for the checkpoint `name`, one of `REFERENCES`."""
    with np.load(DATA / name / "reference.npz") as arrays:
        ends = np.cumsum(arrays["prompt_lengths"])
        with_logits = ends[ends <= len(arrays["logits"])]
        return Reference(
            path=DATA / name,
            prompts=tuple(np.split(arrays["prompts"], ends[:-1])),
            logits=tuple(np.split(arrays["logits"], with_logits[:-1])),
            greedy=arrays["greedy"],
            margins=arrays["margins"],
            inv_freq=arrays.get("inv_freq"),
        )
