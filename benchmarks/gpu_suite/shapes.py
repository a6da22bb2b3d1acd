"""The sizes at which attention is timed, the most important first. No jax here."""

import math
from typing import NamedTuple

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
    def value_scale(self) -> float:
        """Values' standard deviation; a decode's results are then like the queries it began with.

        So one layer's result can be the next one's queries. Keys see about `context / e` values.
        """
        return round(math.sqrt(self.context / math.e), 3) if self.queries == 1 else 1.0

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
"""What has an aim of its own; timed before all others."""
_OTHER_DECODES = (
    Shape(8, 2048, "32/8", 16),
    Shape(256, 2048, "32/8", 16),
    Shape(64, 2048, "32/32", 16),
    Shape(1, 4096, "32/8", 64),
    Shape(64, 4096, "64/8", 64),
    Shape(8, 8192, "32/8", 64),
    Shape(64, 512, "32/8", 16),
    Shape(64, 4096, "32/8", 32),
    Shape(256, 512, "32/8", 16),
    Shape(1, 32768, "32/8", 64),
    Shape(32, 2048, "40/40", 16),
    Shape(1, 512, "32/8", 16),
)
PREFILL_AIMS = (
    Shape(1, 8192, "32/8", 16, 8192),
    Shape(1, 8192, "32/8", 64, 8192),
    Shape(1, 8192, "32/8", 16, 512),
)
_OTHER_PREFILLS = (
    Shape(1, 2048, "32/8", 16, 2048),
    Shape(1, 8192, "32/8", 64, 512),
    Shape(8, 1024, "32/8", 16, 1024),
    Shape(1, 32768, "32/8", 64, 32768),
    Shape(1, 8192, "32/32", 16, 8192),
    Shape(4, 2048, "64/8", 64, 2048),
)


def decode_shapes() -> list[Shape]:
    """Returns decode steps, the most important first."""
    return [*DECODE_AIMS, *_OTHER_DECODES]


def prefill_shapes() -> list[Shape]:
    """Returns whole prompts and chunks of them, the most important first."""
    return [*PREFILL_AIMS, *_OTHER_PREFILLS]
