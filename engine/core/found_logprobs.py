"""Whose the log-probabilities are that a step found: they are given out, or kept until the end."""

import numpy as np

from pallas_paged.engine.core import logprobs
from pallas_paged.engine.core.beam_search import Candidates
from pallas_paged.engine.core.core_output import Held, TokenLogprobs
from pallas_paged.engine.core.request import TokenSequence
from pallas_paged.engine.core.scheduled import ScheduledStep


class FoundLogprobs:
    """Those of the tokens that a step sampled; made before the step is committed.

    How many of a sequence's tokens count the commit alone knows: it may have ended before them, or
    with one of them.
    """

    def __init__(self, step: ScheduledStep, packed: np.ndarray) -> None:
        """Takes `StepResult.logprobs` of a step."""
        batch = step.batch
        asking = [
            b
            for b in np.flatnonzero(batch.samples).tolist()
            if batch.sequences[b].sampling_params.logprobs is not None
        ]
        self._places = asking
        self._sequences = [batch.sequences[b] for b in asking]
        self._lengths = [len(sequence.token_ids) for sequence in self._sequences]
        self._heads = packed[asking, :, : logprobs.NUM_OWN]  # a copy: it may be kept for long
        asked = [sequence.sampling_params.logprobs for sequence in self._sequences]
        with_tops = [place for place, num_top in enumerate(asked) if num_top]
        self._tops: dict[int, TokenLogprobs] = {}
        if with_tops:  # the step is full, and each sequence has one token
            most = -1 if -1 in asked else max(asked)
            found = logprobs.read(packed[[asking[place] for place in with_tops], 0], most)
            for index, place in enumerate(with_tops):
                width = found.top_token_ids.shape[1] if asked[place] == -1 else asked[place]
                one = slice(index, index + 1)
                self._tops[place] = TokenLogprobs(
                    found.logprobs[one],
                    found.ranks[one],
                    found.top_token_ids[one, :width],
                    found.top_logprobs[one, :width],
                )

    def candidates(self) -> dict[int, Candidates]:
        """Returns the likeliest next tokens of each beam, best first, by its place in the batch."""
        return {
            self._places[place]: Candidates(
                found.top_token_ids[0].tolist(), found.top_logprobs[0].tolist()
            )
            for place, found in self._tops.items()
            if self._sequences[place].group.beams is not None
        }

    def of_new_tokens(self) -> dict[TokenSequence, TokenLogprobs]:
        """Returns those of the tokens that sequences got by the commit, which is over.

        Those of sequences whose tokens are held back are kept with them instead.
        """
        given: dict[TokenSequence, TokenLogprobs] = {}
        counted = enumerate(zip(self._sequences, self._lengths, strict=True))
        for place, (sequence, length) in counted:
            count = len(sequence.token_ids) - length
            if not count:
                continue
            heads = self._heads[place, :count]
            if sequence.group.is_held:
                sequence.held_logprobs.append(heads)
            elif place in self._tops:
                given[sequence] = self._tops[place]
            else:
                given[sequence] = logprobs.read(heads, 0)
        return given


def held_tokens(sequence: TokenSequence) -> Held:
    """Returns what a sequence whose tokens are held back has so far.

    Tokens without the log-probabilities that its request asks for are left out: an interrupt may
    have come between the two.
    """
    token_ids, versions = sequence.output_token_ids, sequence.versions
    if sequence.sampling_params.logprobs is None:
        return Held(token_ids, versions)
    if not sequence.held_logprobs:
        return Held([], versions)
    packed = np.concatenate(sequence.held_logprobs)
    return Held(token_ids[: len(packed)], versions, logprobs.read(packed, 0))
