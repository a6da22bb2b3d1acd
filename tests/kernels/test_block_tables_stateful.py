"""Random operations on block tables in NumPy and in jax, held against plain Python lists.

After every operation both namespaces agree bit for bit, the model predicts every block, and every
sequence reads its own tokens from a fake cache in which free blocks are poisoned.
"""

import collections
import functools
import itertools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from pallas_paged import block_tables as bt

_POISON = -1

_jitted = functools.cache(lambda name: jax.jit(getattr(bt, name)))


class _Model:
    """The allocator for people: lists of blocks, one sequence after the other."""

    def __init__(self, num_blocks, max_num_seqs, max_blocks_per_seq, block_size):
        self.max_blocks_per_seq, self.block_size = max_blocks_per_seq, block_size
        self.rows = [[] for _ in range(max_num_seqs)]  # blocks, 0 for one that was dropped
        self.lens = [0] * max_num_seqs
        self.held = collections.Counter()
        self.free = list(range(num_blocks - 1, 0, -1))

    def num_refs(self, block):
        return self.held[block] + sum(row.count(block) for row in self.rows)

    def collect(self, candidates):
        self.free += [b for b in sorted(set(candidates) - {0}) if self.num_refs(b) == 0]

    def append(self, num_new):
        """Returns the copies, or None and changes nothing if there is no room."""
        saved = [list(row) for row in self.rows], list(self.lens), list(self.free)
        copies = {}
        try:
            for row, count in enumerate(num_new):
                blocks, length = self.rows[row], self.lens[row]
                if count and length % self.block_size and self.num_refs(blocks[-1]) > 1:
                    source, blocks[-1] = blocks[-1], self.free.pop()
                    copies[row] = source, blocks[-1]
                self.lens[row] += count
                while len(blocks) * self.block_size < self.lens[row]:
                    if len(blocks) == self.max_blocks_per_seq:
                        raise IndexError
                    blocks.append(self.free.pop())
        except IndexError:
            self.rows, self.lens, self.free = saved
            return None
        return copies

    def truncate(self, new_lens):
        dropped = []
        for row, length in enumerate(new_lens):
            num_blocks = -(-length // self.block_size)
            dropped += self.rows[row][num_blocks:]
            self.rows[row], self.lens[row] = self.rows[row][:num_blocks], length
        self.collect(dropped)

    def drop_front(self, num_blocks):
        dropped = []
        for blocks, count in zip(self.rows, num_blocks, strict=True):
            dropped += blocks[:count]
            blocks[:count] = [0] * count
        self.collect(dropped)

    def num_dropped(self, row):
        """Returns how many blocks the row has dropped."""
        return self.rows[row].count(0)

    def full_blocks(self):
        """Returns the blocks that are full of tokens and referenced."""
        full = {b for b, count in self.held.items() if count}
        for row, length in zip(self.rows, self.lens, strict=True):
            full |= set(row[: length // self.block_size])
        return sorted(full - {0})


class _Machine(RuleBasedStateMachine):
    sizes: tuple[int, int, int, int]

    @initialize()
    def create(self):
        num_blocks, self.R, self.M, self.S = self.sizes
        self.model = _Model(*self.sizes)
        self.states = [bt.create(*self.sizes, xp) for xp in (np, jnp)]
        self.cache = np.full((num_blocks, self.S), _POISON)
        self.tokens = [[] for _ in range(self.R)]
        self.contents = {}  # tokens of held blocks
        self.new_token = itertools.count().__next__

    def call(self, name, *args):
        """Calls the function of that name in both namespaces; returns results for each."""
        args = [np.asarray(a) for a in args]
        args = [a if a.dtype == bool else a.astype(np.int32) for a in args]
        host, device = self.states
        return getattr(bt, name)(host, *args), _jitted(name)(device, *map(jnp.asarray, args))

    def change(self, name, *args):
        self.states = list(self.call(name, *args))

    def draw_rows(self, data, rows, size):
        """Draws up to `size` different ones of `rows`."""
        return data.draw(st.lists(st.sampled_from(rows), unique=True, max_size=size))

    @rule(data=st.data())
    def append(self, data):
        most = self.M * self.S
        counts = st.one_of(st.just(1), st.integers(0, 2), st.integers(0, most))
        self.append_to_rows([data.draw(counts) for _ in range(self.R)])

    @precondition(lambda self: any(self.model.lens))
    @rule()
    def decode(self):
        self.append_to_rows([int(n > 0) for n in self.model.lens])

    def append_to_rows(self, num_new):
        before, num_free = self.states, len(self.model.free)
        copies = self.model.append(num_new)
        needed = self.call("num_blocks_needed", num_new)
        (host, result), (device, device_result) = self.call("append", num_new)
        self.states = [host, device]
        for left, right in zip(result, device_result, strict=True):
            np.testing.assert_array_equal(left, right)
        assert bool(result.ok) == (copies is not None)
        if copies is None:
            self.assert_same(before[0], host)
            copies, num_new = {}, [0] * self.R
        else:
            assert int(needed[0]) == int(needed[1]) == num_free - len(self.model.free)
        pairs = [copies.get(row, (0, 0)) for row in range(self.R)]
        assert list(zip(result.copy_src.tolist(), result.copy_dst.tolist(), strict=True)) == pairs
        self.write(result, num_new)

    def write(self, result, num_new):
        self.cache[result.copy_dst] = self.cache[result.copy_src]
        for row, count in enumerate(num_new):
            new = [self.new_token() for _ in range(count)]
            positions = len(self.tokens[row]) + np.arange(count, dtype=np.int32)
            slots = bt.slot_mapping(self.states[0], np.full(count, row, np.int32), positions)
            self.cache.reshape(-1)[slots] = new
            self.tokens[row] += new

    @precondition(lambda self: any(self.model.lens) and not all(self.model.lens))
    @rule(data=st.data())
    def fork(self, data):
        lens = self.model.lens
        children = self.draw_rows(data, [r for r in range(self.R) if not lens[r]], self.R)
        parents = [data.draw(st.sampled_from([r for r in range(self.R) if lens[r]]))
                   for _ in children]  # fmt: skip
        padding = [data.draw(st.integers(0, self.R - 1))] * (self.R - len(children))
        self.change("fork", parents + padding, children + padding)
        for parent, child in zip(parents, children, strict=True):
            self.model.rows[child], self.model.lens[child] = (
                list(self.model.rows[parent]),
                lens[parent],
            )
            self.tokens[child] = list(self.tokens[parent])

    @rule(data=st.data())
    def free(self, data):
        rows = self.draw_rows(data, [r for r in range(self.R) if self.model.lens[r]] or [0], self.R)
        rows = [r for r in rows if self.model.lens[r]]
        self.change("free", [r in rows for r in range(self.R)])
        self.model.truncate([0 if r in rows else n for r, n in enumerate(self.model.lens)])
        for row in rows:
            self.tokens[row] = []

    @rule(data=st.data())
    def truncate(self, data):
        lens = [data.draw(st.one_of(st.just(n), st.integers(0, n))) for n in self.model.lens]
        for row, length in enumerate(lens):  # no row may end inside a block that it has dropped
            if length < self.model.num_dropped(row) * self.S:
                lens[row] -= length % self.S
        self.change("truncate", lens)
        self.model.truncate(lens)
        self.tokens = [tokens[:n] for tokens, n in zip(self.tokens, lens, strict=True)]

    @rule(data=st.data())
    def drop_front(self, data):
        counts = [data.draw(st.integers(0, n // self.S)) for n in self.model.lens]
        self.change("drop_front", counts)
        self.model.drop_front(counts)

    @precondition(lambda self: self.model.full_blocks() and not all(self.model.lens))
    @rule(data=st.data())
    def share(self, data):
        full = self.model.full_blocks()
        rows = self.draw_rows(data, [r for r in range(self.R) if not self.model.lens[r]], self.R)
        blocks = [self.draw_rows(data, full, self.M) for _ in rows]
        for given in blocks:  # the row's first ones may be dropped
            if given:
                given[:0] = [0] * data.draw(st.integers(0, self.M - len(given)))
        padding = self.R - len(rows)
        padded = [b + [0] * (self.M - len(b)) for b in [*blocks, *[[]] * padding]]
        contents = {b: self.cache[b].tolist() for b in [0, *full]}
        for block in self.contents:
            assert contents[block] == self.contents[block]  # nobody has written to a held block
        self.change("share", rows + [0] * padding, padded)
        for row, given in zip(rows, blocks, strict=True):
            self.model.rows[row], self.model.lens[row] = list(given), len(given) * self.S
            self.tokens[row] = [token for block in given for token in contents[block]]

    @precondition(lambda self: self.model.full_blocks())
    @rule(data=st.data())
    def hold(self, data):
        blocks = data.draw(st.lists(st.sampled_from([0, *self.model.full_blocks()]), max_size=4))
        self.change("hold", blocks + [0] * (4 - len(blocks)))
        self.model.held.update(b for b in blocks if b)
        self.contents |= {b: self.cache[b].tolist() for b in blocks if b}

    @precondition(lambda self: +self.model.held)
    @rule(data=st.data())
    def release(self, data):
        references = sorted(self.model.held.elements())
        blocks = data.draw(st.permutations(references))[:4]
        blocks = blocks[: data.draw(st.integers(0, len(blocks)))]
        self.change("release", [0] * (4 - len(blocks)) + blocks)
        self.model.held.subtract(blocks)
        self.model.collect(blocks)
        self.contents = {b: c for b, c in self.contents.items() if self.model.held[b]}

    def replaceable(self):
        """Returns the pairs of full blocks that no row has both of."""
        full, rows = self.model.full_blocks(), self.model.rows
        together = {pair for row in rows for pair in itertools.permutations(row, 2)}
        return [pair for pair in itertools.permutations(full, 2) if pair not in together]

    @precondition(lambda self: self.replaceable())
    @rule(data=st.data())
    def replace(self, data):
        old, new = data.draw(st.sampled_from(self.replaceable()))
        content = self.cache[new].tolist()
        self.change("replace", [0, old], [0, new])
        for blocks, tokens in zip(self.model.rows, self.tokens, strict=True):
            if old in blocks:
                place = blocks.index(old)
                blocks[place] = new
                rest = len(tokens) - place * self.S
                tokens[place * self.S : (place + 1) * self.S] = content[:rest]
        self.model.collect([old])

    @invariant()
    def namespaces_agree(self):
        self.assert_same(*self.states)

    @invariant()
    def state_is_what_the_model_says(self):
        host, model = self.states[0], self.model
        held = list(model.held.elements())
        bt.check_invariants(host, held)
        padded = [row + [0] * (self.M - len(row)) for row in model.rows]
        np.testing.assert_array_equal(host.tables, padded)
        np.testing.assert_array_equal(host.seq_lens, model.lens)
        assert host.free_blocks[: host.num_free].tolist() == model.free

    @invariant()
    def every_sequence_reads_its_own_tokens(self):
        self.cache[self.model.free] = _POISON
        for row, tokens in enumerate(self.tokens):
            positions = np.arange(len(tokens), dtype=np.int32)
            slots = bt.slot_mapping(self.states[0], np.full(len(tokens), row, np.int32), positions)
            first = self.model.num_dropped(row) * self.S
            assert (slots[:first] < self.S).all()
            assert self.cache.reshape(-1)[slots[first:]].tolist() == tokens[first:]
        for block, contents in self.contents.items():
            assert self.cache[block].tolist() == contents

    def assert_same(self, left, right):
        for name, value in vars(left).items():
            np.testing.assert_array_equal(value, getattr(right, name), err_msg=name)

    def teardown(self):
        """Whatever happened, freeing and releasing everything leaves no block in use."""
        held = list(self.model.held.elements())
        state = bt.release(self.states[0], np.array(held, np.int32))
        state = bt.free(state, state.seq_lens > 0)
        bt.check_invariants(state)
        assert bt.blocks_in_use(state) == 0


@pytest.mark.parametrize(
    "sizes",  # num_blocks, max_num_seqs, max_blocks_per_seq, block_size
    [(2, 3, 2, 2), (7, 4, 3, 1), (9, 5, 4, 4), (33, 4, 6, 3)],
    ids=["one-usable-block", "block-size-1", "tight", "roomy"],
)
def test_random_operations(sizes):
    machine = type("Machine", (_Machine,), {"sizes": sizes})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=15,
            stateful_step_count=50,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
