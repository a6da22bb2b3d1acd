"""Keeps the matchers of sequences up to date, and says when a grammar ends a sequence."""

import logging
from collections.abc import Iterable

import numpy as np

from pallas_paged.engine.core.core_output import FinishReason
from pallas_paged.engine.core.grammar import NUM_MASKS, FindMasks, Matcher
from pallas_paged.engine.core.request import TokenSequence
from pallas_paged.engine.core.scheduled import ScheduledSequence

logger = logging.getLogger(__name__)

type Ending = tuple[FinishReason, int | str | None]
"""Finish and stop reason."""


def matcher_of(sequence: TokenSequence) -> Matcher:
    """Returns the matcher of a sequence with a grammar, which was given all of its tokens."""
    matcher = sequence.matcher
    if matcher is None:
        rules = sequence.logit_rules
        assert rules is not None
        assert rules.grammar is not None, "there is nothing to follow"
        matcher = sequence.matcher = rules.grammar.start()
    new = sequence.token_ids[sequence.num_prompt_tokens + matcher.num_taken :]
    if new:
        matcher.take(new)
    return matcher


def is_over(sequence: TokenSequence) -> bool:
    """Whether the grammar of a sequence, if it has one, lets nothing follow its tokens."""
    if not sequence.group.uses_mask:
        return False
    matcher = matcher_of(sequence)
    return matcher.is_over or matcher.fault is not None


def ending_of(sequence: TokenSequence) -> Ending:
    """Returns why a sequence that is over with its last token is."""
    if is_over(sequence):
        return _ending_by(matcher_of(sequence), sequence.request_id)
    return sequence.group.ending_of(sequence.token_ids[-1])


def ending_without_token(sequence: TokenSequence, reason: str) -> Ending:
    """Returns why a sequence ends for which there was no next token, for this reason."""
    if sequence.group.uses_mask:
        matcher = matcher_of(sequence)
        if matcher.fault is not None or matcher.may_end:
            return _ending_by(matcher, sequence.request_id)
    logger.error("request %s aborted: %s", sequence.request_id, reason)
    return "abort", reason


def _ending_by(matcher: Matcher, request_id: str) -> Ending:
    if matcher.fault is None:
        return "stop", None
    logger.error("request %s aborted: %s", request_id, matcher.fault)
    return "abort", matcher.fault


def mask_edits(
    scheduled: Iterable[ScheduledSequence], num_rows: int, find_masks: FindMasks
) -> list[np.ndarray]:
    """Returns a step's `StepPlan.mask_edits`: the masks of the sequences that sample under one.

    The host knows all tokens of these: their groups wait for it.
    """
    masked = [one for one in scheduled if one.samples and one.sequence.group.uses_mask]
    if not masked:
        return []
    assert not any(one.input_on_device for one in masked), "the mask follows from the last token"
    masks = find_masks([matcher_of(one.sequence) for one in masked])
    edits = []
    for first in range(0, len(masked), NUM_MASKS):
        part = masked[first : first + NUM_MASKS]
        edit = np.zeros((NUM_MASKS, 1 + masks.shape[1]), np.int32)
        edit[:, 0] = num_rows
        edit[: len(part), 0] = [one.row for one in part]
        edit[: len(part), 1:] = masks[first : first + NUM_MASKS]
        edits.append(edit)
    return edits
