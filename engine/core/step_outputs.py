"""What requests get by a step, made of what the device found and the scheduler committed."""

import time
from collections.abc import Iterable, Mapping, Sequence

from pallas_paged.engine.core import beam_groups, logprobs
from pallas_paged.engine.core.core_output import CoreOutput, TokenLogprobs
from pallas_paged.engine.core.found_logprobs import held_tokens
from pallas_paged.engine.core.plan import StepResult
from pallas_paged.engine.core.planner import Planned
from pallas_paged.engine.core.request import SequenceGroup, TokenSequence


def step_outputs(
    aborted: Iterable[TokenSequence],
    advanced: Iterable[TokenSequence],
    begins: Mapping[TokenSequence, int],
    logprobs: dict[TokenSequence, TokenLogprobs],
    prompts: dict[SequenceGroup, TokenLogprobs],
) -> list[CoreOutput]:
    """Returns what sequences without and with new tokens give; beams only when all is over.

    `begins` tells of those that may have got several how many tokens they had before.
    """
    outputs = [
        output_of(sequence, sequence.token_ids[begins[sequence] :] if sequence in begins else ())
        for sequence in aborted
        if sequence.group.beams is None
    ]
    searches = {sequence.group: None for sequence in aborted if sequence.group.beams is not None}
    now = time.monotonic()
    for sequence in advanced:
        group, found = sequence.group, logprobs.get(sequence)
        if group.stats.first_token_time_s is None:
            group.stats = group.stats._replace(first_token_time_s=now)
        if group.beams is not None:
            searches[group] = None
            continue
        if found is None and sequence.columns is not None:
            sequence.columns.has_told[sequence.row] = True
        if sequence.finish_reason is not None or not group.is_held:
            tokens = sequence.token_ids[begins.get(sequence, -1) :]
            outputs.append(output_of(sequence, tokens, found))
    for group in searches:
        if group.is_finished:
            outputs += beam_outputs(group)
    mark_last(outputs)
    for group, of_prompt in prompts.items():
        _attach(outputs, group, of_prompt)
    return outputs


def output_of(
    sequence: TokenSequence,
    token_ids: Sequence[int] = (),
    logprobs: TokenLogprobs | None = None,
) -> CoreOutput:
    """Returns what a sequence gives with these new tokens, or with all that were held back."""
    if sequence.group.is_held:
        token_ids, _, logprobs = held_tokens(sequence)
    return CoreOutput(
        sequence.request_id,
        sequence.index,
        token_ids,
        sequence.finish_reason,
        sequence.stop_reason,
        sequence.group.is_finished,
        sequence.group.stats,
        logprobs,
        is_whole=sequence.finish_reason == "stop"
        and sequence.token_ids[-1] not in sequence.group.ending_ids,
        versions=sequence.versions,
    )


def beam_outputs(group: SequenceGroup) -> list[CoreOutput]:
    """Returns the results of a search that is over, or its best beams if it was aborted."""
    assert group.beams is not None
    results = group.sequences[: group.beams.num_results]
    return [
        CoreOutput(
            group.request_id,
            index,
            beam.output_token_ids,
            beam.finish_reason,
            beam.stop_reason,
            beam is results[-1],
            group.stats,
            beam=beam_groups.figures(beam),
            versions=beam.versions,
        )
        for index, beam in enumerate(results)
    ]


def mark_last(outputs: list[CoreOutput]) -> None:
    """Leaves `is_last` with the last output of each request that has ended."""
    last: dict[str, CoreOutput] = {}
    for output in outputs:
        if output.is_last:
            before = last.get(output.request_id)
            if before is not None:
                before.is_last = False
            last[output.request_id] = output


def _attach(outputs: list[CoreOutput], group: SequenceGroup, found: TokenLogprobs) -> None:
    """Adds log-probabilities of a prompt to the first output of its request."""
    mine = next((output for output in outputs if output.request_id == group.request_id), None)
    if mine is None:
        if group.is_finished:
            return
        mine = output_of(group.sequences[0])
        outputs.append(mine)
    mine.prompt_logprobs = found


def prompt_logprobs_of(planned: Planned, result: StepResult) -> dict[SequenceGroup, TokenLogprobs]:
    """Returns the log-probabilities of the next tokens of prompts."""
    found, end = {}, 0
    for group, count in planned.prompts:
        assert result.prompt_logprobs is not None
        begin, end = end, end + count
        num_top = group.sampling_params.prompt_logprobs
        found[group] = logprobs.read(result.prompt_logprobs[begin:end], num_top)
    return found
