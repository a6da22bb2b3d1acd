"""The sizes at which attention is timed, the most important first. No jax here."""

import itertools
import math
from typing import NamedTuple

BATCHES = (64, 1, 8, 256, 32)
HEADS = ("32/8", "32/32", "40/40")
BLOCK_SIZES = (16, 64, 32)
HEAD_DIM = 128
DTYPE_BYTES = 2
"""Everything is bfloat16."""
MAX_STEP_TOKENS = 1 << 16


class Shape(NamedTuple):
    """A step of `batch` sequences of `context` tokens, of which the last `queries` are new."""

    batch: int
    context: int
    heads: str
    block_size: int
    queries: int = 1

    @property
    def name(self) -> str:
        """How results call it."""
        new = "" if self.queries == 1 else f" new {self.queries}"
        return f"{self.batch} x {self.context}{new}, {self.heads}, block {self.block_size}"

    @property
    def num_q_heads(self) -> int:
        """Hq."""
        return int(self.heads.split("/")[0])

    @property
    def num_kv_heads(self) -> int:
        """Hk."""
        return int(self.heads.split("/")[1])

    @property
    def blocks_per_seq(self) -> int:
        """M."""
        return math.ceil(self.context / self.block_size)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values of all tokens."""
        tokens = self.batch * self.blocks_per_seq * self.block_size
        return 2 * tokens * self.num_kv_heads * HEAD_DIM * DTYPE_BYTES

    @property
    def moved_bytes(self) -> int:
        """Bytes that a step must read or write: keys, values, queries and outputs."""
        rows = 2 * self.batch * self.queries * self.num_q_heads * HEAD_DIM * DTYPE_BYTES
        return self.kv_bytes + rows

    @property
    def operations(self) -> int:
        """Operations of the two products over what each query sees."""
        first = self.context - self.queries + 1
        seen = self.batch * (first + self.context) * self.queries // 2
        return 4 * self.num_q_heads * HEAD_DIM * seen


DECODE_AIMS = (
    Shape(64, 4096, "32/8", 64),
    Shape(64, 4096, "32/8", 16),
    Shape(1, 32768, "32/8", 16),
    Shape(8, 1024, "32/8", 16),
)
"""What has an aim of its own; timed before the grid."""
PREFILL_AIMS = (
    Shape(1, 8192, "32/8", 16, 8192),
    Shape(1, 8192, "32/8", 64, 8192),
    Shape(1, 8192, "32/8", 16, 512),
)


def decode_shapes() -> list[Shape]:
    """Returns the grid of decode steps, diagonally through the orders of importance."""
    return _ordered(DECODE_AIMS, contexts=(2048, 8192, 512, 32768), prefill=False)


def prefill_shapes() -> list[Shape]:
    """Returns the grid of whole prompts."""
    return _ordered(PREFILL_AIMS, contexts=(2048, 8192, 512, 32768), prefill=True)


def _ordered(aims: tuple[Shape, ...], contexts: tuple[int, ...], prefill: bool) -> list[Shape]:
    batches = sorted(BATCHES) if prefill else BATCHES
    axes = [list(enumerate(axis)) for axis in (batches, contexts, HEADS, BLOCK_SIZES)]
    grid = [
        (
            sum(rank for rank, _ in point),
            Shape(*(value for _, value in point)),  # type: ignore[arg-type]
        )
        for point in itertools.product(*axes)
    ]
    shapes = [shape for _, shape in sorted(grid, key=lambda ranked: ranked[0])]
    if prefill:
        shapes = [shape._replace(queries=shape.context) for shape in shapes]
    return [*aims, *(shape for shape in shapes if shape not in aims)]
