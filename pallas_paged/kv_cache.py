"""The KV cache of one layer, and the metadata that says how a step's tokens use it.

Sizes, here and in every module of this layer: T query tokens, B sequences, M blocks per sequence,
N blocks, S tokens per block, Hq / Hk query / KV heads, D head_dim. Dv is the head_dim of values,
where it may be another one than that of keys.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int8, Int32

from pallas_paged._namespaces import inside
from pallas_paged.quantisation import is_quantised, quantise

NULL_BLOCK = 0
"""Never allocated: padded table entries and padded slots point to it."""


CacheArray = Float[Array, "N Hk S D"] | Int8[Array, "N Hk S D"]
"""Keys of one layer, or values as wide as they are."""
ValueArray = Float[Array, "N Hk S Dv"] | Int8[Array, "N Hk S Dv"]
"""Values of one layer."""


class KVCache(NamedTuple):
    """Keys and values of one layer; one array each, so that a step updates them in place.

    Attributes:
      k: keys, `[N, Hk, S, D]`.
      v: values, `[N, Hk, S, Dv]`.
      k_scale: f32 `[N, Hk, S]`, one per token and KV head, where the keys are quantised (dtype
        float8_e4m3fn or int8; see `pallas_paged.quantisation`), else None: key = stored * scale.
      v_scale: likewise, of the values.
    """

    k: CacheArray
    v: ValueArray
    k_scale: Float32[Array, "N Hk S"] | None = None
    v_scale: Float32[Array, "N Hk S"] | None = None

    @classmethod
    def zeros(
        cls,
        num_blocks: int,
        num_kv_heads: int,
        block_size: int,
        head_dim: int,
        dtype: jax.typing.DTypeLike,
        sharding: jax.sharding.Sharding | None = None,
        *,
        v_head_dim: int | None = None,
    ) -> "KVCache":
        """Returns a zeroed cache of `num_blocks` blocks, the null block included.

        It has scales if `dtype` is float8_e4m3fn or int8. `sharding` is that of every array.
        `v_head_dim` is Dv; None is `head_dim`.
        """
        slots = (num_blocks, num_kv_heads, block_size)
        widths = (head_dim, head_dim if v_head_dim is None else v_head_dim)
        k, v = (jnp.zeros((*slots, width), dtype, device=sharding) for width in widths)
        if not is_quantised(dtype):
            return cls(k, v)
        return cls(k, v, *(jnp.zeros(slots, jnp.float32, device=sharding) for _ in range(2)))

    @property
    def block_size(self) -> int:
        """S, the number of tokens in a block."""
        return self.k.shape[2]


class StaticScales(NamedTuple):
    """The scales with which one layer's keys and values are quantised, instead of each row's own.

    A checkpoint that was calibrated for a quantised cache brings them.

    Attributes:
      k: f32[Hk], positive, of the keys of each KV head.
      v: f32[Hk], of the values.
    """

    k: Float32[Array, "Hk"]
    v: Float32[Array, "Hk"]


def to_stored(
    k: jax.Array, v: jax.Array, kv_cache: KVCache, static_scales: StaticScales | None = None
) -> KVCache:
    """Returns keys and values as `kv_cache` stores them, scales included.

    Args:
      k: `[..., Hk, D]`.
      v: `[..., Hk, Dv]`.
      kv_cache: of which only the dtype is read.
      static_scales: of quantised caches, in the place of the rows' own.
    """
    dtype = kv_cache.k.dtype
    if not is_quantised(dtype):
        return KVCache(k.astype(dtype), v.astype(dtype))
    given = [
        None if scale is None else jnp.broadcast_to(scale, k.shape[:-1])
        for scale in static_scales or (None, None)
    ]
    (k, k_scale), (v, v_scale) = (
        quantise(x, dtype, scale) for x, scale in zip((k, v), given, strict=True)
    )
    return KVCache(k, v, k_scale, v_scale)


def check_static_scales(static_scales: StaticScales | None, kv_cache: KVCache) -> None:
    """Raises `ValueError` unless a cache's rows can be quantised with these scales, if any."""
    if static_scales is None:
        return
    if not is_quantised(kv_cache.k.dtype):
        raise ValueError(f"static_scales are for quantised caches, not for {kv_cache.k.dtype}")
    num_kv_heads = kv_cache.k.shape[1]
    for name, scale in static_scales._asdict().items():
        if scale.shape != (num_kv_heads,) or scale.dtype != jnp.float32:
            raise ValueError(
                f"static_scales.{name} is {scale.dtype}{list(scale.shape)}, must be "
                f"float32[{num_kv_heads}]: one number per KV head"
            )


def check_cache(kv_cache: KVCache) -> None:
    """Raises `ValueError` unless the arrays of a cache fit each other."""
    k, v = kv_cache.k, kv_cache.v
    check_shapes(k, v, "kv_cache.k", "kv_cache.v")
    if k.dtype != v.dtype:
        raise ValueError(f"kv_cache.k.dtype={k.dtype} must equal kv_cache.v.dtype={v.dtype}")
    check_scales(k, kv_cache.k_scale, "kv_cache.k_scale")
    check_scales(v, kv_cache.v_scale, "kv_cache.v_scale")


def check_shapes(k: jax.Array, v: jax.Array, k_name: str, v_name: str) -> None:
    """Raises `ValueError` unless keys are `[N, Hk, S, D]` and values `[N, Hk, S, Dv]`."""
    if k.ndim != 4 or v.ndim != 4 or k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"{k_name}.shape={k.shape} and {v_name}.shape={v.shape} must both be [blocks, kv heads,"
            " block size, head_dim], and may differ in head_dim only"
        )


def check_scales(cache: jax.Array, scale: jax.Array | None, name: str) -> None:
    """Raises `ValueError` unless `scale` is what such keys or values need."""
    if not is_quantised(cache.dtype):
        if scale is not None:
            raise ValueError(f"{name} is for quantised caches; leave it None for {cache.dtype}")
    elif scale is None:
        raise ValueError(
            f"{name}=None: a cache of {cache.dtype} is quantised and needs its scales, "
            f"float32{list(cache.shape[:3])}"
        )
    elif scale.shape != cache.shape[:3] or scale.dtype != jnp.float32:
        raise ValueError(
            f"{name} is {scale.dtype}{list(scale.shape)}, must be float32{list(cache.shape[:3])}: "
            "one number per block, KV head and token"
        )


class SharedPrefix(NamedTuple):
    """The blocks with which the block tables of several sequences begin.

    Attributes:
      block_table: i32[M'], the blocks in order; what is behind `num_blocks` is not read.
      num_blocks: i32[], how many they are. The query tokens of the sequences stand behind them.
      is_shared: bool[B], whose block tables begin with them.
    """

    block_table: Int32[Array, "M2"]
    num_blocks: Int32[Array, ""]
    is_shared: Bool[Array, "B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMetadata:
    """Where each of a step's tokens stands in its sequence and in the KV cache.

    The queries of the B sequences lie one after the other along T (ragged): sequence `b` owns
    tokens `query_start_loc[b] : query_start_loc[b + 1]`, which are the last ones of its
    `seq_lens[b]` tokens. Padding: rows with `seq_lens == 0` and no query tokens, table entries and
    slots that are 0, tokens from `query_start_loc[B]` on.

    Attributes:
      positions: i32[T], each token's position in its sequence.
      slot_mapping: i32[T], `block * S + offset` where the token's key and value are written.
      block_tables: i32[B, M], the blocks of each sequence in order.
      seq_lens: i32[B], tokens per sequence, the new ones included.
      query_start_loc: i32[B + 1], prefix sums of the number of query tokens per sequence.
      max_query_len: the most query tokens any sequence may have in this step; static. 1 means a
        decode step, and lets an implementation leave out what only prefill needs. A sequence with
        more query tokens than this is outside the contract.
      min_query_len: the fewest query tokens of those that have any; static. 2 means a step of
        prompts only, and lets an implementation leave out what only decode needs. A sequence with
        fewer is outside the contract.
      shared_prefix: blocks that several sequences begin with, whose keys and values are then read
        for several of them at a time; None computes each sequence by itself. The results are the
        same, but for rounding.
    """

    positions: Int32[Array, "T"]
    slot_mapping: Int32[Array, "T"]
    block_tables: Int32[Array, "B M"]
    seq_lens: Int32[Array, "B"]
    query_start_loc: Int32[Array, "B+1"]
    max_query_len: int = dataclasses.field(metadata={"static": True})
    min_query_len: int = dataclasses.field(default=1, metadata={"static": True})
    shared_prefix: SharedPrefix | None = None

    @classmethod
    def for_decode(
        cls, block_tables: Int32[Array, "B M"], seq_lens: Int32[Array, "B"], block_size: int
    ) -> "AttentionMetadata":
        """Returns the metadata of a decode step: the last token of each sequence is its one query.

        Query b belongs to row b, so rows of padding (`seq_lens <= 0`) come after all others. Where
        the table has no place for the last token, for its entry is negative or the sequence longer
        than M blocks, the slot is 0: `write_kv` drops the token.

        Args:
          block_tables: i32[B, M], the blocks of each sequence in order.
          seq_lens: i32[B], tokens per sequence, the new one included.
          block_size: S.
        """
        block_tables, seq_lens = jnp.asarray(block_tables), jnp.asarray(seq_lens)  # from the host
        num_rows, max_blocks = block_tables.shape
        is_real = seq_lens > 0
        positions = jnp.maximum(seq_lens - 1, 0)
        rows = jnp.arange(num_rows, dtype=jnp.int32)
        blocks = block_tables.at[rows, positions // block_size].get(mode="clip")
        # The largest block whose slots int32 can number; write_kv knows how many there are.
        has_slot = inside(blocks, 2**31 // block_size) & (positions < max_blocks * block_size)
        slots = blocks * block_size + positions % block_size
        starts = jnp.cumsum(is_real.astype(jnp.int32), dtype=jnp.int32)
        return cls(
            positions=positions,
            slot_mapping=jnp.where(is_real & has_slot, slots, 0),
            block_tables=block_tables,
            seq_lens=seq_lens,
            query_start_loc=jnp.pad(starts, (1, 0)),
            max_query_len=1,
        )
