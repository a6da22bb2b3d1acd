"""Breaks what keeps outputs to a grammar, on purpose.

python -m tests.engine.mutate_grammars            # all of them, half a minute each
python -m tests.engine.mutate_grammars eos ...    # some, by name
"""

import sys

from tests.mutations import Mutation, run

_MATCHING = "pallas_paged/engine/core/matching.py"
_COMMITTER = "pallas_paged/engine/core/committer.py"
_PLANNER = "pallas_paged/engine/core/planner.py"
_GROUP = "pallas_paged/engine/core/request.py"
_STATE = "pallas_paged/engine/device/row_state.py"
_PLAN = "pallas_paged/engine/core/plan.py"
_GRAMMARS = "pallas_paged/engine/text/grammars.py"
_FILE = "tests/engine/test_structured_outputs.py"
_COMPANY = f"{_FILE}::test_in_any_company_everybody_gets_what_they_get_alone"
_GUESSES = f"{_FILE}::test_tokens_are_guessed_of_others_alone"
_ENDS = f"{_FILE}::test_it_ends_with_the_token_behind_which_nothing_may_follow"
_LATE = f"{_FILE}::test_the_token_that_ends_it_may_come_after_a_preemption"
_DEVICE = f"{_FILE}::test_masks_on_the_device"
_EDITS = f"{_FILE}::test_masks_fit_into_edits_of_one_size"
_BYTES = f"{_FILE}::test_masks_travel_as_bytes"

MUTATIONS = {
    "no mask": Mutation(
        _PLANNER,
        "x.uses_mask[b] = rules.grammar is not None",
        "pass",
        f"{_FILE}::test_outputs_are_what_was_asked_for",
    ),
    "the host not waited for": Mutation(
        _GROUP, "self.waits_for_host |= self.uses_mask or", "self.waits_for_host |=", _COMPANY
    ),
    "guessed under a grammar": Mutation(
        _GROUP,
        "return self.waits_for_host and self.beams is None and self.logit_rules is None",
        "return self.waits_for_host and self.beams is None",
        _GUESSES,
    ),
    "let go by too few right guesses": Mutation(
        _COMMITTER,
        "gets & (columns.speculates[batch.rows]",
        "gets & (columns.waits_for_host[batch.rows]",
        _GUESSES,
    ),
    "an end not seen": Mutation(_COMMITTER, "ended += [b for b in", "[b for b in", _ENDS),
    "an end of a preempted sequence not seen": Mutation(
        _COMMITTER, "is_long or matching.is_over(sequence)", "is_long", _LATE
    ),
    "the last token taken for an end token": Mutation(
        "pallas_paged/engine/core/step_outputs.py",
        'is_whole=sequence.finish_reason == "stop"',
        "is_whole=False",
        _ENDS,
    ),
    "whole outputs aborted": Mutation(
        _MATCHING,
        "matcher.fault is not None or matcher.may_end",
        "matcher.fault is not None",
        f"{_FILE}::test_without_an_eos_token_it_ends_when_it_is_whole",
    ),
    "a refused token taken": Mutation(
        _MATCHING,
        "return matcher.is_over or matcher.fault is not None",
        "return matcher.is_over",
        f"{_FILE}::test_a_token_that_the_grammar_refuses_ends_that_request_alone",
    ),
    "masks of a fault kept": Mutation(
        _GRAMMARS,
        "found[k] = 0",
        "pass",
        f"{_FILE}::test_a_fault_that_a_mask_brings_leaves_no_token",
    ),
    "EOS where it is text": Mutation(
        _GRAMMARS,
        "word &= ~(np.uint32(1) << place)",
        "pass",
        f"{_FILE}::test_an_eos_token_that_is_text_ends_nothing_before_the_end",
    ),
    "one EOS token": Mutation(
        _GRAMMARS,
        "word |= may_end << place",
        "word |= may_end << np.uint32(1)",
        f"{_FILE}::test_each_eos_token_ends_it_exactly_where_it_may_end",
    ),
    "an EOS token that comes too early": Mutation(
        _GRAMMARS,
        "if not self.is_over:\n",
        "if False:\n",
        f"{_FILE}::test_an_eos_token_that_came_too_early_is_a_fault",
    ),
    "matchers shared": Mutation(
        _GRAMMARS, "TokenMatcher(self._state.deep_copy(),", "TokenMatcher(self._state,", _COMPANY
    ),
    "a usual stack": Mutation(
        _GRAMMARS,
        "_STACK_BYTES = 2**28",
        "_STACK_BYTES = 2**20",
        f"{_FILE}::test_a_long_chain_of_rules_does_not_overflow_the_stack",
    ),
    "masks of one edit": Mutation(
        _MATCHING, "masks[first : first + NUM_MASKS]", "masks[: len(part)]", _EDITS
    ),
    "padding written to a row": Mutation(_MATCHING, "edit[:, 0] = num_rows", "pass", _EDITS),
    "bits in another order": Mutation(_STATE, "jnp.arange(32,", "31 - jnp.arange(32,", _DEVICE),
    "masks of the wrong rows": Mutation(
        _STATE,
        "state.masks[inputs.rows][:, :, None]",
        "state.masks[: len(logits)][:, :, None]",
        _DEVICE,
    ),
    "a mask on everybody": Mutation(_STATE, "is_left | ~uses_mask[:, None]", "is_left", _DEVICE),
    "masks not sent": Mutation(
        _PLAN,
        "*(edit.reshape(-1) for edit in self.mask_edits),",
        "*(0 * edit.reshape(-1) for edit in self.mask_edits),",
        _BYTES,
    ),
}


if __name__ == "__main__":
    sys.exit(run(MUTATIONS, sys.argv[1:]))
