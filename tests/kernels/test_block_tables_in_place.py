"""Block tables whose verbs write in place: the same states as those of verbs that copy."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_paged import block_tables as bt
from pallas_paged.block_tables import BlockTables

R, M, N, S = 6, 5, 20, 4


def random_verb(rng: np.random.Generator, state: BlockTables) -> tuple[str, tuple]:
    """Returns a verb that the state allows, with its arguments."""
    used, empty = np.flatnonzero(state.seq_lens), np.flatnonzero(state.seq_lens == 0)
    verbs = ["append"] * 4
    if len(used):
        verbs += ["free", "truncate", "drop_front"]
    if len(used) and len(empty):
        verbs += ["fork"] * 2
    verb = verbs[rng.integers(len(verbs))]
    if verb == "append":
        return verb, (rng.integers(0, 6, R).astype(np.int32),)
    if verb == "free":
        return verb, (np.isin(np.arange(R), rng.choice(used, 1)),)
    if verb == "truncate":
        num_gone = np.where(state.tables[:, 0] > 0, rng.integers(0, 3, R), 0)
        return verb, (np.maximum(state.seq_lens - num_gone, 0).astype(np.int32),)
    if verb == "drop_front":
        return verb, (rng.integers(0, state.seq_lens // S + 1).astype(np.int32),)
    return verb, (rng.choice(used, 1).astype(np.int32), empty[:1].astype(np.int32))


@pytest.mark.parametrize("seed", range(20))
def test_verbs_give_the_same_states_in_place(seed: int) -> None:
    rng = np.random.default_rng(seed)
    copied, written = (bt.create(N, R, M, S, in_place=in_place) for in_place in (False, True))
    arrays = written.tables, written.ref_counts, written.free_blocks
    for _ in range(60):
        verb, args = random_verb(rng, copied)
        before = {name: np.copy(x) for name, x in vars(copied).items() if name not in STATIC}
        results = [getattr(bt, verb)(state, *args) for state in (copied, written)]
        for name, array in before.items():
            np.testing.assert_array_equal(getattr(copied, name), array)  # not written to
        if verb == "append":
            for one, other in zip(results[0][1], results[1][1], strict=True):
                np.testing.assert_array_equal(one, other)
            results = [state for state, _ in results]
        copied, written = results
        for name in before:
            np.testing.assert_array_equal(getattr(copied, name), getattr(written, name))
        bt.check_invariants(written)
    now = written.tables, written.ref_counts, written.free_blocks
    assert all(np.shares_memory(a, b) for a, b in zip(arrays, now, strict=True))


STATIC = ("block_size", "in_place")


def test_a_hold_and_a_release_in_place() -> None:
    state = bt.create(N, R, M, S, in_place=True)
    state, _ = bt.append(state, np.array([9, 0, 0, 0, 0, 0], np.int32))
    blocks = state.tables[0, :2].copy()
    state = bt.hold(state, blocks)
    state = bt.free(state, np.arange(R) == 0)
    bt.check_invariants(state, blocks)
    assert int(state.num_free) == N - 1 - 2
    state = bt.release(state, blocks)
    bt.check_invariants(state)
    assert int(state.num_free) == N - 1


def test_a_jax_state_is_not_in_place() -> None:
    with pytest.raises(ValueError, match="in_place=True is for NumPy"):
        bt.create(N, R, M, S, jnp, in_place=True)
    assert not bt.create(N, R, M, S, jnp).in_place
