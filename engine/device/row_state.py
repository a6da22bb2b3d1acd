"""Changes logits as requests ask for: bias, then penalties, then the masks of grammars.

In this order, for each row that uses it:

- bias: `logit_bias` is added; tokens outside `allowed_token_ids`, single-token `bad_words`, tokens
  that would complete a longer one, and, before `min_tokens`, those that end the request get -inf;
- repetition penalty: the logits of tokens in the prompt or the output are divided by it where
  positive, else multiplied (Keskar et al., 2019);
- frequency and presence penalty: the first is subtracted once per occurrence in the output, the
  second once if there is any;
- mask: tokens that the grammar of `structured_outputs` does not let follow get -inf.

What this needs is kept on the device, per row of the allocator, and not sent again every step:
how often each token occurs, and what is added to its logit. The host writes a sequence's row when
the sequence first samples in it, from tokens that it knows: the prompt and, after a preemption, the
output. From then on each step counts its own input token, which only the device may know yet. So a
step costs three floats and a few flags per row; only rows with bad words of several tokens send
something every step: which tokens to exclude if the last one, known or not, is a given one. And
rows with a grammar send a mask, a bit per token, for each token that they sample.

`pallas_paged.engine.core.row_edits` and `matching` decide on the host what to write.

Sizes: R rows of the allocator, one more that padding writes to; B rows of a step; V vocabulary;
K `NUM_ENTRIES`; W words of a mask.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_paged.engine.core.grammar import num_words
from pallas_paged.engine.core.row_edits import IN_PROMPT, OUTPUT, edit_layout

_MAX = float(np.finfo(np.float32).max)


class RowState(NamedTuple):
    """What the device knows of each row.

    8 bytes and a bit per row and token of the vocabulary, 78 MB for 64 rows and 150,000 tokens: it
    is not allocated before the first full step. A GPU's plan keeps room for it (`plan_pool`).

    Attributes:
      counts: i32[R + 1, V], twice the token's occurrences in the output, plus one if it occurs in
        the prompt.
      bias: f32[R + 1, V], added to the logits.
      masks: i32[R + 1, W], which tokens may follow, see `grammar.FindMasks`.
    """

    counts: jax.Array
    bias: jax.Array
    masks: jax.Array

    @classmethod
    def zeros(cls, num_rows: int, vocab_size: int) -> "RowState":
        """Returns the state of `num_rows` rows that nobody uses; 8 bytes per row and token."""
        shape = num_rows + 1, vocab_size
        return cls(
            jnp.zeros(shape, jnp.int32),
            jnp.zeros(shape, jnp.float32),
            jnp.zeros((num_rows + 1, num_words(vocab_size)), jnp.int32),
        )


class LogitInputs(NamedTuple):
    """How the logits of a step's rows change.

    Attributes:
      rows: i32[B], the allocator's rows.
      uses_bias: i32[B], 1 where `RowState.bias` is added.
      uses_penalties: i32[B], 1 where the penalties apply.
      uses_mask: i32[B], 1 where `RowState.masks` says which tokens are left.
      repetition_penalty: f32[B].
      presence_penalty: f32[B].
      frequency_penalty: f32[B].
    """

    rows: jax.Array
    uses_bias: jax.Array
    uses_penalties: jax.Array
    uses_mask: jax.Array
    repetition_penalty: jax.Array
    presence_penalty: jax.Array
    frequency_penalty: jax.Array


def apply_rules(
    logits: jax.Array, state: RowState, inputs: LogitInputs, *, looks: bool
) -> jax.Array:
    """Returns the logits f32[B, V] under the rules; rows that use none keep theirs bit for bit.

    What no row uses is skipped when the program runs, if it `looks`.
    """
    uses_bias, uses_penalties = inputs.uses_bias == 1, inputs.uses_penalties == 1
    uses_mask = inputs.uses_mask == 1

    def biased(logits: jax.Array) -> jax.Array:
        return jnp.where(uses_bias[:, None], logits + state.bias[inputs.rows], logits)

    def penalised(logits: jax.Array) -> jax.Array:
        counts = state.counts[inputs.rows]
        num_output = (counts // OUTPUT).astype(jnp.float32)
        factor = inputs.repetition_penalty[:, None]
        repeated = jnp.where(logits > 0, logits / factor, logits * factor)
        changed = jnp.where(counts > 0, repeated, logits)
        changed -= inputs.frequency_penalty[:, None] * num_output
        changed -= jnp.where(counts >= OUTPUT, inputs.presence_penalty[:, None], 0.0)
        # However large the penalty, a token that was possible stays so.
        changed = jnp.where(logits == -jnp.inf, logits, jnp.clip(changed, -_MAX, _MAX))
        return jnp.where(uses_penalties[:, None], changed, logits)

    def masked(logits: jax.Array) -> jax.Array:
        words = state.masks[inputs.rows][:, :, None]
        bits = (words >> jnp.arange(32, dtype=jnp.int32)[None, None]) & 1
        is_left = bits.reshape(len(logits), -1)[:, : logits.shape[1]] == 1
        return jnp.where(is_left | ~uses_mask[:, None], logits, -jnp.inf)

    if not looks:
        return masked(penalised(biased(logits)))
    logits = lax.cond(jnp.any(uses_bias), biased, lambda x: x, logits)
    logits = lax.cond(jnp.any(uses_penalties), penalised, lambda x: x, logits)
    return lax.cond(jnp.any(uses_mask), masked, lambda x: x, logits)


def count_tokens(counts: jax.Array, rows: jax.Array, tokens: jax.Array) -> jax.Array:
    """Returns `RowState.counts` with one more token i32[B] in the output of each row i32[B]."""
    return counts.at[rows, tokens].add(OUTPUT)


def edit_rows(
    state: RowState, last_tokens: jax.Array, packed: jax.Array, *, looks: bool
) -> RowState:
    """Returns the state, to be donated, with the rows changed as `RowEdits.next_edits` says.

    Clears rows, then adds what they have seen, sets values, and excludes tokens whose condition is
    -1 or the row's last token in `last_tokens` i32[R + 1]. A program that `looks` writes only the
    rows that it clears, any other one all of them.
    """
    x, offset = {}, 0
    for name, (size, dtype) in edit_layout(state.bias.shape[0] - 1).items():
        bits = lax.slice_in_dim(packed, offset, offset + size)
        x[name] = bits if dtype is np.int32 else lax.bitcast_convert_type(bits, dtype)
        offset += size
    vocab_size = state.bias.shape[1]

    def clear(i: jax.Array, state: RowState) -> RowState:
        row, fill = x["cleared_rows"][i], x["fills"][i]
        counts = lax.dynamic_update_slice(
            state.counts, jnp.zeros((1, vocab_size), jnp.int32), (row, jnp.int32(0))
        )
        bias = lax.dynamic_update_slice(
            state.bias, jnp.full((1, vocab_size), fill), (row, jnp.int32(0))
        )
        return state._replace(counts=counts, bias=bias)

    num_cleared = x["num_cleared"][0]
    if looks:
        counts, bias, _ = lax.fori_loop(0, num_cleared, clear, state)
    else:
        is_edit = jnp.arange(len(x["cleared_rows"]), dtype=jnp.int32) < num_cleared
        rows = jnp.where(is_edit, x["cleared_rows"], len(state.bias))  # outside: dropped
        is_cleared = jnp.zeros(len(state.bias), bool).at[rows].set(True, mode="drop")
        fills = jnp.zeros(len(state.bias), jnp.float32).at[rows].set(x["fills"], mode="drop")
        counts = jnp.where(is_cleared[:, None], 0, state.counts)
        bias = jnp.where(is_cleared[:, None], fills[:, None], state.bias)
    seen = x["seen_rows"], x["seen_tokens"]
    # A row's prompt is written before its output, so the mark is set on zeros and ones.
    counts = counts.at[seen].max(jnp.where(x["seen_as"] == IN_PROMPT, jnp.int32(IN_PROMPT), 0))
    counts = counts.at[seen].add(jnp.where(x["seen_as"] == OUTPUT, jnp.int32(OUTPUT), 0))
    bias = bias.at[x["value_rows"], x["value_tokens"]].set(x["values"])
    holds = (x["ban_conditions"] == -1) | (x["ban_conditions"] == last_tokens[x["ban_rows"]])
    bias = bias.at[x["ban_rows"], x["ban_tokens"]].min(
        jnp.where(holds, jnp.float32(-jnp.inf), jnp.inf)
    )
    return state._replace(counts=counts, bias=bias)


def edit_masks(masks: jax.Array, edit: jax.Array) -> jax.Array:
    """Returns `RowState.masks`, to be donated, with the rows of a `StepPlan.mask_edits` written."""
    return masks.at[edit[:, 0]].set(edit[:, 1:])
