"""What the kernels of a step are specialised for, whatever the chip."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_paged.ops.attention.work_list import SequenceField
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


class StepProblem(AttentionProblem):
    """What a kernel that computes a whole step, in runs of `max_tokens` tokens, has of its own.

    A run on one KV head is `rows` query rows. Layouts are those of numbers in registers.
    """

    @property
    def rows(self) -> int:
        """M: the query rows of a run on one KV head, padded."""
        raise NotImplementedError

    @property
    def columns(self) -> int:
        """What configurations are looked up by, as for other chips: the same as `rows`."""
        return self.rows

    @property
    def piece_keys(self) -> int:
        """Keys whose logits are computed at a time. Those that have scales are in one block."""
        raise NotImplementedError

    def layout(self, kind: str) -> Any:
        """Returns the layout "ACC" of logits and sums."""
        raise NotImplementedError

    @property
    def row_layout(self) -> Any:
        """The layout of one number per row."""
        return self.layout("ACC").reduce(1)

    @property
    def unit(self) -> float:
        """What stored numbers are multiplied by as they are converted; the scales make up for it.

        A power of two. Such products are float16 numbers without any operation of their own.
        """
        if not self.is_quantised or jnp.dtype(self.dtype) != jnp.float16:
            return 1.0
        return 2.0**-6 if jnp.dtype(self.cache_dtype) == jnp.int8 else 2.0**-8

    @property
    def chunks(self) -> tuple[Any, ...]:
        """Slices of head_dim: what is loaded and multiplied at a time, to need few registers."""
        width = next(w for w in (64, 32, 16) if self.head_dim % w == 0)
        return tuple(pl.ds(begin, width) for begin in range(0, self.head_dim, width))

    @property
    def number_swizzle(self) -> int:
        """Bytes of a row of the tiles in which converted numbers lie: a chunk's."""
        return int(self.chunks[0].size) * jnp.dtype(self.dtype).itemsize

    @property
    def query_field(self) -> int:
        """The column of `WorkList.sequences` that says where a run's packed queries are."""
        return SequenceField.FIRST_TOKEN if self.max_tokens == 1 else SequenceField.RUN
