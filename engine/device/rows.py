"""What every step keeps on the device of the allocator's rows: last tokens and block tables."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Rows(NamedTuple):
    """Of R rows, and one more that padding reads and writes.

    Attributes:
      last_tokens: i32[R + 1], the last token sampled in each row.
      block_tables: i32[R + 1, M], what `pallas_paged.engine.core.table_edits` has written. Behind a
        row's last block may lie any block.
    """

    last_tokens: jax.Array
    block_tables: jax.Array

    @classmethod
    def zeros(
        cls, num_rows: int, table_width: int, device: jax.sharding.Sharding | None = None
    ) -> "Rows":
        """Returns R rows that nobody uses, with tables of M null blocks."""
        shapes = (num_rows + 1,), (num_rows + 1, table_width)
        return cls(*(jnp.zeros(shape, jnp.int32, device=device) for shape in shapes))


def edit_tables(rows: Rows, places: jax.Array, blocks: jax.Array) -> Rows:
    """Returns the rows, to be donated, with `blocks` i32[K] at the tables' `places` i32[K].

    A place is row * M + column; one that comes twice gets one of its blocks.
    """
    tables = rows.block_tables
    flat = tables.reshape(-1).at[places].set(blocks)
    return rows._replace(block_tables=flat.reshape(tables.shape))
