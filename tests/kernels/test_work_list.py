"""The decode kernel's work list, against a plain-Python walk along the line of tiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_paged import AttentionMetadata
from pallas_paged.ops.attention.work_list import CtaField, SequenceField, make_work_list

CASES = {
    "none": ((0, 0), (0, 0)),
    "one long": ((5000,), (1,)),
    "many short": ((1, 64, 65, 0, 128, 7, 63) * 9, (1, 1, 1, 0, 1, 1, 1) * 9),
    "without queries": ((300, 40, 70), (0, 1, 0)),
    "some tokens": ((300, 40, 70, 9), (3, 40, 2, 1)),
    "hundreds": (tuple(i * 37 % 301 for i in range(200)), tuple(i * 7 % 6 for i in range(200))),
}


def plan(lens, query_lens, window=None, num_ctas=7, heads=3, tile=64, max_tokens=4, min_tiles=1):
    starts = np.append(0, np.cumsum(query_lens)).astype(np.int32)
    metadata = AttentionMetadata(
        positions=jnp.zeros(starts[-1], jnp.int32),
        slot_mapping=jnp.zeros(starts[-1], jnp.int32),
        block_tables=jnp.zeros((len(lens), 1), jnp.int32),
        seq_lens=jnp.asarray(lens, jnp.int32),
        query_start_loc=jnp.asarray(starts),
        max_query_len=8,
    )
    work = jax.jit(
        lambda metadata: make_work_list(
            metadata,
            num_kv_heads=heads,
            num_ctas=num_ctas,
            tile=tile,
            sliding_window=window,
            max_tokens=max_tokens,
            min_tiles=min_tiles,
        )
    )(metadata)
    return jax.tree.map(np.asarray, work)


def expected_line(lens, query_lens, window, heads=3, tile=64, max_tokens=4):
    """Returns [(row, head, tile index in the sequence)] in the order of the line."""
    line = []
    for row, (length, queries) in enumerate(zip(lens, query_lens, strict=True)):
        if length and 0 < queries <= max_tokens:
            first = 0 if window is None else max(length - queries - window + 1, 0)
            tiles = range(first // tile, -(-length // tile))
            line += [(row, head, index) for head in range(heads) for index in tiles]
    return line


def walk(work, cta, heads=3):
    """Returns what the kernel does with the record of `cta`."""
    record = work.ctas[cta]
    item, tile = record[CtaField.FIRST_ITEM], record[CtaField.FIRST_TILE]
    seen = []
    for _ in range(record[CtaField.NUM_TILES]):
        sequence = work.sequences[item // heads]
        index = sequence[SequenceField.FIRST_TILE] + tile
        seen.append((sequence[SequenceField.ROW], item % heads, index))
        tile += 1
        if tile == sequence[SequenceField.NUM_TILES]:
            item, tile = item + 1, 0
    items = {place[:2] for place in seen}
    assert record[CtaField.NUM_ITEMS] == len(items)
    return seen


@pytest.mark.parametrize("name", CASES)
def test_sequences_with_work_side_by_side(name):
    lens, query_lens = CASES[name]
    starts = np.append(0, np.cumsum(query_lens))
    sequences = plan(lens, query_lens, window=100).sequences
    expected = []
    for row, (length, queries) in enumerate(zip(lens, query_lens, strict=True)):
        if length and 0 < queries <= 4:
            first = max(length - queries - 99, 0) // 64
            tiles = -(-length // 64) - first
            expected.append((row, tiles, first, length, starts[row], queries, row))
    assert list(map(tuple, sequences[: len(expected)])) == expected
    assert not np.any(sequences[len(expected) :])


@pytest.mark.parametrize("window", [None, 1, 100])
@pytest.mark.parametrize("name", CASES)
def test_every_tile_once_in_equal_shares(name, window):
    lens, query_lens = CASES[name]
    work = plan(lens, query_lens, window)
    shares = [walk(work, cta) for cta in range(7)]
    line = expected_line(lens, query_lens, window)
    assert [place for share in shares for place in share] == line
    sizes = [len(share) for share in shares]
    assert max(sizes) == -(-len(line) // 7)
    assert set(work.ctas[:, CtaField.STEP_TOKENS]) == {sum(query_lens)}

    for cta, share in enumerate(shares):
        last = work.ctas[cta, CtaField.LAST_PART]
        tiles_here = [place for place in share if share and place[:2] == share[-1][:2]]
        item = [place for place in line if share and place[:2] == share[-1][:2]]
        is_divided = bool(share) and tiles_here[0] == item[0] and tiles_here != item
        assert (last >= 0) == is_divided
        if is_divided:
            assert item[-1] in shares[last]


def test_fewest_tiles():
    sizes = plan((640,), (1,), min_tiles=8).ctas[:, CtaField.NUM_TILES]
    assert list(sizes) == [8, 8, 8, 6, 0, 0, 0]
