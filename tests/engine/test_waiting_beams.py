"""Beams that have their candidates and wait for the others' when their group loses its blocks."""

import pytest

from pallas_paged.engine.core.beam_search import BeamSearch
from pallas_paged.engine.core.policies import Recovery
from pallas_paged.engine.core.request import SequenceGroup
from tests.engine.mock_model import make_engine, search_alone


@pytest.mark.parametrize("recovery", ["swap", "recompute"])
def test_waiting_beams_compute_their_last_token_again(recovery: Recovery) -> None:
    engine = make_engine(
        num_host_blocks=40, max_num_batched_tokens=2, choose_recovery=lambda _: recovery
    )
    beams = BeamSearch(width=3, max_tokens=9, num_results=3)
    group = SequenceGroup("beams", (1, 2, 3, 4, 5), 9, num_seqs=3, beams=beams)
    engine.scheduler.add(group)
    num_outputs = 0
    while num_outputs < 3:  # a step computes two of the three
        engine.step(overlap=False)
        if {beam.candidates is None for beam in group.live} == {False, True}:
            num_outputs = group.live[0].num_output_tokens
    engine.scheduler._preempt(group)
    assert (group.swapped is not None) == (recovery == "swap")
    assert all(beam.candidates is None for beam in group.live)
    assert all(beam.num_swapped < len(beam.token_ids) for beam in group.live)
    engine.scheduler.check_invariants()
    engine.run(overlap=False)
    found = [tuple(beam.output_token_ids) for beam in group.sequences]
    assert found == [ended.tokens for ended in search_alone(group)]
    engine.scheduler.check_invariants()
