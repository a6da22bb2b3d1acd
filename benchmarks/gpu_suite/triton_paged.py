"""Paged decode attention in Triton, as PyTorch's serving engines write it: a peer of ours.

Flash decoding (Dao et al., 2023): a program per (KV head, split, sequence) walks its share of the
sequence's pages, and a second kernel merges the splits. Triton and torch are imported when the
kernels are built, because JAX's users need neither.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    import triton.language as tl

ROWS = 16
"""The fewest rows of `tl.dot`; the query heads of a KV head are padded to them."""
PIECE = 16
"""Splits that are merged at a time."""
HEAD_DIMS = (64, 128)
PAGE_SIZES = (16, 32, 64)
MAX_GROUP = 8


class Config(NamedTuple):
    """How a program works.

    Attributes:
      tile: tokens whose keys and values are loaded at a time.
      warps: warps of a program.
      stages: of Triton's pipeline. Half of them go into the way through the block table: 3, 5 and
        7 keep one, two and three tiles in shared memory.
    """

    tile: int
    warps: int
    stages: int


CONFIGS = (Config(64, 4, 5), Config(64, 4, 3), Config(64, 4, 7), Config(128, 8, 3))
"""What is tried. Triton 3.6 compiles all of them for an H100 without spilling registers; 3.9 spills
8 bytes of the last at head_dim 128."""


def _attend(  # type: ignore[no-untyped-def]
    q,  # [B, Hk * group, D]
    k_pages,  # [P, Hk, page_size, D]
    v_pages,  # [P, Hk, page_size, D]
    tables,  # [B, M]
    lens,  # [B]
    outs,  # [B, Hk * group, S, D]
    sums,  # [B, Hk * group, S]
    scale_log2,
    pages_per_row,
    head_dim: tl.constexpr,
    page_size: tl.constexpr,
    group: tl.constexpr,
    tile: tl.constexpr,
    rows: tl.constexpr,
):
    """Attends over one split; writes its output and the binary logarithm of its weights' sum.

    A split without tokens writes zeros and -inf. Rows of pages that hold no token are not read.
    """
    head, split, seq = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_heads, num_splits = tl.num_programs(0), tl.num_programs(1)
    length = tl.load(lens + seq)
    share = tl.cdiv(tl.cdiv(length, tile), num_splits) * tile
    first = split * share
    end = tl.minimum(first + share, length)
    row = tl.arange(0, rows)
    dim = tl.arange(0, head_dim)
    query = (seq * num_heads + head) * group + row
    is_query = row < group
    queries = tl.load(q + query[:, None] * head_dim + dim[None, :], mask=is_query[:, None], other=0)
    top = tl.full([rows], float("-inf"), tl.float32)
    total = tl.zeros([rows], tl.float32)
    acc = tl.zeros([rows, head_dim], tl.float32)
    for start in range(first, end, tile):
        token = start + tl.arange(0, tile)
        seen = token < end
        page = tl.load(tables + seq * pages_per_row + token // page_size, mask=seen, other=0)
        slot = (page.to(tl.int64) * num_heads + head) * page_size + token % page_size
        keys = tl.load(
            k_pages + slot[None, :] * head_dim + dim[:, None], mask=seen[None, :], other=0
        )  # [D, tile]
        values = tl.load(
            v_pages + slot[:, None] * head_dim + dim[None, :], mask=seen[:, None], other=0
        )  # [tile, D]
        scores = tl.dot(queries, keys) * scale_log2  # [rows, tile]
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None])
        top = new_top
    total = tl.where(total > 0, total, 1.0)
    part = query * num_splits + split
    acc = (acc / total[:, None]).to(outs.dtype.element_ty)
    tl.store(outs + part[:, None] * head_dim + dim[None, :], acc, mask=is_query[:, None])
    tl.store(sums + part, top + tl.log2(total), mask=is_query)


def _merge(  # type: ignore[no-untyped-def]
    outs,  # [B * Hq, S, D]
    sums,  # [B * Hq, S]
    out,  # [B * Hq, D]
    num_splits,
    head_dim: tl.constexpr,
    most: tl.constexpr,
    piece: tl.constexpr,
):
    """Weighs one query's splits, at most `most`, by their shares of the sum of all weights."""
    query = tl.program_id(0)
    every = tl.arange(0, most)
    logs = tl.load(sums + query * num_splits + every, mask=every < num_splits, other=float("-inf"))
    top = tl.max(logs, 0)
    total = tl.sum(tl.exp2(logs - top), 0)
    dim = tl.arange(0, head_dim)
    acc = tl.zeros([head_dim], tl.float32)
    for start in range(0, num_splits, piece):
        split = start + tl.arange(0, piece)
        there = split < num_splits
        part = query * num_splits + split
        weights = tl.exp2(tl.load(sums + part, mask=there, other=float("-inf")) - top)
        piece_outs = tl.load(
            outs + part[:, None] * head_dim + dim[None, :], mask=there[:, None], other=0
        )
        acc += tl.sum(weights[:, None] * piece_outs, 0)
    tl.store(out + query * head_dim + dim, (acc / total).to(out.dtype.element_ty))


@functools.cache
def kernels() -> tuple[Any, Any]:
    """Returns both kernels as functions of Triton's; interpreted where TRITON_INTERPRET says so.

    Raises:
      ImportError: if Triton is not installed.
    """
    global tl  # it looks for its language among the globals of a kernel
    import triton
    import triton.language as tl

    return triton.jit(_attend), triton.jit(_merge)


def num_splits(num_programs: int, max_len: int, tile: int, num_sms: int) -> int:
    """Returns into how many pieces to split each sequence, so that the SMs have two programs each.

    Args:
      num_programs: sequences times KV heads.
      max_len: tokens of the longest sequence.
      tile: tokens that a program loads at a time; no piece is smaller.
      num_sms: of the GPU.
    """
    return max(1, min(2 * num_sms // num_programs, math.ceil(max_len / tile)))


def paged_decode(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    splits: int,
    config: Config = CONFIGS[0],
) -> torch.Tensor:
    """Returns the attention of each sequence's last token over its pages, like q.

    Args:
      q: bf16 or f16[B, Hq, D], with D 64 or 128. All tensors are contiguous, on one device.
      k_pages: like q[P, Hk, page_size, D], with page_size 16, 32 or 64, and Hq / Hk in 1..8.
      v_pages: like k_pages.
      block_tables: i32[B, M], the pages of each sequence in order; what lies beyond its last page
        is not read.
      seq_lens: i32[B], each in 1..M * page_size.
      splits: pieces that each sequence is split into, at least 1.
      config: how a program works; it changes no more than the last bits.

    Raises:
      ValueError: if sizes or dtypes are none of these.
      NotImplementedError: for bfloat16 where kernels are interpreted: Triton's interpreter
        multiplies its bits as if they were integers.
      ImportError: if Triton is not installed.
    """
    import torch

    batch, num_q_heads, head_dim = q.shape
    _, num_kv_heads, page_size, _ = k_pages.shape
    group = num_q_heads // num_kv_heads
    if head_dim not in HEAD_DIMS or page_size not in PAGE_SIZES or splits < 1:
        raise ValueError(
            f"head_dim={head_dim}, page_size={page_size}, splits={splits}: must be one of"
            f" {HEAD_DIMS}, one of {PAGE_SIZES} and at least 1"
        )
    if num_q_heads % num_kv_heads or group > MAX_GROUP:
        raise ValueError(f"{num_q_heads=} must be 1 to {MAX_GROUP} times {num_kv_heads=}")
    tensors = q, k_pages, v_pages, block_tables, seq_lens
    dtypes = [x.dtype for x in tensors]
    if dtypes != [q.dtype] * 3 + [torch.int32] * 2 or not all(x.is_contiguous() for x in tensors):
        raise ValueError(
            "q, k_pages and v_pages must have one dtype, block_tables and seq_lens int32, and all"
            f" must be contiguous; dtypes are {dtypes}"
        )
    if q.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"q.dtype={q.dtype} must be bfloat16 or float16")
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":
        raise NotImplementedError("Triton's interpreter cannot multiply bfloat16; use float16")
    attend, merge = kernels()
    out = torch.empty_like(q)
    dtype = torch.float32 if splits > 1 else q.dtype
    outs = q.new_empty((batch, num_q_heads, splits, head_dim), dtype=dtype) if splits > 1 else out
    sums = q.new_empty((batch, num_q_heads, splits), dtype=torch.float32)
    scale_log2 = math.log2(math.e) / math.sqrt(head_dim)
    attend[num_kv_heads, splits, batch](
        *tensors,
        outs,
        sums,
        scale_log2,
        block_tables.shape[1],
        head_dim=head_dim,
        page_size=page_size,
        group=group,
        tile=config.tile,
        rows=ROWS,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    if splits > 1:
        most = 1 << (splits - 1).bit_length()
        merge[(batch * num_q_heads,)](
            outs, sums, out, splits, head_dim=head_dim, most=most, piece=PIECE, num_warps=4
        )
    return out
