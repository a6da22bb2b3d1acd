"""From what the scheduler decided to the plan that a device gets: padded, packed, no objects."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from pallas_paged.engine.core.buckets import Bucket, Buckets
from pallas_paged.engine.core.grammar import FindMasks
from pallas_paged.engine.core.matching import mask_edits
from pallas_paged.engine.core.plan import StepPlan
from pallas_paged.engine.core.request import MAX_ENDING_IDS, SequenceGroup, TokenSequence
from pallas_paged.engine.core.row_edits import RowEdits
from pallas_paged.engine.core.scheduled import Batch, ScheduledSequence, ScheduledStep
from pallas_paged.engine.core.shared_prefix import PrefixFinder
from pallas_paged.engine.core.step_inputs import (
    DraftInputs,
    FullInputs,
    StepInputs,
    packed_size,
    seed_words,
    views,
)
from pallas_paged.engine.core.table_edits import TableEdits
from pallas_paged.engine.kv.interface import Memory

NO_TARGETS = np.zeros((3, 0), np.int32)
"""A plan's `prompt_targets` where nobody asks for log-probabilities of a prompt."""


class Planned(NamedTuple):
    """A plan, and what the core has to know of it.

    Attributes:
      plan: for the device.
      prompts: whose its `prompt_targets` are: requests with numbers of tokens, in order.
      likely: the shape of the next step, if no more requests come; None if it is this one.
    """

    plan: StepPlan
    prompts: list[tuple[SequenceGroup, int]]
    likely: Bucket | None


class Planner:
    """Makes plans of scheduled steps, in the order in which they were scheduled.

    What a row's sequence asks of sampling is kept in columns, one entry per row of the block
    tables, and written only when the row gets another sequence.
    """

    def __init__(
        self,
        memory: Memory,
        buckets: Buckets,
        choose: Callable[[Bucket, Callable[[], Sequence[Bucket]]], Bucket] = lambda best, _: best,
        find_masks: FindMasks | None = None,
    ) -> None:
        """Takes blocks from the tables of `memory`, and shapes from `buckets` by `choose`.

        That is `Executor.choose`. Requests with a grammar need `find_masks`. A device that has run
        the plans of another planner holds other tables: call `reset` then.
        """
        assert buckets.table_widths[-1] == memory.tables.shape[1], "the device has other tables"
        self._memory = memory
        self._buckets = buckets
        self._choose = choose
        self._find_masks = find_masks
        self._num_rows = len(memory.tables)
        self._prefixes = PrefixFinder(memory)
        self.reset()

    def reset(self) -> None:
        """Forgets what the device's rows hold."""
        self._table_edits = TableEdits(self._memory)
        self._columns = _Columns(self._num_rows, self._buckets.has_logprobs)
        self._row_edits = RowEdits(self._num_rows)

    def plan(self, step: ScheduledStep) -> Planned:
        """Returns the plan of a step; the blocks of all its tokens are in the block tables."""
        batch = step.batch
        self._columns.follow(batch)
        targets: list[range] = []
        scheduled: list[ScheduledSequence] = []
        is_full = wants_logprobs = samples_full = False
        if self._columns.asks[batch.rows].any():
            sampling = batch.rows[batch.samples]
            wants_logprobs = bool(self._columns.has_logprobs[sampling].any())
            samples_full = is_full = bool(self._columns.needs_full[sampling].any())
            if self._columns.asks_of_prompt[batch.rows].any():
                targets = [_targets_of(one) for one in step.scheduled]
                is_full |= any(targets)
            if is_full:
                scheduled = step.scheduled
        B, width = len(batch.sequences), -(-int(batch.ends.max()) // self._memory.block_size)
        is_decode = bool((batch.num_tokens == 1).all()) and not any(targets)
        num_steps, has_drafts = int(batch.num_steps.max()), bool(batch.num_drafts.any())
        if self._buckets.proposes:
            has_drafts |= any(sequence.group.speculates for sequence in batch.sequences)
        filters = bool(self._columns.filters[batch.rows].any())
        prefix = None
        if self._buckets.shares_prefix and is_decode and not is_full:
            prefix = self._prefixes.find(batch)
        kind = {
            "is_decode": is_decode,
            "is_full": is_full,
            "has_drafts": has_drafts,
            "filters": filters,
            "has_decodes": bool((batch.num_tokens == 1).any()),
            "shares_prefix": prefix is not None,
            "has_logprobs": wants_logprobs,
        }

        def all_that_fit() -> list[Bucket]:
            found = self._buckets.holding(step.num_tokens, B, width, **kind)
            return [bucket for bucket in found if bucket.num_steps >= num_steps]

        best = self._buckets.pick(step.num_tokens, B, width, **kind)
        bucket = self._choose(best, all_that_fit)
        likely = None
        if not is_decode and not has_drafts:
            likely = self._buckets.pick(
                B,
                B,
                width,
                is_decode=True,
                is_full=samples_full,
                filters=filters,
                has_logprobs=wants_logprobs,
            )
        elif self._buckets.proposes:
            most = min(B * (1 + self._buckets.num_drafts), self._buckets.draft_tokens[-1])
            likely = self._buckets.pick(most, B, width, is_decode=False, has_drafts=True)
        assert bucket.num_steps >= num_steps, "no program makes so many steps"
        prompt_targets, prompts = _take_targets(scheduled, targets)
        table_edits, last_edit = self._table_edits.next_edits(batch.rows, bucket.num_seqs)
        inputs = np.zeros(packed_size(bucket), np.int32)
        x = views(inputs, bucket)
        x.table_places[:], x.table_blocks[:] = last_edit
        self._fill(x, batch, scheduled)
        if x.prefix is not None and prefix is not None:
            x.prefix.shares_prefix[:B] = prefix.is_shared
            x.prefix.prefix_row[0] = prefix.row
            x.prefix.prefix_blocks[0] = prefix.num_blocks
        plan = StepPlan(
            step.step_id,
            bucket,
            step.dropped_chunks,
            step.swap_outs,
            step.swap_ins,
            step.copies,
            tuple(table_edits),
            tuple(self._row_edits.next_edits(scheduled)) if is_full else (),
            self._mask_edits(scheduled),
            inputs,
            wants_logprobs,
            prompt_targets,
        )
        return Planned(plan, prompts, likely)

    def _mask_edits(self, scheduled: list[ScheduledSequence]) -> tuple[np.ndarray, ...]:
        if self._find_masks is None:
            return ()
        return tuple(mask_edits(scheduled, self._num_rows, self._find_masks))

    def _fill(
        self,
        x: StepInputs[np.ndarray],
        batch: Batch,
        scheduled: list[ScheduledSequence],
    ) -> None:
        """Fills the inputs of a step, which are zeros, but for the entries of block tables.

        `scheduled` is needed for full buckets only.
        """
        tables, S = self._memory.tables, self._memory.block_size
        sequences, _, rows, starts, counts, samples, on_device, num_steps, num_drafts = batch
        lens = starts + counts
        ends = np.cumsum(counts, dtype=np.int32)
        B, T = len(rows), int(ends[-1])
        positions = np.arange(T, dtype=np.int32) + np.repeat(starts - (ends - counts), counts)
        x.positions[:T] = positions
        x.slot_mapping[:T] = tables[np.repeat(rows, counts), positions // S] * S + positions % S
        x.seq_lens[:B] = np.where(counts > 0, lens, 0)
        x.query_start_loc[1 : B + 1] = ends
        x.query_start_loc[B + 1 :] = T
        x.rows[B:] = x.sample_rows[B:] = self._num_rows
        x.rows[:B] = rows
        x.sample_rows[:B] = np.where(samples, rows, self._num_rows)
        x.logits_indices[:B] = ends - 1  # for a fork without tokens, the last one of its parent
        x.sample_positions[:B] = lens - num_drafts
        x.input_on_device[:B] = on_device
        for b in np.flatnonzero(~on_device & (counts > 0)).tolist():
            start, count = starts[b], counts[b]
            token_ids = sequences[b].token_ids[start : start + count]
            if num_drafts[b]:
                token_ids += sequences[b].drafts[: num_drafts[b]]
            x.input_ids[ends[b] - count : ends[b]] = token_ids
        self._columns.fill(x, rows)
        if x.full is not None:
            _fill_full(x.full, scheduled, self._num_rows)
        if x.drafts is not None:
            fill_drafts(x.drafts, ends - 1, num_drafts)
        if x.many is not None:
            x.many.num_steps[:B] = num_steps
            x.many.ending_ids[:B] = self._columns.ending_ids[rows]


class _Columns:
    """What each row's sequence asks of sampling.

    Attributes:
      asks: bool[R], whether its request asks for log-probabilities or has rules for logits: what
        follows is true of no other one.
      needs_full: bool[R], whether the steps are full that sample its tokens.
      has_logprobs: bool[R], whether its tokens come with log-probabilities.
      asks_of_prompt: bool[R], whether those of its prompt do.
      filters: bool[R], whether its tokens are drawn with a top-k or a top-p.
      ending_ids: i32[R, `MAX_ENDING_IDS`], padded with -1. All of it is padding if there are more:
        the device is not told, and the host finds out.
    """

    def __init__(self, num_rows: int, plain_logprobs: bool) -> None:
        self._plain_logprobs = plain_logprobs  # see `Buckets.has_logprobs`
        self.asks, self.needs_full, self.filters = np.zeros((3, num_rows), bool)
        self.has_logprobs, self.asks_of_prompt = np.zeros((2, num_rows), bool)
        self._numbers = np.full(num_rows, -1, np.int64)  # of the sequences
        self._temperature, self._top_p, self._min_p = np.zeros((3, num_rows), np.float32)
        self._top_k, self._sample_index = np.zeros((2, num_rows), np.int32)
        self._seeds = np.zeros((num_rows, 2), np.uint32)
        self.ending_ids = np.full((num_rows, MAX_ENDING_IDS), -1, np.int32)

    def follow(self, batch: Batch) -> None:
        """Writes the rows that have got another sequence."""
        for b in np.flatnonzero(self._numbers[batch.rows] != batch.numbers).tolist():
            self._write(int(batch.rows[b]), batch.sequences[b])

    def _write(self, row: int, sequence: TokenSequence) -> None:
        group = sequence.group
        params = group.sampling_params
        self._numbers[row] = sequence.number
        self._temperature[row] = params.temperature
        self._top_k[row] = params.top_k
        self._top_p[row] = params.top_p
        self._min_p[row] = params.min_p
        self._seeds[row] = seed_words(params.seed)
        self._sample_index[row] = sequence.index
        self.ending_ids[row] = -1
        if len(group.ending_ids) <= MAX_ENDING_IDS:
            self.ending_ids[row, : len(group.ending_ids)] = list(group.ending_ids)
        self.has_logprobs[row] = params.logprobs is not None
        self.asks_of_prompt[row] = params.prompt_logprobs is not None
        is_plain = params.logprobs is None or (params.logprobs == 0 and self._plain_logprobs)
        self.needs_full[row] = not is_plain or group.logit_rules is not None
        self.asks[row] = self.needs_full[row] or self.has_logprobs[row] or self.asks_of_prompt[row]
        is_cut = params.top_k > 0 or params.top_p < 1
        self.filters[row] = params.temperature > 0 and is_cut

    def fill(self, x: StepInputs[np.ndarray], rows: np.ndarray) -> None:
        """Fills a step's sampling inputs."""
        B = len(rows)
        x.temperature[:B] = self._temperature[rows]
        x.top_k[:B] = self._top_k[rows]
        x.top_p[:B] = self._top_p[rows]
        x.min_p[:B] = self._min_p[rows]
        x.seeds[:B] = self._seeds[rows]
        x.sample_index[:B] = self._sample_index[rows]


def samples_logprobs(one: ScheduledSequence) -> bool:
    """Whether the token that is sampled comes with log-probabilities."""
    return one.samples and one.sequence.sampling_params.logprobs is not None


def _targets_of(one: ScheduledSequence) -> range:
    """Returns the positions of the prompt's tokens whose log-probabilities the step brings.

    Each position once in a request's life, whatever is computed again after a preemption. The
    token at position p is predicted by the one before it, which may be in another chunk than it.
    """
    sequence = one.sequence
    if sequence.sampling_params.prompt_logprobs is None:
        return range(0)
    _, targets = sequence.sampling_params.logprob_targets(sequence.prompt_token_ids)
    first = max(one.start, sequence.group.num_prompt_logprobs) + 1
    return range(first, min(one.start + one.num_tokens, len(targets) - 1) + 1)


def _take_targets(
    scheduled: list[ScheduledSequence], targets: list[range]
) -> tuple[np.ndarray, list[tuple[SequenceGroup, int]]]:
    """Returns `prompt_targets` and `Planned.prompts`, and counts them as on their way."""
    if not any(targets):
        return NO_TARGETS, []
    indices: list[int] = []
    tokens: list[int] = []
    temperatures: list[float] = []
    prompts: list[tuple[SequenceGroup, int]] = []
    offset = 0
    for one, positions in zip(scheduled, targets, strict=True):
        if positions:
            indices.extend(offset + position - 1 - one.start for position in positions)
            sequence, params = one.sequence, one.sequence.sampling_params
            _, all_tokens = params.logprob_targets(sequence.prompt_token_ids)
            tokens.extend(all_tokens[positions.start : positions.stop])
            temperatures += [params.logprob_temperature()] * len(positions)
            prompts.append((one.sequence.group, len(positions)))
            one.sequence.group.num_prompt_logprobs = positions.stop - 1
        offset += one.num_tokens
    bits = np.array(temperatures, np.float32).view(np.int32)
    return np.array([indices, tokens, bits], np.int32), prompts


def fill_drafts(x: DraftInputs[np.ndarray], lasts: np.ndarray, num_drafts: np.ndarray) -> None:
    """Fills the fields of steps with drafts; `lasts` i32[B] are the sequences' last tokens."""
    B = len(lasts)
    counts = num_drafts + 1
    ends = np.cumsum(counts)
    L = int(ends[-1])
    x.num_drafts[:B] = num_drafts
    x.firsts[:B] = ends - counts
    x.owners[:L] = np.repeat(np.arange(B), counts)
    x.places[:L] = np.repeat(lasts + 1 - ends, counts) + np.arange(L)


def _fill_full(
    x: FullInputs[np.ndarray], scheduled: list[ScheduledSequence], num_rows: int
) -> None:
    """Fills the fields that only full steps have."""
    x.counted_rows[:] = num_rows
    x.repetition_penalty[:] = 1.0
    for b, one in enumerate(scheduled):
        x.wants_logprobs[b] = samples_logprobs(one)
        rules = one.sequence.logit_rules
        if rules is None or not one.samples:
            continue
        x.uses_bias[b] = rules.uses_bias
        x.uses_mask[b] = rules.grammar is not None
        if rules.uses_penalties:
            x.uses_penalties[b] = 1
            x.repetition_penalty[b] = rules.repetition_penalty
            x.presence_penalty[b] = rules.presence_penalty
            x.frequency_penalty[b] = rules.frequency_penalty
            if one.start + one.num_tokens > one.sequence.num_prompt_tokens:
                x.counted_rows[b] = one.row
