"""Breaks beam search on purpose: the rule, and what becomes of rows and blocks.

python -m tests.engine.mutate_beams            # all of them, about half a minute each
python -m tests.engine.mutate_beams eos ...    # some, by name
"""

import sys

from tests.mutations import Mutation, run

_RULE, _GROUPS, _COMMITTER, _TOKENS, _SEQUENCE, _SWAPPING = (
    f"pallas_paged/engine/{name}.py"
    for name in (
        "core/beam_search",
        "core/beam_groups",
        "core/committer",
        "core/token_plan",
        "core/request",
        "core/swapping",
    )
)
_SEARCHES = "tests/engine/test_beam_search.py"
_WAITING = "tests/engine/test_waiting_beams.py"
_BEAMS = "tests/engine/test_beams.py"
_LIVES = "tests/engine/test_scheduler_stateful.py"

MUTATIONS = {
    "penalty of one token more": Mutation(
        _RULE,
        "num_tokens**self.length_penalty",
        "(num_tokens + 1) ** self.length_penalty",
        _SEARCHES,
    ),
    "score without penalty": Mutation(
        _RULE, "self.score(total, len(token_ids))", "total", _SEARCHES
    ),
    "early_stopping=True is False": Mutation(
        _RULE, "if self.early_stopping is True:", "if False:", _SEARCHES
    ),
    "never at the present length": Mutation(
        _RULE,
        'if self.early_stopping == "never" and self.length_penalty > 0:',
        "if False:",
        _SEARCHES,
    ),
    "no token ends": Mutation(_RULE, "best[is_ending[best]]", "best[:0]", _SEARCHES),
    "a token behind the best ends": Mutation(
        _RULE, "best[is_ending[best]]", "ranked[is_ending[ranked]]", _SEARCHES
    ),
    "only ending tokens end at max_tokens": Mutation(
        _RULE, "ended = best if is_last else", "ended =", _SEARCHES
    ),
    "too few candidates": Mutation(
        _RULE, "return self.width + len(self.ending_ids)", "return self.width", _SEARCHES
    ),
    "another parent's row": Mutation(
        _GROUPS, "forks.append((rows[parent], child))", "forks.append((rows[0], child))", _BEAMS
    ),
    "dead beams keep their rows": Mutation(
        _COMMITTER, "freed_rows = freed_rows + dead_rows", "pass", _LIVES
    ),
    "every heir gets a fork": Mutation(
        _GROUPS, "row = unclaimed.pop(parent, None)", "row = None", _LIVES
    ),
    "not waiting for all beams": Mutation(
        _GROUPS,
        "return all(beam.candidates is not None for beam in group.live)",
        "return any(beam.candidates is not None for beam in group.live)",
        _LIVES,
    ),
    "dispatched before the result": Mutation(
        _TOKENS,
        "else planned.only(counts > 0)",
        "else planned.only(counts >= 0)",
        _LIVES,
    ),
    "candidates of an earlier life": Mutation(
        _COMMITTER, "here & batch.samples", "batch.samples.copy()", _LIVES
    ),
    "candidates survive preemption": Mutation(
        _SEQUENCE,
        "self.row = self.leader = self.candidates = None",
        "self.row = self.leader = None",
        _WAITING,
    ),
    "the last token is swapped out": Mutation(
        _SWAPPING,
        "min(s.progress.num_computed, len(s.token_ids) - 1)",
        "s.progress.num_computed",
        _WAITING,
    ),
    "rows for the first beam only": Mutation(
        _SEQUENCE,
        "return len(self.live) if self.beams is None else self.num_seqs",
        "return len(self.live)",
        _LIVES,
    ),
}

if __name__ == "__main__":
    sys.exit(run(MUTATIONS, sys.argv[1:]))
