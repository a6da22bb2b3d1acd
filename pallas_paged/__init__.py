"""Paged attention for JAX: kernels, KV cache and block tables."""

from pallas_paged import block_tables
from pallas_paged.block_tables import BlockTables
from pallas_paged.cache_spec import CacheSpec
from pallas_paged.kv_cache import (
    NULL_BLOCK,
    AttentionMetadata,
    KVCache,
    SharedPrefix,
    StaticScales,
)
from pallas_paged.ops.attention.api import attention_implementation, paged_attention
from pallas_paged.ops.block_copy.api import copy_blocks
from pallas_paged.ops.block_transfer.api import gather_blocks, scatter_blocks
from pallas_paged.ops.kv_write.api import rotate_and_write, write_kv

__all__ = [
    "NULL_BLOCK",
    "AttentionMetadata",
    "BlockTables",
    "CacheSpec",
    "KVCache",
    "SharedPrefix",
    "StaticScales",
    "attention_implementation",
    "block_tables",
    "copy_blocks",
    "gather_blocks",
    "paged_attention",
    "rotate_and_write",
    "scatter_blocks",
    "write_kv",
]
