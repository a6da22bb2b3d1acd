"""Which rows of the device's `RowState` hold what, and what a step needs written into them first.

`RowEdits` remembers whose state each row holds, and up to which position. Whatever happens to rows
(preemption, another owner, a fork, swapping, a cached prefix), one that does not hold exactly what
the next token needs is written anew. `pallas_paged.engine.device.row_state` says what the state is.
"""

import math
import weakref
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from pallas_paged.engine.core.logit_rules import LogitRules
from pallas_paged.engine.core.request import TokenSequence
from pallas_paged.engine.core.scheduled import ScheduledSequence

NUM_ENTRIES = 1024
"""Entries of each kind in one edit."""
IN_PROMPT, OUTPUT = 1, 2
"""What a token counts that occurs in the prompt, and for each time that it does in the output."""


def edit_layout(num_rows: int) -> dict[str, tuple[int, type]]:
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
    return sum(size for size, _ in edit_layout(num_rows).values())


class _Held(NamedTuple):
    """What a row holds: the state for a sequence's token at `position`, without its input token."""

    # Weak: a finished sequence, with all its tokens, is not kept for this.
    sequence: weakref.ref[TokenSequence]
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

    def next_edits(self, scheduled: Iterable[ScheduledSequence]) -> list[np.ndarray]:
        """Returns packed inputs of `edit_rows`, to be run in order before the step; often none.

        Steps come in the order of their dispatch, each of them once.
        """
        edit = _Edit([], [], [], [])
        for one in scheduled:
            rules = one.sequence.logit_rules
            if one.samples and rules is not None and (rules.uses_bias or rules.uses_penalties):
                self._prepare(one, rules, edit)
        return self._packed(edit) if any(edit) else []

    def _prepare(self, one: ScheduledSequence, rules: LogitRules, edit: _Edit) -> None:
        """Adds what its row needs for the token that it samples."""
        sequence, row = one.sequence, one.row
        position = one.start + one.num_tokens
        num_output = position - sequence.num_prompt_tokens
        is_short = num_output < rules.min_tokens
        held = self._held.get(row)
        if held is None or held.sequence() is not sequence or held.position != position:
            self._write(one, rules, edit)
        else:
            changed = set(held.banned)
            if held.is_short != is_short:
                changed |= rules.ending_ids
            edit.values.extend((row, t, rules.value_of(t, num_output)) for t in changed)
        num_looked_at = min(num_output, rules.max_looked_at)
        output = sequence.token_ids[position - num_looked_at : position]
        bans = rules.bans(output, last_is_known=not one.input_on_device)
        edit.bans.extend((row, token, condition) for token, condition in bans)
        banned = [token for token, _ in bans]
        self._held[row] = _Held(weakref.ref(sequence), position + 1, is_short, banned)

    def _write(self, one: ScheduledSequence, rules: LogitRules, edit: _Edit) -> None:
        """Adds all that a row holds; the step's own input token is counted by the step."""
        sequence, row = one.sequence, one.row
        position = one.start + one.num_tokens
        num_output = position - sequence.num_prompt_tokens
        edit.cleared.append((row, rules.fill))
        named = rules.values.keys() | (rules.ending_ids if num_output < rules.min_tokens else ())
        edit.values.extend((row, t, rules.value_of(t, num_output)) for t in named)
        if rules.uses_penalties:
            prompt = set(sequence.prompt_token_ids)
            output = sequence.token_ids[sequence.num_prompt_tokens : position - 1]
            edit.seen.extend((row, token, IN_PROMPT) for token in prompt)
            edit.seen.extend((row, token, OUTPUT) for token in output)

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
        for name, (size, dtype) in edit_layout(self._num_rows).items():
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
