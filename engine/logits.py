"""Changes logits as requests ask for: bias and masks, then penalties.

In this order, for each row that uses it:

- bias: `logit_bias` is added; tokens outside `allowed_token_ids`, single-token `bad_words`, tokens
  that would complete a longer one, and, before `min_tokens`, those that end the request get -inf;
- repetition penalty: the logits of tokens in the prompt or the output are divided by it where
  positive, else multiplied (Keskar et al., 2019);
- frequency and presence penalty: the first is subtracted once per occurrence in the output, the
  second once if there is any.

What this needs is kept on the device, per row of the allocator, and not sent again every step:
how often each token occurs, and what is added to its logit. The host writes a sequence's row when
the sequence first samples in it, from tokens that it knows: the prompt and, after a preemption, the
output. From then on each step counts its own input token, which only the device may know yet. So a
step costs three floats and a few flags per row; only rows with bad words of several tokens send
something every step: which tokens to exclude if the last one, known or not, is a given one.

`RowEdits` on the host decides what to write: it remembers whose state each row holds, and up to
which position. Whatever happens to rows (preemption, another owner, a fork, swapping, a cached
prefix), one that does not hold exactly what the next token needs is written anew.

Sizes: R rows of the allocator, one more that padding writes to; B rows of a step; V vocabulary;
K `NUM_ENTRIES`.
"""

import math
import weakref
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_paged.engine.logit_rules import LogitRules
from pallas_paged.engine.scheduler import ScheduledSequence, ScheduledStep
from pallas_paged.engine.sequence import Sequence

NUM_ENTRIES = 1024
"""Entries of each kind in one call of `edit_rows`."""
_MAX = float(np.finfo(np.float32).max)
_IN_PROMPT, _OUTPUT = 1, 2


class RowState(NamedTuple):
    """What the device knows of each row.

    8 bytes per row and token of the vocabulary, 77 MB for 64 rows and 150,000 tokens: it is not
    allocated before the first full step. A GPU's plan keeps room for it (`plan_pool`).

    Attributes:
      counts: i32[R + 1, V], twice the token's occurrences in the output, plus one if it occurs in
        the prompt.
      bias: f32[R + 1, V], added to the logits.
    """

    counts: jax.Array
    bias: jax.Array

    @classmethod
    def zeros(cls, num_rows: int, vocab_size: int) -> "RowState":
        """Returns the state of `num_rows` rows that nobody uses; 8 bytes per row and token."""
        shape = num_rows + 1, vocab_size
        return cls(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))


class LogitInputs(NamedTuple):
    """How the logits of a step's rows change.

    Attributes:
      rows: i32[B], the allocator's rows.
      uses_bias: i32[B], 1 where `RowState.bias` is added.
      uses_penalties: i32[B], 1 where the penalties apply.
      repetition_penalty: f32[B].
      presence_penalty: f32[B].
      frequency_penalty: f32[B].
    """

    rows: jax.Array
    uses_bias: jax.Array
    uses_penalties: jax.Array
    repetition_penalty: jax.Array
    presence_penalty: jax.Array
    frequency_penalty: jax.Array


def apply_rules(logits: jax.Array, state: RowState, inputs: LogitInputs) -> jax.Array:
    """Returns the logits f32[B, V] under the rules; rows that use none keep theirs bit for bit."""
    uses_bias, uses_penalties = inputs.uses_bias == 1, inputs.uses_penalties == 1

    def biased(logits: jax.Array) -> jax.Array:
        return jnp.where(uses_bias[:, None], logits + state.bias[inputs.rows], logits)

    def penalised(logits: jax.Array) -> jax.Array:
        counts = state.counts[inputs.rows]
        num_output = (counts // _OUTPUT).astype(jnp.float32)
        factor = inputs.repetition_penalty[:, None]
        repeated = jnp.where(logits > 0, logits / factor, logits * factor)
        changed = jnp.where(counts > 0, repeated, logits)
        changed -= inputs.frequency_penalty[:, None] * num_output
        changed -= jnp.where(counts >= _OUTPUT, inputs.presence_penalty[:, None], 0.0)
        # However large the penalty, a token that was possible stays so.
        changed = jnp.where(logits == -jnp.inf, logits, jnp.clip(changed, -_MAX, _MAX))
        return jnp.where(uses_penalties[:, None], changed, logits)

    logits = lax.cond(jnp.any(uses_bias), biased, lambda x: x, logits)
    return lax.cond(jnp.any(uses_penalties), penalised, lambda x: x, logits)


def count_tokens(counts: jax.Array, rows: jax.Array, tokens: jax.Array) -> jax.Array:
    """Returns `RowState.counts` with one more token i32[B] in the output of each row i32[B]."""
    return counts.at[rows, tokens].add(_OUTPUT)


# ---- writing rows ------------------------------------------------------------------------------


def _layout(num_rows: int) -> dict[str, tuple[int, type]]:
    """Returns the fields of a packed edit, with sizes and dtypes."""
    i32, f32, K = np.int32, np.float32, NUM_ENTRIES
    return {
        "num_cleared": (1, i32),
        "cleared_rows": (num_rows, i32),
        "fills": (num_rows, f32),
        **dict.fromkeys(("seen_rows", "seen_tokens", "seen_as"), (K, i32)),
        **dict.fromkeys(("value_rows", "value_tokens"), (K, i32)),
        "values": (K, f32),
        **dict.fromkeys(("ban_rows", "ban_tokens", "ban_conditions"), (K, i32)),
    }


def edit_size(num_rows: int) -> int:
    """Returns the number of int32 in a packed edit."""
    return sum(size for size, _ in _layout(num_rows).values())


def edit_rows(state: RowState, last_tokens: jax.Array, packed: jax.Array) -> RowState:
    """Returns the state, to be donated, with the rows changed as `RowEdits.next_edits` says.

    Clears rows, then adds what they have seen, sets values, and excludes tokens whose condition is
    -1 or the row's last token in `last_tokens` i32[R + 1].
    """
    x, offset = {}, 0
    for name, (size, dtype) in _layout(state.bias.shape[0] - 1).items():
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
        return RowState(counts, bias)

    counts, bias = lax.fori_loop(0, x["num_cleared"][0], clear, state)
    seen = x["seen_rows"], x["seen_tokens"]
    # A row's prompt is written before its output, so the mark is set on zeros and ones.
    counts = counts.at[seen].max(jnp.where(x["seen_as"] == _IN_PROMPT, jnp.int32(_IN_PROMPT), 0))
    counts = counts.at[seen].add(jnp.where(x["seen_as"] == _OUTPUT, jnp.int32(_OUTPUT), 0))
    bias = bias.at[x["value_rows"], x["value_tokens"]].set(x["values"])
    holds = (x["ban_conditions"] == -1) | (x["ban_conditions"] == last_tokens[x["ban_rows"]])
    bias = bias.at[x["ban_rows"], x["ban_tokens"]].min(
        jnp.where(holds, jnp.float32(-jnp.inf), jnp.inf)
    )
    return RowState(counts, bias)


class _Held(NamedTuple):
    """What a row holds: the state for a sequence's token at `position`, but for its input token."""

    sequence: weakref.ref[Sequence]  # a finished one, with all its tokens, is not kept for that
    position: int
    is_short: bool  # ending tokens are excluded
    banned: list[int]  # by bad sequences, in the step before


class _Edit(NamedTuple):
    """Entries of an edit, in the order of the packed fields."""

    cleared: list[tuple[int, float]]
    seen: list[tuple[int, int, int]]
    values: list[tuple[int, int, float]]
    bans: list[tuple[int, int, int]]


class RowEdits:
    """Follows which rows of a `RowState` hold what, and says what a step needs written first."""

    def __init__(self, num_rows: int) -> None:
        """Starts with R rows that hold nothing."""
        self._num_rows = num_rows
        self._held: dict[int, _Held] = {}

    def next_edits(self, step: ScheduledStep) -> list[np.ndarray]:
        """Returns packed inputs of `edit_rows`, to be run in order before the step; often none.

        Steps come in the order of their dispatch, each of them once.
        """
        edit = _Edit([], [], [], [])
        for share in step.scheduled:
            rules = share.sequence.logit_rules
            if share.samples and rules is not None:
                self._prepare(share, rules, edit)
        return self._packed(edit) if any(edit) else []

    def _prepare(self, share: ScheduledSequence, rules: LogitRules, edit: _Edit) -> None:
        """Adds what the share's row needs for the token that it samples."""
        sequence, row = share.sequence, share.row
        position = share.start + share.num_tokens
        num_output = position - sequence.num_prompt_tokens
        is_short = num_output < rules.min_tokens
        held = self._held.get(row)
        if held is None or held.sequence() is not sequence or held.position != position:
            self._write(share, rules, edit)
        else:
            changed = set(held.banned)
            if held.is_short != is_short:
                changed |= rules.ending_ids
            edit.values.extend((row, t, rules.value_of(t, num_output)) for t in changed)
        num_looked_at = min(num_output, rules.max_looked_at)
        output = sequence.token_ids[position - num_looked_at : position]
        bans = rules.bans(output, last_is_known=not share.input_on_device)
        edit.bans.extend((row, token, condition) for token, condition in bans)
        banned = [token for token, _ in bans]
        self._held[row] = _Held(weakref.ref(sequence), position + 1, is_short, banned)

    def _write(self, share: ScheduledSequence, rules: LogitRules, edit: _Edit) -> None:
        """Adds all that a row holds; the step's own input token is counted by the step."""
        sequence, row = share.sequence, share.row
        position = share.start + share.num_tokens
        num_output = position - sequence.num_prompt_tokens
        edit.cleared.append((row, rules.fill))
        named = rules.values.keys() | (rules.ending_ids if num_output < rules.min_tokens else ())
        edit.values.extend((row, t, rules.value_of(t, num_output)) for t in named)
        if rules.uses_penalties:
            prompt = set(sequence.prompt_token_ids)
            output = sequence.token_ids[sequence.num_prompt_tokens : position - 1]
            edit.seen.extend((row, token, _IN_PROMPT) for token in prompt)
            edit.seen.extend((row, token, _OUTPUT) for token in output)

    def _packed(self, edit: _Edit) -> list[np.ndarray]:
        """Returns the entries in as many packed edits as they need, exclusions in the last ones."""
        K = NUM_ENTRIES
        num_first = max(1, math.ceil(len(edit.seen) / K), math.ceil(len(edit.values) / K))
        num_bans = max(1, math.ceil(len(edit.bans) / K))
        packed = []
        for i in range(num_first + num_bans - 1):
            ban = i - (num_first - 1)
            seen, values = edit.seen[i * K : (i + 1) * K], edit.values[i * K : (i + 1) * K]
            bans = edit.bans[ban * K : (ban + 1) * K] if ban >= 0 else []
            packed.append(self._pack(_Edit(edit.cleared if i == 0 else [], seen, values, bans)))
        return packed

    def _pack(self, edit: _Edit) -> np.ndarray:
        """Returns at most K entries of each kind; the padding row takes the rest."""
        packed = np.zeros(edit_size(self._num_rows), np.int32)
        x: dict[str, np.ndarray] = {}
        offset = 0
        for name, (size, dtype) in _layout(self._num_rows).items():
            x[name] = packed[offset : offset + size].view(dtype)
            offset += size
        x["num_cleared"][0] = len(edit.cleared)
        for rows in ("cleared_rows", "seen_rows", "value_rows", "ban_rows"):
            x[rows][:] = self._num_rows
        for names, entries in (
            (("cleared_rows", "fills"), edit.cleared),
            (("seen_rows", "seen_tokens", "seen_as"), edit.seen),
            (("value_rows", "value_tokens", "values"), edit.values),
            (("ban_rows", "ban_tokens", "ban_conditions"), edit.bans),
        ):
            for name, column in zip(names, zip(*entries, strict=True), strict=False):
                x[name][: len(column)] = column
        return packed
