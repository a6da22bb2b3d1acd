"""Block tables: which blocks of the KV cache hold which tokens of which sequence.

The KV cache manager of Kwon et al. 2023 (arXiv 2309.06180, section 4.3) as an immutable pytree of
int32 arrays and pure functions from state to state. Every function works on all sequences at once
and is written once over the array namespace: NumPy arrays in, NumPy arrays out, on the host; jax
arrays under `jax.jit`, `lax.scan` or on their own. States share the arrays that did not change, so
none of them may be written to in place.

Sizes: R rows (sequences), M blocks per sequence, N blocks, S tokens per block. Block 0 is the null
block: never allocated, never referenced, the padding of tables and of lists of blocks.

What a caller does wrong raises `ValueError` in NumPy. In jax no value can be looked at; each
docstring says what happens there instead. No call changes a sequence that it does not name.
A row or block that does not exist, for its number is negative or too large, is such a mistake: in
jax it is padding, and so is what is given with it, the other one of a pair or the blocks of a row.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int, Int32

from pallas_paged._namespaces import (
    Array,
    ids_inside,
    namespace,
    refuse,
    refuse_repeated,
    scatter,
    select,
    select_ranges,
    to_int32,
    total,
)
from pallas_paged.kv_cache import NULL_BLOCK


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockTables:
    """The state of the allocator; see `create`.

    Attributes:
      tables: i32[R, M], the blocks of each sequence in order; 0 past its last block, and where it
        has dropped its first ones (see `drop_front`).
      seq_lens: i32[R], tokens per sequence; 0 is an empty row, free to begin a sequence in.
      ref_counts: i32[N], table entries plus holders (see `hold`) that point to each block.
      free_blocks: i32[N], a stack of the blocks without references; entries from `num_free` on
        mean nothing.
      num_free: i32[], how many blocks are free.
      block_size: S; static.
      in_place: whether verbs write into the arrays of the state that they are given, which is used
        up by it; static, and for NumPy alone: under `jax.jit` donate the state.
    """

    tables: Int32[Array, "R M"]
    seq_lens: Int32[Array, "R"]
    ref_counts: Int32[Array, "N"]
    free_blocks: Int32[Array, "N"]
    num_free: Int32[Array, ""]
    block_size: int = dataclasses.field(metadata={"static": True})
    in_place: bool = dataclasses.field(default=False, metadata={"static": True})


class AppendResult(NamedTuple):
    """What `append` did.

    Attributes:
      ok: bool[]; False: the state is unchanged and there is nothing to copy.
      copy_src: i32[R], the block that row r must copy before it writes, or 0.
      copy_dst: i32[R], where row r copies it to, or 0. The padding (0, 0) copies the null block
        onto itself, so that both go to `copy_blocks` as they are.
    """

    ok: Bool[Array, ""]
    copy_src: Int32[Array, "R"]
    copy_dst: Int32[Array, "R"]


def create(
    num_blocks: int,
    max_num_seqs: int,
    max_blocks_per_seq: int,
    block_size: int,
    xp: Any = np,
    *,
    in_place: bool = False,
) -> BlockTables:
    """Returns R = `max_num_seqs` empty rows and `num_blocks - 1` free blocks (0 is the null block).

    `xp` is `numpy` or `jax.numpy`, and with it the namespace of every later state. With `in_place`
    no verb copies a table: each one uses up the state that it is given.
    """
    if in_place and xp is not np:
        raise ValueError("in_place=True is for NumPy: jax arrays do not change; donate them to jit")
    for name, value, least in (
        ("num_blocks", num_blocks, 2),
        ("max_num_seqs", max_num_seqs, 1),
        ("max_blocks_per_seq", max_blocks_per_seq, 1),
        ("block_size", block_size, 1),
    ):
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}")
    slots = (max(num_blocks, max_blocks_per_seq) + 1) * block_size
    if max(slots, max_num_seqs * max_blocks_per_seq) >= 2**31:
        raise ValueError(
            f"{num_blocks=}, {max_num_seqs=}, {max_blocks_per_seq=} and {block_size=} make slots or"
            " table entries that int32 cannot number; use fewer or smaller blocks"
        )
    return BlockTables(
        tables=xp.zeros((max_num_seqs, max_blocks_per_seq), xp.int32),
        seq_lens=xp.zeros(max_num_seqs, xp.int32),
        ref_counts=xp.zeros(num_blocks, xp.int32),
        free_blocks=xp.arange(num_blocks - 1, -1, -1, dtype=xp.int32),  # block 1 is on top
        num_free=xp.asarray(num_blocks - 1, dtype=xp.int32),
        block_size=block_size,
        in_place=in_place,
    )


def num_blocks_needed(state: BlockTables, num_new: Int[Array, "R"]) -> Int32[Array, ""]:
    """Returns how many blocks `append(state, num_new)` takes if it can, copies on write included.

    Raises `ValueError` for a negative count; in jax it counts as 0.
    """
    xp = namespace(state.tables)
    return total(_plan_append(state, xp.maximum(_num_new(state, num_new), 0)).num_taken)


def append(state: BlockTables, num_new: Int[Array, "R"]) -> tuple[BlockTables, AppendResult]:
    """Makes room for `num_new[r]` >= 0 more tokens in each row r; all rows or none.

    New blocks are taken where a row's last block is full. Where it is partly filled and has other
    references, the row gets a block of its own in its place (copy on write), and the pair comes
    back in the result: the caller copies the blocks before writing the new tokens. Where all
    references to a block are rows that append in this call, the last of these rows keeps the block
    and writes in place.

    `ok` is False, and the state unchanged, when the free blocks do not suffice or a row would
    exceed M blocks. Raises `ValueError` for a negative count; in jax `ok` is False then.
    """
    xp = namespace(state.tables)
    write = functools.partial(scatter, in_place=state.in_place)
    num_new = _num_new(state, num_new)
    R, M = state.tables.shape
    plan = _plan_append(state, num_new)
    fits = (num_new >= 0) & (num_new <= M * state.block_size - state.seq_lens)
    ok = xp.all(fits) & (total(plan.num_taken) <= state.num_free)
    num_new = xp.where(ok, num_new, 0)
    num_taken = xp.where(ok, plan.num_taken, 0)
    copies = plan.copies & ok

    # Row after row takes its blocks from the top of the stack, the one it copies to first.
    first = plan.num_blocks - copies.astype(np.int32)
    taken = select_ranges(first, num_taken, M)
    blocks = state.free_blocks[state.num_free - 1 - taken.rank]
    tables = write(state.tables.reshape(-1), taken.places, blocks, taken.valid).reshape(R, M)
    ref_counts = write(state.ref_counts, blocks, 1, taken.valid, "add")
    ref_counts = write(ref_counts, plan.last_block, -1, copies, "add")
    result = AppendResult(
        ok=xp.asarray(ok),
        copy_src=xp.where(copies, plan.last_block, NULL_BLOCK),
        copy_dst=xp.where(copies, _last_block(tables, plan.num_blocks), NULL_BLOCK),
    )
    state = dataclasses.replace(
        state,
        tables=tables,
        seq_lens=state.seq_lens + num_new,
        ref_counts=ref_counts,
        num_free=xp.asarray(state.num_free - total(num_taken)),
    )
    return state, result


def fork(state: BlockTables, parents: Int[Array, "K"], children: Int[Array, "K"]) -> BlockTables:
    """Lets each row `children[k]` begin with all tokens, and all blocks, of row `parents[k]`.

    A pair of a row with itself is padding and does nothing. A row may have many children, and may
    not be parent and child in one call.

    Raises `ValueError` for a child that is not empty or comes twice, for an empty parent, and for
    rows that do not exist. In jax a pair of such a row, or whose child is not empty, does nothing;
    a child that comes twice is outside the contract.
    """
    xp = namespace(state.tables)
    write = functools.partial(scatter, in_place=state.in_place)
    R = len(state.seq_lens)
    parents, parents_exist = ids_inside(xp, parents, "parents", R)
    children, children_exist = ids_inside(xp, children, "children", R)
    pairs = parents_exist & children_exist & (parents != children)
    occupied = pairs & (state.seq_lens[children] > 0)
    refuse(occupied, "children", children, "is not empty; `free` it first")
    refuse(pairs & (state.seq_lens[parents] == 0), "parents", parents, "is empty")
    refuse_repeated(pairs, "children", children)

    pairs = pairs & ~occupied
    blocks = state.tables[parents]
    referenced = pairs[:, None] & (blocks != NULL_BLOCK)
    return dataclasses.replace(
        state,
        tables=write(state.tables, children, blocks, pairs),
        seq_lens=write(state.seq_lens, children, state.seq_lens[parents], pairs),
        ref_counts=write(state.ref_counts, blocks, 1, referenced, "add"),
    )


def admit(
    state: BlockTables,
    rows: Int[Array, "K"],
    num_tokens: Int[Array, "K"],
    blocks: Int[Array, "K P"],
) -> tuple[BlockTables, Bool[Array, ""]]:
    """Lets each empty row `rows[k]` begin with `num_tokens[k]` tokens in given and in new blocks.

    In `blocks[k]` a positive number is a block that has references. A negative one is a block to
    take: -1, -2, ... without a gap, each the same block wherever its number comes. Zeros in front
    are blocks that the row has dropped, see `drop_front`; behind, they are padding. Rows of nothing
    but zeros do nothing.

    Returns the state, and bool[] whether there were enough free blocks; if not, it is unchanged.

    Raises `ValueError` for a row that does not exist, is not empty or comes twice, for a length
    that its blocks do not fit, and for blocks that do not exist, have no references, have a 0
    between them or are repeated in one row. In jax a row that is not empty, or is given a block
    that does not exist or has no references, stays as it is, and a row that does not exist is
    padding; the others are outside the contract.
    """
    xp = namespace(state.tables)
    write = functools.partial(scatter, in_place=state.in_place)
    R, M = state.tables.shape
    (N,) = state.ref_counts.shape
    num_given = blocks.shape[1]
    if num_given > M:
        raise ValueError(f"blocks has {num_given} columns, but a row has max_blocks_per_seq={M}")
    rows, rows_exist = ids_inside(xp, rows, "rows", R)
    numbers = to_int32(xp, blocks, "blocks")
    is_new = numbers < 0
    num_new = xp.max(-numbers, initial=0)
    ok = num_new <= state.num_free
    given, blocks_exist = ids_inside(xp, xp.where(is_new, NULL_BLOCK, blocks), "blocks", N)
    taken = state.free_blocks[xp.clip(state.num_free + numbers, 0, N - 1)]
    ids = xp.where(is_new, taken, given)

    present = is_new | (given != NULL_BLOCK)
    places = xp.arange(num_given, dtype=xp.int32)[None, :]
    num_blocks = xp.max(xp.where(present, places + 1, 0), axis=1, initial=0).astype(xp.int32)
    has_begun = xp.cumsum(present, axis=1, dtype=xp.int32) > 0
    gaps = ~present & (places < num_blocks[:, None]) & has_begun
    refuse(gaps, "blocks", numbers, "stands between blocks; only the first ones may be dropped")
    lost = (given != NULL_BLOCK) & (state.ref_counts[given] == 0)
    refuse(lost, "blocks", numbers, "has no references; `hold` blocks that are to be shared")
    occupied = (num_blocks > 0) & (state.seq_lens[rows] > 0)
    refuse(occupied, "rows", rows, "is not empty; `free` it first")
    refuse_repeated(num_blocks > 0, "rows", rows)
    refuse_repeated(present & ok, "blocks", ids)
    num_tokens = to_int32(xp, num_tokens, "num_tokens")
    misfit = (num_blocks > 0) & (_ceil_div(num_tokens, state.block_size) != num_blocks)
    refuse(misfit, "num_tokens", num_tokens, "does not fit the row's blocks")

    begins = (num_blocks > 0) & ~occupied & ~xp.any(lost, axis=1) & ok
    begins &= rows_exist & xp.all(blocks_exist, axis=1)
    padded = xp.pad(ids, ((0, 0), (0, M - num_given)))
    state = dataclasses.replace(
        state,
        tables=write(state.tables, rows, padded, begins),
        seq_lens=write(state.seq_lens, rows, num_tokens, begins),
        ref_counts=write(state.ref_counts, ids, 1, begins[:, None] & present, "add"),
        num_free=xp.asarray(xp.where(ok, state.num_free - num_new, state.num_free), xp.int32),
    )
    return state, xp.asarray(ok)


def share(state: BlockTables, rows: Int[Array, "K"], blocks: Int[Array, "K P"]) -> BlockTables:
    """Lets each empty row `rows[k]` begin with the full blocks `blocks[k]`; see `admit`.

    The row's length becomes S times its blocks, dropped ones included.

    Raises `ValueError` for a block that is negative; in jax the row stays as it is. Else see
    `admit`.
    """
    xp = namespace(state.tables)
    blocks = to_int32(xp, blocks, "blocks")
    refuse(blocks < 0, "blocks", blocks, f"must be between 0 and {len(state.ref_counts) - 1}")
    blocks = xp.where(blocks < 0, len(state.ref_counts), blocks)  # which does not exist either
    places = xp.arange(1, blocks.shape[1] + 1, dtype=xp.int32)[None, :]
    num_blocks = xp.max(xp.where(blocks != NULL_BLOCK, places, 0), axis=1, initial=0)
    state, _ = admit(state, rows, (num_blocks * state.block_size).astype(xp.int32), blocks)
    return state


def free(state: BlockTables, rows: Bool[Array, "R"]) -> BlockTables:
    """Empties the rows where `rows` is True; their blocks that nothing else refers to become free.

    Raises `ValueError` for a row that is empty already, where jax does nothing; and, in jax too,
    for rows that are no mask.
    """
    xp = namespace(state.tables)
    rows = _per_row(state, "rows", rows, np.bool_)
    refuse(rows & (state.seq_lens == 0), "rows", rows, "is an empty row; free a row once")
    return truncate(state, xp.where(rows, 0, state.seq_lens))


def truncate(state: BlockTables, new_lens: Int[Array, "R"]) -> BlockTables:
    """Shortens each row r to its first `new_lens[r]` tokens, and gives up the blocks past them.

    Raises `ValueError` unless 0 <= new_lens <= seq_lens; jax clips to these bounds. And where the
    row would end inside a block that it has dropped: in jax it stays as it is.
    """
    xp = namespace(state.tables)
    write = functools.partial(scatter, in_place=state.in_place)
    new_lens = _per_row(state, "new_lens", new_lens)
    outside = (new_lens < 0) | (new_lens > state.seq_lens)
    refuse(outside, "new_lens", new_lens, "must be between 0 and the row's length; see `append`")
    new_lens = xp.clip(new_lens, 0, state.seq_lens)
    R, M = state.tables.shape
    last_block = _last_block(state.tables, _ceil_div(new_lens, state.block_size))
    torn = (new_lens % state.block_size > 0) & (last_block == NULL_BLOCK)
    refuse(torn, "new_lens", new_lens, "ends inside a block that the row has dropped")
    new_lens = xp.where(torn, state.seq_lens, new_lens)
    num_kept = _ceil_div(new_lens, state.block_size)
    num_dropped = _ceil_div(state.seq_lens, state.block_size) - num_kept
    dropped = select_ranges(num_kept, num_dropped, M)
    tables = state.tables.reshape(-1)
    blocks = xp.where(dropped.valid, tables[dropped.places], NULL_BLOCK)
    return dataclasses.replace(
        release(state, blocks),
        tables=write(tables, dropped.places, NULL_BLOCK, dropped.valid).reshape(R, M),
        seq_lens=new_lens,
    )


def drop_front(state: BlockTables, num_blocks: Int[Array, "R"]) -> BlockTables:
    """Gives up the first `num_blocks[r]` blocks of each row r, as many of them as it still has.

    For a row whose further queries see its last tokens only, through a sliding window. Their table
    entries become 0; the row's length and the places of its other blocks stay. A block that others
    refer to stays theirs, and a fork begins with what its parent has left.

    Raises `ValueError` unless 0 <= num_blocks <= seq_lens // S, for a block that is not full is
    written to; jax clips to these bounds.
    """
    xp = namespace(state.tables)
    write = functools.partial(scatter, in_place=state.in_place)
    num_blocks = _per_row(state, "num_blocks", num_blocks)
    num_full = state.seq_lens // state.block_size
    outside = (num_blocks < 0) | (num_blocks > num_full)
    refuse(outside, "num_blocks", num_blocks, "must be between 0 and the row's full blocks")
    num_blocks = xp.clip(num_blocks, 0, num_full)
    R, M = state.tables.shape
    dropped = select_ranges(xp.zeros_like(num_blocks), num_blocks, M)
    tables = state.tables.reshape(-1)
    blocks = xp.where(dropped.valid, tables[dropped.places], NULL_BLOCK)
    return dataclasses.replace(
        release(state, blocks),
        tables=write(tables, dropped.places, NULL_BLOCK, dropped.valid).reshape(R, M),
    )


def hold(state: BlockTables, blocks: Int[Array, "K"]) -> BlockTables:
    """Adds one reference to each of `blocks` (0 is padding), so that they outlive their sequences.

    Raises `ValueError` for a block that does not exist, which in jax is padding, and for one
    without references, whose content may be gone; in jax that is outside the contract.
    """
    xp = namespace(state.tables)
    write = functools.partial(scatter, in_place=state.in_place)
    (N,) = state.ref_counts.shape
    blocks, _ = ids_inside(xp, blocks, "blocks", N)
    held = blocks != NULL_BLOCK
    refuse(held & (state.ref_counts[blocks] == 0), "blocks", blocks, "has no references")
    return dataclasses.replace(state, ref_counts=write(state.ref_counts, blocks, 1, held, "add"))


def release(state: BlockTables, blocks: Int[Array, "K"]) -> BlockTables:
    """Takes one reference from each of `blocks` (0 is padding); those without any become free.

    Only references of `hold` are the caller's to release. Raises `ValueError` for a block that does
    not exist, which in jax is padding, and where one has fewer references than are released; in jax
    that is outside the contract.
    """
    xp = namespace(state.tables)
    write = functools.partial(scatter, in_place=state.in_place)
    (N,) = state.ref_counts.shape
    blocks, _ = ids_inside(xp, blocks, "blocks", N)
    was_referenced = state.ref_counts > 0
    ref_counts = write(state.ref_counts, blocks, -1, blocks != NULL_BLOCK, "add")
    refuse(ref_counts[blocks] < 0, "blocks", blocks, "is released more often than it is held")
    return _with_fewer_references(state, was_referenced, ref_counts)


def replace(state: BlockTables, old: Int[Array, "K"], new: Int[Array, "K"]) -> BlockTables:
    """Lets every row that has block `old[k]` have `new[k]` in its place (0 in both is padding).

    For full blocks of equal content. References of `hold` stay where they are; an old block that
    nothing refers to any more becomes free.

    Raises `ValueError` for blocks that do not exist, whose pairs do nothing in jax. Likewise for an
    old block that comes twice, and for a new one without references or that is itself replaced; in
    jax these are outside the contract.
    """
    xp = namespace(state.tables)
    (N,) = state.ref_counts.shape
    old, _ = ids_inside(xp, old, "old", N)
    new, new_exist = ids_inside(xp, new, "new", N)
    named = new_exist & (old != NULL_BLOCK)
    refuse_repeated(named, "old", old)
    becomes = scatter(xp.arange(N, dtype=xp.int32), old, new, named)
    refuse(becomes[new] != new, "new", new, "is replaced itself")
    refuse(named & (state.ref_counts[new] == 0), "new", new, "has no references")
    tables = becomes[state.tables]
    changed = tables != state.tables
    ref_counts = scatter(state.ref_counts, state.tables, -1, changed, "add")
    ref_counts = scatter(ref_counts, tables, 1, changed, "add")
    state = _with_fewer_references(state, state.ref_counts > 0, ref_counts)
    return dataclasses.replace(state, tables=tables)


def _with_fewer_references(
    state: BlockTables, was_referenced: Bool[Array, "N"], ref_counts: Int32[Array, "N"]
) -> BlockTables:
    """Returns the state with these counts; blocks whose last reference went become free."""
    freed = select(was_referenced & (ref_counts == 0))
    return dataclasses.replace(
        state,
        ref_counts=ref_counts,
        free_blocks=scatter(
            state.free_blocks,
            state.num_free + freed.rank,
            freed.places,
            freed.valid,
            in_place=state.in_place,
        ),
        num_free=namespace(ref_counts).asarray(state.num_free + total(freed.valid)),
    )


def slot_mapping(
    state: BlockTables, rows: Int[Array, "T"], positions: Int[Array, "T"]
) -> Int32[Array, "T"]:
    """Returns `block * S + offset` of the tokens at `positions` (0 <= p < M * S) of `rows`.

    Positions past a row's blocks, and in blocks that it has dropped, lie in the null block:
    padding. Raises `ValueError` for rows and positions outside of the tables; in jax their slots
    are 0.
    """
    xp = namespace(state.tables)
    S = state.block_size
    R, M = state.tables.shape
    rows, rows_exist = ids_inside(xp, rows, "rows", R)
    positions, positions_exist = ids_inside(xp, positions, "positions", M * S)
    slots = state.tables[rows, positions // S] * S + positions % S
    return xp.where(rows_exist & positions_exist, slots, 0)


def blocks_in_use(state: BlockTables) -> Int32[Array, ""]:
    """Returns how many blocks have references."""
    return namespace(state.tables).asarray(state.ref_counts.shape[0] - 1 - state.num_free)


def check_invariants(state: BlockTables, held: Sequence[int] | Array = ()) -> None:
    """Raises `AssertionError`, with the values, unless the state is consistent. Runs on the host.

    `held` are the ids of the blocks held through `hold`, one for each reference; 0 is padding.

    - A row covers exactly ceil(len / S) different blocks, but for the first ones, which it may have
      dropped if they were full; the rest of it is 0.
    - No two sequences can write one slot. Only a partly filled last block with one reference is
      written without a copy, so no two rows may end in such a block.
    - A block's reference count is the number of table entries and holders that point to it.
    - The free blocks, the referenced blocks and the null block are all blocks, each once.
    """
    tables, seq_lens, ref_counts, free_blocks = (
        np.asarray(x) for x in (state.tables, state.seq_lens, state.ref_counts, state.free_blocks)
    )
    (N,) = ref_counts.shape
    S, num_free, holders = state.block_size, int(state.num_free), np.asarray(held, np.int64)
    for name, array in vars(state).items():
        is_static = name in ("block_size", "in_place")
        assert is_static or array.dtype == np.int32, f"{name} is {array.dtype}"
    for name, ids in ("table entries", tables), ("holders", holders), ("free blocks", free_blocks):
        assert ((ids >= 0) & (ids < N)).all(), f"{name} outside 0..{N - 1}: {ids}"

    assert (seq_lens >= 0).all(), f"{seq_lens=}"
    columns, named = np.arange(tables.shape[1]), tables != NULL_BLOCK
    covered = columns < _ceil_div(seq_lens, S)[:, None]
    first = np.where(named.any(axis=1), named.argmax(axis=1), covered.sum(axis=1))
    misplaced = (named != (covered & (columns >= first[:, None]))).any(axis=1)
    wrong = np.flatnonzero(misplaced | (first > seq_lens // S))
    assert not wrong.size, f"rows {wrong}: {seq_lens[wrong]=} do not fit {tables[wrong]=}"
    ordered = np.sort(tables)
    repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != NULL_BLOCK)
    wrong = np.flatnonzero(repeated.any(axis=1))
    assert not wrong.size, f"rows {wrong} repeat a block: {tables[wrong]=}"

    partial = np.flatnonzero(seq_lens % S)
    last = tables[partial, seq_lens[partial] // S]
    in_place, num_writers = np.unique(last[ref_counts[last] == 1], return_counts=True)
    wrong = in_place[num_writers > 1]
    assert not wrong.size, f"blocks {wrong} are written by several rows"

    pointers = np.bincount(np.concatenate([tables[covered], holders]), minlength=N)
    pointers[NULL_BLOCK] = 0
    wrong = np.flatnonzero(pointers != ref_counts)
    assert not wrong.size, f"blocks {wrong}: {ref_counts[wrong]=}, but {pointers[wrong]=}"

    assert 0 <= num_free <= N - 1, f"{num_free=} of {N} blocks"
    listed = free_blocks[:num_free]
    assert (listed != NULL_BLOCK).all(), f"the null block is free: {listed}"
    both = listed[ref_counts[listed] > 0]
    assert not both.size, f"blocks {both} are free and referenced: {ref_counts[both]=}"
    assert len(np.unique(listed)) == num_free, f"a block is free twice: {listed}"
    num_referenced = int(np.count_nonzero(ref_counts))
    assert num_free + num_referenced + 1 == N, f"{num_free=} + {num_referenced=} + null != {N}"


class _AppendPlan(NamedTuple):
    num_blocks: Int32[Array, "R"]  # before the append
    last_block: Int32[Array, "R"]
    copies: Bool[Array, "R"]
    num_taken: Int32[Array, "R"]


def _plan_append(state: BlockTables, num_new: Int32[Array, "R"]) -> _AppendPlan:
    xp = namespace(state.tables)
    S = state.block_size
    (N,) = state.ref_counts.shape
    num_blocks = _ceil_div(state.seq_lens, S)
    last_block = _last_block(state.tables, num_blocks)
    writes = (num_new > 0) & (state.seq_lens % S != 0)
    shared = writes & (state.ref_counts[last_block] > 1)

    # A block that all its owners would leave stays with the last of them.
    rows = xp.arange(len(num_new), dtype=xp.int32)
    left = scatter(state.ref_counts, last_block, -1, shared, "add")
    leaving = shared & (left[last_block] == 0)
    keeper = scatter(xp.zeros(N, xp.int32), last_block, rows, leaving, "max")
    copies = shared & ~(leaving & (keeper[last_block] == rows))

    num_taken = _ceil_div(state.seq_lens + num_new, S) - num_blocks + copies.astype(np.int32)
    return _AppendPlan(num_blocks, last_block, copies, num_taken)


def _last_block(tables: Int32[Array, "R M"], num_blocks: Int32[Array, "R"]) -> Int32[Array, "R"]:
    xp = namespace(tables)
    rows = xp.arange(len(tables), dtype=xp.int32)
    return tables[rows, xp.maximum(num_blocks - 1, 0)]


def _ceil_div(num_tokens: Array, block_size: int) -> Array:
    return (num_tokens + (block_size - 1)) // block_size


def _num_new(state: BlockTables, num_new: Int[Array, "R"]) -> Int32[Array, "R"]:
    num_new = _per_row(state, "num_new", num_new)
    refuse(num_new < 0, "num_new", num_new, "must be 0 or more; `truncate` shortens sequences")
    return num_new


def _per_row(state: BlockTables, name: str, values: Array, dtype: type = np.int32) -> Array:
    if values.shape != state.seq_lens.shape:
        raise ValueError(f"{name} has shape {values.shape}; it needs {state.seq_lens.shape}")
    xp = namespace(state.tables)
    if dtype is np.int32:
        return to_int32(xp, values, name)
    if values.dtype != dtype:
        raise ValueError(
            f"{name} is {values.dtype}; it needs {np.dtype(dtype)}, a mask of all rows"
        )
    return xp.asarray(values)
