"""What one layer of a model keeps of the tokens: the kind of its cache, and the arrays in a block.

A model gives one `CacheSpec` per layer; whoever sizes, allocates, copies or plans caches reads
these and assumes nothing else about the layers. Sizes as in `pallas_paged.kv_cache`.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_paged.kv_cache import KVCache

CacheKind = Literal["full_attention", "sliding_window", "latent", "recurrent"]
"""What a layer's cache is.

"full_attention" and "sliding_window" hold keys and values; a query sees all of them, or the last
few. "latent" holds one compressed vector per token, which keys and values are made of. "recurrent"
holds one state per sequence, however many tokens it has.
"""


@dataclasses.dataclass(frozen=True)
class BlockArray:
    """One array of a layer's cache.

    Attributes:
      name: a field of `KVCache` where the layer keeps keys and values.
      shape: of one block, `[Hk, S, D]` for keys; of one sequence's state in a "recurrent" layer.
      dtype: of its numbers.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of one block, or of one sequence's state."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """The cache of one layer.

    Attributes:
      kind: see `CacheKind`.
      arrays: what is in it, in the order of `KVCache`'s fields.
      block_size: S, tokens per block; None for "recurrent".
      sliding_window: how many tokens a query sees, itself included; None unless that is the kind.

    Raises:
      ValueError: the kind and the rest do not fit each other.
    """

    kind: CacheKind
    arrays: tuple[BlockArray, ...]
    block_size: int | None
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        if (self.block_size is None) != (self.kind == "recurrent"):
            raise ValueError(
                f"block_size={self.block_size} of a {self.kind!r} cache: it is None where there is "
                "one state per sequence, and only there"
            )
        if (self.sliding_window is None) != (self.kind != "sliding_window"):
            raise ValueError(
                f"sliding_window={self.sliding_window} of a {self.kind!r} cache: it is given where "
                "the kind is 'sliding_window', and only there"
            )

    @classmethod
    def attention(
        cls,
        num_kv_heads: int,
        block_size: int,
        head_dim: int,
        dtype: jax.typing.DTypeLike,
        *,
        v_head_dim: int | None = None,
        sliding_window: int | None = None,
    ) -> "CacheSpec":
        """Returns the spec of a layer that keeps keys and values, as `KVCache.zeros` makes them.

        `v_head_dim` None is `head_dim`; `sliding_window` None is full attention.
        """
        block = jax.eval_shape(
            lambda: KVCache.zeros(
                1, num_kv_heads, block_size, head_dim, dtype, v_head_dim=v_head_dim
            )
        )
        arrays = tuple(
            BlockArray(name, array.shape[1:], array.dtype)
            for name, array in block._asdict().items()
            if array is not None
        )
        kind: CacheKind = "full_attention" if sliding_window is None else "sliding_window"
        return cls(kind, arrays, block_size, sliding_window)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, scales of quantised caches included.

        Raises:
          NotImplementedError: as `shapes` does.
        """
        self._require_keys_and_values()
        return sum(array.num_bytes for array in self.arrays)

    def shapes(self, num_blocks: int) -> KVCache:
        """Returns the shapes and dtypes of a cache of so many blocks, the null block included.

        Raises:
          NotImplementedError: the kind is one that nothing can allocate yet.
        """
        self._require_keys_and_values()
        arrays: dict[str, Any] = {
            array.name: jax.ShapeDtypeStruct((num_blocks, *array.shape), array.dtype)
            for array in self.arrays
        }
        return KVCache(**arrays)

    def zeros(self, num_blocks: int, sharding: jax.sharding.Sharding | None = None) -> KVCache:
        """Returns a zeroed cache of `num_blocks` blocks; `sharding` is that of every array.

        Raises:
          NotImplementedError: as `shapes` does.
        """
        return jax.tree.map(
            lambda array: jnp.zeros(array.shape, array.dtype, device=sharding),
            self.shapes(num_blocks),
        )

    def _require_keys_and_values(self) -> None:
        if self.kind not in ("full_attention", "sliding_window"):
            raise NotImplementedError(
                f"a {self.kind!r} cache: the pool has blocks of keys and values only, for layers "
                "of the kinds 'full_attention' and 'sliding_window'"
            )


def common_window(specs: Sequence[CacheSpec]) -> int | None:
    """Returns how many tokens the layers together still see, or None if one sees them all.

    The layers of a model share their block tables: a block can go when it has left the widest of
    their windows, and stays for as long as a single layer without a window reads it.
    """
    windows = [spec.sliding_window for spec in specs]
    known = [window for window in windows if window is not None]
    return max(known) if known and len(known) == len(windows) else None
