"""Breaks beam search on purpose: the rule, and what becomes of rows and blocks.

python -m tests.engine.mutate_beams            # all of them, about half a minute each
python -m tests.engine.mutate_beams eos ...    # some, by name
"""

import sys

from tests.mutations import Mutation, run

_RULE, _GROUPS, _SCHEDULER, _SEQUENCE, _SWAP = (
    f"pallas_paged/engine/{name}.py"
    for name in ("beam_search", "beam_groups", "scheduler", "sequence", "swap")
)
_SEARCHES = "tests/engine/test_beam_search.py"
_TRACES = "tests/engine/test_beam_traces.py"

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
        _GROUPS, "forks.append((rows[parent], child))", "forks.append((rows[0], child))", _TRACES
    ),
    "dead beams keep their rows": Mutation(
        _SCHEDULER, "freed_rows = freed_rows + dead_rows", "pass", _TRACES
    ),
    "every heir gets a fork": Mutation(
        _GROUPS, "child.row = unclaimed.pop(parent, None)", "child.row = None", _TRACES
    ),
    "not waiting for all beams": Mutation(
        _GROUPS,
        "return all(beam.candidates is not None for beam in group.live)",
        "return any(beam.candidates is not None for beam in group.live)",
        _TRACES,
    ),
    "dispatched before the result": Mutation(
        _SCHEDULER,
        "            if sequence.num_dispatched == sequence.num_tokens:\n",
        "            if False:\n",
        _TRACES,
    ),
    "candidates of an earlier life": Mutation(
        _SCHEDULER,
        "if sequence.row is not None:\n                    sequence.c",
        "if True:\n                    sequence.c",
        _TRACES,
    ),
    "candidates survive preemption": Mutation(
        _SEQUENCE,
        "self.row = self.leader = self.candidates = None",
        "self.row = self.leader = None",
        _TRACES,
    ),
    "the last token is swapped out": Mutation(
        _SWAP, "min(s.num_computed, len(s.token_ids) - 1)", "s.num_computed", _TRACES
    ),
    "rows for the first beam only": Mutation(
        _SEQUENCE,
        "return len(self.live) if self.beams is None else self.num_seqs",
        "return len(self.live)",
        _TRACES,
    ),
}

if __name__ == "__main__":
    sys.exit(run(MUTATIONS, sys.argv[1:]))
