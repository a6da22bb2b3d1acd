"""How the sequences of a group follow its beam search: who inherits which row.

All beams of a group are equally long. Each of them brings its candidates in the step that computes
its last token; usually all in one step, but not if they share it with others, or begin again after
a preemption. The next ones are chosen when the last of them has come.
"""

from typing import NamedTuple

from pallas_paged.engine.core.beam_search import BeamSearch
from pallas_paged.engine.core.core_output import BeamFigures
from pallas_paged.engine.core.request import SequenceGroup, TokenSequence
from pallas_paged.engine.core.row_columns import RowColumns


class Inheritance(NamedTuple):
    """What becomes of the rows of a group's former beams; the heirs of all others keep them.

    Attributes:
      dead_rows: to be freed, of beams that nothing continues.
      forks: rows to be forked, after that, each with the sequence that gets the fork.
    """

    dead_rows: list[int]
    forks: list[tuple[int, TokenSequence]]


def is_ready(group: SequenceGroup) -> bool:
    """Whether all beams have their candidates."""
    return all(beam.candidates is not None for beam in group.live)


def advance(columns: RowColumns, group: SequenceGroup) -> Inheritance:
    """Replaces the beams of a group that is ready by their best continuations, or the results.

    A beam's first heir keeps its row, and each further one gets a fork of it.
    """
    assert group.beams is not None
    beams = group.live
    search, parents, tokens = group.beams.advance(
        [beam.output_token_ids for beam in beams],
        [beam.candidates for beam in beams if beam.candidates is not None],
    )
    rows = {index: beam.row for index, beam in enumerate(beams) if beam.row is not None}
    assert len(rows) == len(beams), "beams are chosen while their group runs"
    progress = {index: columns.progress(row) for index, row in rows.items()}
    for beam in beams:
        beam.give_up_blocks()
    children, forks = [], []
    unclaimed = dict(rows)
    for index, (parent, token) in enumerate(zip(parents, tokens, strict=True)):
        child = TokenSequence(group, index)
        child.token_ids = [*beams[parent].token_ids, token]
        child.versions = beams[parent].versions
        row = unclaimed.pop(parent, None)
        if row is None:
            forks.append((rows[parent], child))
        else:
            child.take_row(columns, row, progress[parent])
        children.append(child)
    sequences = _results(group, search) if search.is_done else children
    group.beams, group.sequences = search, sequences  # together, should somebody interrupt
    return Inheritance(list(unclaimed.values()), forks)


def _results(group: SequenceGroup, search: BeamSearch) -> list[TokenSequence]:
    """Returns the results of a search that is over, as finished sequences."""
    results = []
    for index, hypothesis in enumerate(search.results):
        sequence = TokenSequence(group, index)
        sequence.token_ids += hypothesis.token_ids
        ending = group.ending_of(hypothesis.token_ids[-1])
        sequence.finish_reason, sequence.stop_reason = ending
        results.append(sequence)
    return results


def figures(sequence: TokenSequence) -> BeamFigures:
    """Returns the figures of a result or, in an aborted search, a beam."""
    search = sequence.group.beams
    assert search is not None
    if search.is_done:
        result = search.results[sequence.index]
        return BeamFigures(result.cumulative_logprob, result.score)
    total = search.cumulative_logprobs[sequence.index]
    num_tokens = sequence.num_output_tokens
    return BeamFigures(total, search.score(total, num_tokens) if num_tokens else None)


def check_invariants(group: SequenceGroup) -> None:
    """Asserts that an unfinished group's sequences are the beams of its search, if it has one."""
    if group.beams is None:
        assert all(sequence.candidates is None for sequence in group.sequences)
        return
    beams = group.sequences
    assert len(beams) == len(group.beams.cumulative_logprobs) in (1, group.num_seqs)
    assert [beam.index for beam in beams] == list(range(len(beams)))
    assert len({tuple(beam.token_ids) for beam in beams}) == len(beams), "two beams are one"
    assert len({len(beam.token_ids) for beam in beams}) == 1
    assert not group.beams.is_done
    assert not is_ready(group)
    for beam in beams:
        assert not beam.is_finished
        if beam.candidates is not None:
            progress = beam.progress
            assert progress.num_computed == progress.num_dispatched == len(beam.token_ids)
