"""The kernel of paged attention on CPUs, compiled by Numba.

A step's work is cut into items: a tile of one sequence's query tokens, and one KV head or all. The
rows of a KV head, one for each token and each of its query heads, share what is read of it. The
thread that XLA calls takes items, and so do XLA's other threads, until none is left; what an item
computes depends neither on who takes it nor on other sequences.

An item walks over its keys a chunk at a time with online softmax. Few rows, such as a decoded
token's, take dot products with the keys as they lie. For more rows the chunk's keys and values are
copied once as float32, the keys with the tokens side by side: scores are added up as vectors of
tokens then. Values are added up as vectors of features in both.
"""

from typing import Any, NamedTuple

import numba
import numpy as np

from pallas_paged.ops.attention.cpu import rows as rows_module
from pallas_paged.ops.attention.cpu.rows import (
    F32,
    LEAST,
    LOOSE,
    add_values,
    block_rows,
    copy_rows,
    exp,
    multiply_many,
    score,
    tanh,
    turn,
    weigh,
)
from pallas_paged.ops.cpu import registration, stored, team, tile, vectors, xla_call
from pallas_paged.ops.cpu.stored import narrow, wide
from pallas_paged.ops.cpu.team import (
    call_helpers,
    close_job,
    enter,
    is_job,
    item_is_done,
    note_of,
    open_job,
    take_item,
)
from pallas_paged.ops.cpu.tile import MAX_ROWS
from pallas_paged.ops.cpu.vectors import LANES
from pallas_paged.ops.cpu.xla_call import operand, own_address, result, size

CHUNK = 64
"""Tokens of a chunk, rounded to whole blocks."""
MAX_DOT_ROWS = 16
"""Rows of a tile up to which they take dot products."""
TILE_ROWS = 128
"""Rows of a tile at most, of whole tokens; a sequence's tiles are of one size."""
MIN_WHOLE_TILES = 16
"""Tiles from which on an item is a tile for all KV heads."""
MIN_SHARED_PAIRS = 1024
"""Pairs of a query token and a key, in all KV heads, up to which one thread does all."""
HEAD_DIMS = (64, 80, 96, 128, 192, 256)
"""Compiled for each of them; other widths share a kernel, which is slower."""


class Kind(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
      q_dtype: of queries and results: float32, or uint16 with the bits of bfloat16.
      cache_dtype: of keys and values: the same, or int8.
      head_dim: D and Dv; 0 for any.
      chunk: tokens of a chunk; 0 for any.
    """

    q_dtype: type
    cache_dtype: type
    head_dim: int
    chunk: int

    @classmethod
    def of(
        cls, q_dtype: type, cache_dtype: type, head_dim: int, v_head_dim: int, block_size: int
    ) -> "Kind":
        """Returns which kernel serves such queries and caches."""
        is_known = head_dim == v_head_dim and head_dim in HEAD_DIMS
        return cls(
            q_dtype,
            cache_dtype,
            head_dim if is_known else 0,
            CHUNK if CHUNK % block_size == 0 else 0,
        )

    @property
    def target(self) -> str:
        """The kernel's name in XLA's programs."""
        types = self.q_dtype.__name__, self.cache_dtype.__name__
        return f"pallas_paged.attention.{'.'.join(types)}.{self.head_dim}.{self.chunk}"


class Operands(NamedTuple):
    """The positions of what the kernel is called with; its results are out and lse.

    Attributes:
      q: `[T, Hq, D]`.
      k_cache: `[N, Hk, S, D]`.
      v_cache: `[N, Hk, S, Dv]`.
      block_tables: i32[B, M].
      seq_lens: i32[B].
      query_start_loc: i32[B + 1].
      options: i32[4], the sliding window, and which of soft cap, ALiBi slopes and sinks there are.
      factors: f32[2], the scale and the soft cap.
      k_scale: f32[N, Hk, S], or anything where the cache is not quantised.
      v_scale: likewise.
      alibi_slopes: f32[Hq], or anything.
      sinks: f32[Hq], or anything.
    """

    q: Any
    k_cache: Any
    v_cache: Any
    block_tables: Any
    seq_lens: Any
    query_start_loc: Any
    options: Any
    factors: Any
    k_scale: Any
    v_scale: Any
    alibi_slopes: Any
    sinks: Any


_AT = Operands(*range(len(Operands._fields)))


def load_kernel(kind: Kind) -> str:
    """Makes XLA know a kernel, and returns its name there; threads may do so side by side.

    It takes a second or two the first time; what is compiled is kept, see `xla_call.compiled`.
    """
    return registration.register(kind.target, lambda: compile_kernel(kind))


def compile_kernel(kind: Kind) -> Any:
    """Returns the kernel, called with `Operands`."""
    q_dtype, cache_dtype, known_head_dim, known_chunk = kind
    is_narrow = int(cache_dtype == np.uint16)
    asks = int(cache_dtype != np.int8)  # in products; what is int8 is copied first
    lines = asks * max(1, tile.FEW_COLUMNS * LANES * (4 - 2 * is_narrow) // tile.LINE_BYTES)
    others = xla_call.digest(rows_module, stored, team, tile, vectors, xla_call)

    def attend(address: int) -> int:
        job, is_helper = address, is_job(address)
        frame, item = enter(address)
        if frame == 0 or others < 0:  # which makes it part of what is kept
            return 0

        T, num_q_heads = size(frame, _AT.q, 0), size(frame, _AT.q, 1)
        N, num_kv_heads = size(frame, _AT.k_cache, 0), size(frame, _AT.k_cache, 1)
        block_size = size(frame, _AT.k_cache, 2)
        head_dim, v_head_dim = size(frame, _AT.k_cache, 3), size(frame, _AT.v_cache, 3)
        chunk = max(1, CHUNK // block_size) * block_size
        if known_chunk > 0:
            chunk = known_chunk
        if known_head_dim > 0:
            head_dim = v_head_dim = known_head_dim
        group = num_q_heads // num_kv_heads
        tile_tokens = max(1, TILE_ROWS // group)
        width, padded_chunk = -(-head_dim // LANES) * LANES, -(-chunk // LANES) * LANES
        B, M = size(frame, _AT.block_tables, 0), size(frame, _AT.block_tables, 1)
        cache = (N, num_kv_heads, block_size)
        queries = numba.carray(operand(frame, _AT.q), (T, num_q_heads, head_dim), q_dtype)
        k_cache = numba.carray(operand(frame, _AT.k_cache), (*cache, head_dim), cache_dtype)
        v_cache = numba.carray(operand(frame, _AT.v_cache), (*cache, v_head_dim), cache_dtype)
        tables = numba.carray(operand(frame, _AT.block_tables), (B, M), np.int32)
        lens = numba.carray(operand(frame, _AT.seq_lens), B, np.int32)
        starts = numba.carray(operand(frame, _AT.query_start_loc), B + 1, np.int32)
        options = numba.carray(operand(frame, _AT.options), 4, np.int32)
        window, has_cap, has_slopes, has_sinks = options
        scale, cap = numba.carray(operand(frame, _AT.factors), 2, np.float32)
        k_scales = numba.carray(operand(frame, _AT.k_scale), cache, np.float32)
        v_scales = numba.carray(operand(frame, _AT.v_scale), cache, np.float32)
        slopes = numba.carray(operand(frame, _AT.alibi_slopes), num_q_heads, np.float32)
        sinks = numba.carray(operand(frame, _AT.sinks), num_q_heads, np.float32)
        out = numba.carray(result(frame, 0), (T, num_q_heads, v_head_dim), q_dtype)
        lse = numba.carray(result(frame, 1), (T, num_q_heads), np.float32)

        if not is_helper:
            num_tiles, num_pairs = 0, 0
            for b in range(B):
                num_tokens = max(0, starts[b + 1] - starts[b]) if lens[b] > 0 else 0
                num_tiles += -(-num_tokens // tile_tokens)
                num_pairs += num_tokens * lens[b]
                for token in range(starts[b] + num_tokens, starts[b + 1]):
                    lse[token], out[token] = -np.inf, 0
            for token in range(starts[B], T):
                lse[token], out[token] = -np.inf, 0
            # One item for all heads reads whole blocks one after the other, if enough are left.
            num_splits = 1 if num_tiles >= MIN_WHOLE_TILES else num_kv_heads
            job = open_job(frame, own_address(), num_tiles * num_splits, num_splits)
            if num_pairs * num_kv_heads > MIN_SHARED_PAIRS:
                call_helpers(job, num_tiles * num_splits - 1)
            item = take_item(job)

        num_splits = note_of(job)
        heads_per_item = num_kv_heads // num_splits
        rows = max(min(tile_tokens, T) * group, MAX_DOT_ROWS)
        rows = -(-rows // MAX_ROWS) * MAX_ROWS  # for `multiply_many`
        q = np.zeros((rows, width), np.float32)
        s = np.empty((rows, padded_chunk), np.float32)
        sums = np.empty((rows, v_head_dim), np.float32)
        maxima = np.empty(rows, np.float32)
        denominators = np.empty(rows, np.float32)
        key_copy = np.zeros((padded_chunk, width), np.float32)
        turned = np.empty((width, padded_chunk), np.float32)
        value_copy = np.empty((chunk, v_head_dim), np.float32)

        # From the last item to the first: those with the most keys do not come last.
        b, tiles_behind, num_tiles = B, 0, 0  # of sequence b
        while item >= 0:
            tile_number, first_head = item // num_splits, item % num_splits * heads_per_item
            while tile_number >= tiles_behind + num_tiles:
                tiles_behind += num_tiles
                b -= 1
                num_tokens = max(0, starts[b + 1] - starts[b]) if lens[b] > 0 else 0
                num_tiles = -(-num_tokens // tile_tokens)
                tile_size = -(-num_tokens // max(1, num_tiles))
            past_token = starts[b + 1] - (tile_number - tiles_behind) * tile_size
            token0 = max(starts[b], past_token - tile_size)
            num_tokens = past_token - token0
            position0 = token0 + lens[b] - starts[b + 1]
            begin = max(0, position0 - window + 1) // block_size * block_size
            end = position0 + num_tokens
            last_block = (end - 1) // block_size
            head_rows = num_tokens * group
            is_copied = head_rows > MAX_DOT_ROWS
            num_heads = max(1, min(heads_per_item, MAX_DOT_ROWS // head_rows))  # at a time

            for head0 in range(first_head, first_head + heads_per_item, num_heads):
                num_heads_here = min(num_heads, first_head + heads_per_item - head0)
                num_rows = num_heads_here * head_rows
                for r in range(num_rows):
                    token = token0 + r % head_rows // group
                    head = (head0 + r // head_rows) * group + r % group
                    for d in range(head_dim):
                        q[r, d] = wide(queries[token, head, d]) * scale
                    for d in range(v_head_dim):
                        sums[r, d] = F32(0.0)
                    maxima[r] = max(LEAST, sinks[head]) if has_sinks > 0 else LEAST
                    denominators[r] = exp(sinks[head] - maxima[r]) if has_sinks > 0 else F32(0.0)

                for key0 in range(begin, end, chunk):
                    count = min(chunk, end - key0)
                    block0, num_blocks = key0 // block_size, -(-count // block_size)
                    for j in range(num_blocks):
                        block = tables[b, block0 + j]
                        next_block = tables[b, min(block0 + j + 1, last_block)]
                        read_next = (
                            k_cache[next_block]
                            if j + 1 < num_blocks
                            else v_cache[tables[b, block0]]
                        )
                        distance = read_next.ctypes.data - k_cache[block].ctypes.data
                        for i in range(num_heads_here):
                            keys = k_cache[block, head0 + i]
                            scales = k_scales[block, head0 + i]
                            copy = key_copy[j * block_size : (j + 1) * block_size]
                            row = i * head_rows
                            if is_copied:
                                copy_rows(keys, scales, copy, distance)
                            else:
                                keys = block_rows(keys, scales, copy, distance)
                                score(
                                    is_narrow,
                                    s,
                                    j * block_size,
                                    q,
                                    row,
                                    head_rows,
                                    keys,
                                    lines,
                                    distance,
                                )
                    if is_copied:
                        turn(key_copy, turned)
                        multiply_many(1, s, q, 0, num_rows, turned)

                    for r in range(num_rows):
                        h = head0 + r // head_rows
                        position = position0 + r % head_rows // group
                        first = min(max(0, position - window + 1 - key0), count)
                        past = max(min(count, position + 1 - key0), first)
                        if has_cap > 0:
                            for t in range(first, past):
                                s[r, t] = cap * tanh(s[r, t] / cap)
                        if has_slopes > 0:
                            slope = slopes[h * group + r % group]
                            for t in range(first, past):
                                s[r, t] += slope * F32(key0 + t - position)
                        largest, total = weigh(s[r], first, past, maxima[r])
                        factor = exp(maxima[r] - largest)
                        denominators[r] = denominators[r] * factor + total
                        maxima[r] = largest
                        for d in range(v_head_dim):
                            sums[r, d] *= factor

                    # NaN may lie behind the end, and before what any of the rows sees.
                    first_seen = min(max(0, position0 - window + 1 - key0), count)
                    for j in range(num_blocks):
                        block, past = tables[b, block0 + j], min(block_size, count - j * block_size)
                        first = min(max(0, first_seen - j * block_size), past)
                        next_block = tables[b, min(block0 + j + 1, last_block)]
                        read_next = (
                            v_cache[next_block] if j + 1 < num_blocks else k_cache[next_block]
                        )
                        distance = read_next.ctypes.data - v_cache[block].ctypes.data
                        for i in range(num_heads_here):
                            values = v_cache[block, head0 + i]
                            scales = v_scales[block, head0 + i]
                            copy = value_copy[j * block_size : (j + 1) * block_size]
                            row = i * head_rows
                            if is_copied:
                                copy_rows(values, scales, copy, distance)
                            else:
                                values = block_rows(values, scales, copy, distance)[first:past]
                                column = j * block_size + first
                                add_values(
                                    is_narrow,
                                    sums,
                                    s,
                                    column,
                                    row,
                                    head_rows,
                                    values,
                                    asks,
                                    distance,
                                )
                    if is_copied:
                        values = value_copy[first_seen:count]
                        multiply_many(0, sums, s, first_seen, num_rows, values)

                for r in range(num_rows):
                    token = token0 + r % head_rows // group
                    head = (head0 + r // head_rows) * group + r % group
                    lse[token, head] = maxima[r] + np.log(denominators[r])
                    for d in range(v_head_dim):
                        share = sums[r, d] / denominators[r]
                        out[token, head, d] = narrow(share, queries[token, head, d])
            item_is_done(job)
            item = take_item(job)

        if not is_helper:
            close_job(job)
        return 0

    return xla_call.compiled(attend, LOOSE)
