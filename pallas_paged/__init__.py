"""Paged attention for JAX: kernels, KV cache and block tables."""

from pallas_paged import block_tables
from pallas_paged.block_tables import BlockTables

__all__ = ["BlockTables", "block_tables"]
