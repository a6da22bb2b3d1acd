"""Which tiles each thread block of the sm_90a prefill kernel takes, computed without the kernel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_paged.ops.attention.hopper.prefill_config import PrefillTuning
from pallas_paged.ops.attention.hopper.prefill_parts import Inputs, Problem
from pallas_paged.ops.attention.hopper.prefill_walk import num_own_tiles, read_tile


def walk(num_tiles, num_kv_heads, num_ctas):
    """Returns of each thread block its pairs (tile, KV head) in order."""
    problem = Problem(
        num_kv_heads, 1, 64, 16, jnp.bfloat16, jnp.bfloat16, 1.0, None, None, PrefillTuning()
    )
    tiles = jnp.zeros((max(num_tiles, 1), 6), jnp.int32)
    inputs = Inputs(None, None, None, tiles, jnp.array([num_tiles]), None, None, None)

    @functools.partial(jax.vmap, axis_name="cta", axis_size=num_ctas)
    def counts(_):
        return num_own_tiles(problem, inputs)

    @functools.partial(jax.vmap, axis_name="cta", axis_size=num_ctas)
    def pairs(_):
        def one(number):
            tile = read_tile(problem, inputs, number, jnp.int32(0))
            return jnp.stack([tile.index, tile.kv_head])

        return jax.vmap(one)(jnp.arange(num_tiles * num_kv_heads + 1, dtype=jnp.int32))

    each = jnp.arange(num_ctas)
    return [
        [tuple(pair) for pair in some[:count].tolist()]
        for some, count in zip(pairs(each), counts(each).tolist(), strict=True)
    ]


@pytest.mark.parametrize(
    ("num_tiles", "num_kv_heads", "num_ctas"),
    [(0, 2, 4), (1, 1, 3), (3, 2, 6), (5, 2, 4), (8, 3, 5), (7, 4, 1), (20, 8, 132)],
)
def test_each_pair_is_taken_once_in_order(num_tiles, num_kv_heads, num_ctas):
    own = walk(num_tiles, num_kv_heads, num_ctas)
    everything = [(tile, head) for tile in range(num_tiles) for head in range(num_kv_heads)]
    assert sorted(pair for pairs in own for pair in pairs) == everything
    counts = [len(pairs) for pairs in own]
    assert max(counts) - min(counts) <= 1
    for pairs in own:
        for round_, (tile, head) in enumerate(pairs):
            assert (tile * num_kv_heads + head) // num_ctas == round_


def test_long_and_short_work_goes_to_the_same_thread_blocks():
    """A prompt's tiles, each with more keys than the next."""
    num_tiles, num_kv_heads, num_ctas = 256, 8, 132
    work = np.array(
        [
            sum(num_tiles - tile for tile, _ in pairs)
            for pairs in walk(num_tiles, num_kv_heads, num_ctas)
        ]
    )
    assert work.max() < 1.03 * work.mean()
