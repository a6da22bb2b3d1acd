"""What the kernels of a step are specialised for, whatever the chip."""

import dataclasses
from typing import Any

from pallas_paged.quantisation import is_quantised


@dataclasses.dataclass(frozen=True)
class AttentionProblem:
    """What a kernel is specialised for.

    Attributes:
      num_q_heads, num_kv_heads, head_dim, block_size: Hq, Hk, D, S.
      dtype: of queries and the output.
      cache_dtype: of keys and values: the same, or a quantised one, and then they have scales.
      max_tokens: the most query tokens that the kernel takes of a sequence, or at a time.
      scale, sliding_window, logits_soft_cap: options of `paged_attention`.
      has_alibi, has_sinks: whether slopes and sinks are given.
    """

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: Any
    cache_dtype: Any
    max_tokens: int
    scale: float
    sliding_window: int | None = None
    logits_soft_cap: float | None = None
    has_alibi: bool = False
    has_sinks: bool = False

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def is_quantised(self) -> bool:
        """Whether keys and values have scales, and have to be converted."""
        return is_quantised(self.cache_dtype)

    def copies(self, tile: int) -> tuple[int, int]:
        """Returns (copies per tile, rows of each) of the keys: one per block or part of one."""
        rows = min(tile, self.block_size)
        return tile // rows, rows
