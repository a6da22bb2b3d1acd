"""What is known of the sequence in each row of the block tables, in columns: an entry per row."""

from typing import NamedTuple

import numpy as np


class Progress(NamedTuple):
    """How far a row's sequence is: three counts of tokens, one of blocks; see `RowColumns`."""

    num_dispatched: int
    num_computed: int
    num_reserved: int
    num_remembered: int


class RowColumns:
    """R rows, those in use with a sequence; `TokenSequence.take_row` fills one, `clear` empties it.

    A step reads and writes its rows' entries all at once. Objects, one for each sequence, lie all
    over memory, and a step of a thousand sequences would fetch each of them again.

    Three counts tell how far a sequence is, because the host runs one step ahead of the device:
    `num_computed <= num_dispatched <= num_reserved`.

    Attributes:
      numbers: i64[R], the sequences' `number`; -1 where there is none.
      num_known: i32[R], tokens that the host knows, prompt and output.
      num_tokens: i32[R], those and the ones that uncommitted steps sample.
      num_reserved: i32[R], tokens that the row has blocks for.
      num_dispatched: i32[R], tokens whose keys and values are computed, or will be by a step in
        flight.
      num_computed: i32[R], tokens whose keys and values a committed step computed, or that were
        found in the prefix cache: a step in flight may still compute those.
      num_remembered: i32[R], full blocks of `num_computed` that the memory was told of, see
        `Memory.remember`.
      num_entered: i32[R], full blocks that the memory keeps, or was told of: those of
        `num_remembered`, and others from the dispatch of the step on that fills them.
      max_length: i32[R], the group's, as are the next four.
      waits_for_host: bool[R].
      speculates: bool[R].
      uses_mask: bool[R].
      is_held: bool[R].
      runs_on: bool[R], see `SequenceGroup.runs_on`.
      num_drafts: i32[R], tokens in the sequences' `drafts`.
      num_ahead: see `Proposer`; the same for all rows.
      has_told: bool[R], whether a token that ends nothing is all that there is to tell: new times,
        for instance, were told with a token before.
      token_ids: the sequences' own lists, prompt and output.
      ending_ids: tokens that end them.
      request_ids: the names of their requests.
      indices: which of the request's completions they are.
    """

    def __init__(self, num_rows: int, num_ahead: int = 0) -> None:
        """Starts with empty rows."""
        self._num_rows = num_rows
        self.num_ahead = num_ahead
        self.clear_all()

    def clear_all(self) -> None:
        """Empties all rows, whatever they hold."""
        R = self._num_rows
        self.numbers = np.full(R, -1, np.int64)
        self.num_known, self.num_tokens, self.max_length = np.zeros((3, R), np.int32)
        self.num_reserved, self.num_dispatched, self.num_computed = np.zeros((3, R), np.int32)
        self.num_remembered, self.num_entered = np.zeros((2, R), np.int32)
        self.waits_for_host, self.is_held, self.has_told = np.zeros((3, R), bool)
        self.runs_on, self.speculates, self.uses_mask = np.zeros((3, R), bool)
        self.num_drafts = np.zeros(R, np.int32)
        self.token_ids: list[list[int]] = [[]] * R
        self.ending_ids: list[frozenset[int]] = [frozenset()] * R
        self.request_ids = [""] * R
        self.indices = [0] * R

    def clear(self, row: int) -> None:
        """Empties a row."""
        self.numbers[row] = -1
        self.num_drafts[row] = 0
        self.token_ids[row], self.request_ids[row] = [], ""

    def progress(self, row: int) -> Progress:
        """Returns how far a row's sequence is."""
        return Progress(
            int(self.num_dispatched[row]),
            int(self.num_computed[row]),
            int(self.num_reserved[row]),
            int(self.num_remembered[row]),
        )
