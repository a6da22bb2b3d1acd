"""Which tiles a thread block of the sm_90a prefill kernel computes, one after the other.

The work is a line of pairs: of each tile of the plan, the most keys first, one pair for each KV
head. With `PrefillTuning.persistent` there are as many thread blocks as the GPU holds at once, and
they go along the line together, each with one pair of every round; else each takes one pair. Either
way those that run at the same time read much the same keys, of all heads, and short work is left
for the end. Every second round goes backwards: who had the longest work of one round has the
shortest of the next.

All warpgroups of a thread block walk for themselves, and the loading ones are ahead: the steps of
all its tiles are one line, along which the places in shared memory and their barriers go round.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_paged.ops.attention.hopper.prefill_parts import Inputs, Problem
from pallas_paged.ops.attention.hopper.prefill_plan import (
    FIRST_POSITION,
    FIRST_TOKEN,
    KEY_BEGIN,
    KEY_END,
    NUM_TOKENS,
    SEQUENCE,
)


class Tile(NamedTuple):
    """A record of the plan, and the steps that follow from it: at least one, even without keys.

    Steps [begin, full_begin) and [full_end, end) have keys that some token cannot see.
    """

    number: Any  # among the thread block's own, from 0
    offset: Any  # from the number of a step to that among all steps of the thread block
    index: Any  # in the plan
    kv_head: Any
    first_token: Any
    num_tokens: Any
    first_position: Any
    sequence: Any
    key_begin: Any
    key_end: Any
    begin: Any
    full_begin: Any
    full_end: Any
    end: Any

    @property
    def num_steps(self) -> Any:
        """How many steps it has."""
        return self.end - self.begin

    @property
    def turns(self) -> Any:
        """How often keys or values are brought: both for each step."""
        return 2 * self.num_steps

    def in_line(self, step: Any) -> Any:
        """Returns the number of a step among all of the thread block's."""
        return step + self.offset


def num_own_tiles(problem: Problem, inputs: Inputs) -> Any:
    """Returns how many tiles this thread block has."""
    pairs, ctas = inputs.num_tiles[0] * problem.num_kv_heads, jnp.int32(lax.axis_size("cta"))
    rounds = lax.div(pairs, ctas)
    return rounds + (_place(rounds) < lax.rem(pairs, ctas)).astype(jnp.int32)


def over_own_tiles(
    problem: Problem, inputs: Inputs, body: Callable[[Tile, Any], Any], carried: Any = None
) -> tuple[Any, Any]:
    """Runs `body(tile, carried)` for each tile of this thread block, which returns `carried` anew.

    There is at least one. Returns how many steps the tiles have in all, and `carried`.
    """

    def one_tile(number: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        steps_before, carried = carry
        tile = read_tile(problem, inputs, number, steps_before)
        carried = body(tile, carried)
        again = read_tile(problem, inputs, number)  # nothing is kept in registers until then
        return tile.in_line(again.end), carried

    first = jnp.int32(0), carried
    if not problem.tuning.persistent:
        return one_tile(jnp.int32(0), first)
    return lax.fori_loop(0, num_own_tiles(problem, inputs), one_tile, first)


def read_tile(problem: Problem, inputs: Inputs, number: Any, steps_before: Any = 0) -> Tile:
    """Returns the tile that this thread block has after `number` others."""
    tiles, size = inputs.tiles, problem.tuning.tile_keys
    pair, heads = number * lax.axis_size("cta") + _place(number), jnp.int32(problem.num_kv_heads)
    index = lax.div(pair, heads)
    key_begin, key_end = tiles[index, KEY_BEGIN], tiles[index, KEY_END]
    first_position = tiles[index, FIRST_POSITION]
    begin = key_begin // size
    end = jnp.maximum(pl.cdiv(key_end, size), begin + 1)
    full_begin = begin
    if problem.sliding_window is not None:
        full_begin = pl.cdiv(jnp.maximum(key_end - problem.sliding_window, 0), size)
        full_begin = jnp.clip(full_begin, begin, end)
    full_end = jnp.clip((first_position + 1) // size, full_begin, end)
    return Tile(
        number,
        steps_before - begin,
        index,
        lax.rem(pair, heads),
        tiles[index, FIRST_TOKEN],
        tiles[index, NUM_TOKENS],
        first_position,
        tiles[index, SEQUENCE],
        key_begin,
        key_end,
        begin,
        full_begin,
        full_end,
        end,
    )


def _place(round_: Any) -> Any:
    """Returns this thread block's place among the pairs of a round."""
    cta = lax.axis_index("cta")
    return jnp.where(lax.rem(round_, 2) == 0, cta, lax.axis_size("cta") - 1 - cta)
