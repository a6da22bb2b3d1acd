"""Breaks what makes several tokens of a sequence at once, steps or drafts, on purpose.

python -m tests.engine.mutate_steps            # all of them, some seconds each
python -m tests.engine.mutate_steps ends ...   # some, by name
"""

import sys

from tests.mutations import Mutation, run

_PLAN = "pallas_paged/engine/core/token_plan.py"
_SCHEDULER = "pallas_paged/engine/core/scheduler.py"
_COMMITTER = "pallas_paged/engine/core/committer.py"
_LOOP = "pallas_paged/engine/core/engine_core.py"
_GROUP = "pallas_paged/engine/core/request.py"
_STEP = "pallas_paged/engine/device/step.py"
_DEVICE_LOOP = "pallas_paged/engine/device/decode_loop.py"
_GUESSES = "pallas_paged/engine/core/speculation.py"
_PLANNER = "pallas_paged/engine/core/planner.py"
_TESTS = "tests/engine/test_scheduler_steps.py"
_DRAFTS = "tests/engine/test_speculation.py"
_DRAFTED, _MODEL = "pallas_paged/engine/device/drafted.py", "tests/engine/test_draft_model.py"
_LIVES = f"{_TESTS} tests/engine/test_scheduler_stateful.py"

_UNIT = "tests/engine/test_scheduler.py"
_PREFIXES = "pallas_paged/engine/device/prefixes.py"
_DRAW, _SAMPLING = "pallas_paged/engine/device/sampling.py", "tests/engine/test_sampling.py"
_NO_LOOKS = "tests/engine/test_without_looking.py"
_CHECK = "pallas_paged/engine/device/kernel_check.py"
_CHECKS = "tests/engine/test_kernel_check.py"
_FOUND, _FIGURES = (
    "pallas_paged/engine/core/found_logprobs.py",
    "tests/engine/test_token_logprobs.py",
)
_PROCESSED, _DRAWN_FROM = (
    "pallas_paged/engine/device/processed.py",
    "tests/engine/test_processed_logprobs.py",
)
_BUCKETS, _SIZES = "pallas_paged/engine/core/buckets.py", "tests/engine/test_buckets.py"

MUTATIONS = {
    "apart where one has drafts in flight": Mutation(
        _PLAN, "is_next = num_known == 1", "is_next = num_known != 0", _UNIT
    ),
    "each half by itself": Mutation(
        _PLAN,
        "return bool((num_known <= 1).all() and",
        "return bool(False and",
        f"{_UNIT} {_LIVES}",
    ),
    "all wait": Mutation(_PLAN, "if not columns.waits_for_host[rows].all():", "if False:", _UNIT),
    "more than is worth while": Mutation(
        _PLAN, "np.maximum(num_left - before, 0)", "np.maximum(num_left, 0)", _UNIT
    ),
    "nothing is left of a prompt": Mutation(
        _PLAN, "return planned.only(planned.counts > 0)", "return planned", _UNIT
    ),
    "forks before their prompt is computed": Mutation(
        _SCHEDULER,
        "planned = self._size.within(self._columns, planned)",
        "trimmed, planned = self._size.within(self._columns, planned), planned",
        _UNIT,
    ),
    "a step's own cost forgotten": Mutation(
        _BUCKETS, "later = self.step_cost + _at_least(", "later = _at_least(", _SIZES
    ),
    "those that decode forgotten": Mutation(
        _BUCKETS, "_LEAST_SHARE // 2 * num_fixed", "0 * num_fixed", _SIZES
    ),
    "drafts that are all right": Mutation(_GUESSES, "return place", "pass", _DRAFTS),
    "drafts beyond the longest": Mutation(
        _GUESSES,
        "num_left = columns.max_length[rows] - num_known - 1",
        "num_left = rows * 0 + 9",
        _DRAFTS,
    ),
    "drafts before a fork": Mutation(
        _GUESSES,
        "if sequence.group.is_forked:",
        "if True:",
        _LIVES,
    ),
    "wrong drafts kept": Mutation(
        _COMMITTER,
        "self._memory.truncate(list(too_long), list(too_long.values()))",
        "pass",
        f"{_DRAFTS} {_LIVES}",
    ),
    "nobody given up": Mutation(_COMMITTER, "group.waits_for_host = False", "pass", _DRAFTS),
    "drafts drawn at one position": Mutation(
        _STEP, "of_each.positions + behind", "of_each.positions", _DRAFTS
    ),
    "no room for guesses": Mutation(
        _PLAN, "ahead=np.where(guesses, most, 0)", "ahead=0 * most", _MODEL
    ),
    "room before a fork": Mutation(
        _PLAN, "guesses[b] = planned.sequences[b].group.is_forked", "pass", f"{_MODEL} {_LIVES}"
    ),
    "guesses behind the wrong token": Mutation(
        _STEP, "x.sample_positions + num_right", "x.sample_positions", _MODEL
    ),
    "guesses drawn at one position": Mutation(
        _DRAFTED, "positions=positions + 1)", "positions=last.positions + 1)", _MODEL
    ),
    "the small model misses what the other computes": Mutation(
        _DRAFTED, "if metadata.max_query_len > 1:", "if metadata.max_query_len > 10**6:", _MODEL
    ),
    "drafts placed one too far": Mutation(
        _PLANNER, "np.repeat(lasts + 1 - ends, counts)", "np.repeat(lasts - ends, counts)", _DRAFTS
    ),
    "the last token alone told": Mutation(
        "pallas_paged/engine/core/step_outputs.py",
        "sequence.token_ids[begins.get(sequence, -1) :]",
        "sequence.token_ids[-1:]",
        _DRAFTS,
    ),
    "no blocks for later steps": Mutation(
        _PLAN,
        "self.starts + self.counts + self.steps - 1 + self.ahead",
        "self.starts + self.counts",
        _LIVES,
    ),
    "a sequence beyond its longest": Mutation(
        _PLAN, "np.minimum(num_left, num_steps, dtype=np.int32)", "0 * num_left + num_steps", _TESTS
    ),
    "who waits waits for the last": Mutation(
        _PLAN, "place = 0 if keeps_all else len(num_left) // 4", "place = len(num_left) - 1", _TESTS
    ),
    "somebody preempted for steps to come": Mutation(
        _SCHEDULER, "if planned.has_more:", "if False:", _TESTS
    ),
    "nobody let in for some steps": Mutation(
        _SCHEDULER, "if may_admit or not columns", "if not columns", _TESTS
    ),
    "single tokens held back": Mutation(
        _GROUP, "return self.is_held and not", "return not", _TESTS
    ),
    "rules that do not follow": Mutation(
        _GROUP, "self.waits_for_host or self.logit_rules is not None", "self.waits_for_host", _TESTS
    ),
    "tokens behind the end computed": Mutation(
        _COMMITTER, "np.minimum(batch.ends, lengths - 1)", "np.minimum(batch.ends, lengths)", _LIVES
    ),
    "tokens before a fault lost": Mutation(
        _LOOP, "results[b] = mine[:place]", "results[b] = []", _TESTS
    ),
    "a fault behind the end": Mutation(
        _LOOP,
        "if place is None or not one.sequence.group.ending_ids.isdisjoint(mine[:place]):",
        "if place is None:",
        _TESTS,
    ),
    "every step at the first position": Mutation(
        _DEVICE_LOOP,
        "positions = x.positions + step\n",
        "positions = x.positions + 0 * step\n",
        _TESTS,
    ),
    "every step sampled alike": Mutation(
        _DEVICE_LOOP, "sampling.positions + step", "sampling.positions", _TESTS
    ),
    "context that does not grow": Mutation(
        _DEVICE_LOOP, "jnp.where(is_live, x.seq_lens + step, 0)", "x.seq_lens", _TESTS
    ),
    "the end not seen": Mutation(
        _DEVICE_LOOP, "is_live & ~wrong & ~ends(drawn)", "is_live & ~wrong", _TESTS
    ),
    "an end before the step not seen": Mutation(
        _DEVICE_LOOP, "~(on_device & ends(input_ids))", "jnp.ones_like(on_device)", _TESTS
    ),
    "a search that goes on too far": Mutation(
        _PREFIXES, "sums[:, 1:] < limit", "sums[:, 1:] <= limit", _SAMPLING
    ),
    "one of the tied too few": Mutation(
        _PREFIXES, "jnp.ceil((limit - before)", "jnp.floor((limit - before)", _SAMPLING
    ),
    "top-k forgotten in fixed passes": Mutation(
        _PREFIXES,
        "return select(limited, found, everything)",
        "return everything",
        f"{_SAMPLING} {_NO_LOOKS}",
    ),
    "weights from before top-p": Mutation(
        _DRAW, "weights = jnp.where(inside, weights, 0.0)", "pass", _SAMPLING
    ),
    "top-k left out although asked for": Mutation(
        _PLANNER, "params.top_k > 0 or params.top_p < 1", "params.top_p < 1", _NO_LOOKS
    ),
    "nothing left out": Mutation(
        _BUCKETS,
        "filters |= is_full or shares_prefix or not self.specialised",
        "filters = True",
        _NO_LOOKS,
    ),
    "decode left out where there is some": Mutation(
        _PLANNER, "(batch.num_tokens == 1).any()", "(batch.num_tokens == 0).any()", _NO_LOOKS
    ),
    "a row that is not cleared": Mutation(
        "pallas_paged/engine/device/row_state.py",
        "counts = jnp.where(is_cleared[:, None], 0, state.counts)",
        "counts = state.counts",
        _NO_LOOKS,
    ),
    "the wrong write not seen": Mutation(
        _CHECK, "_bits(a)[first:] != _bits(b)[first:]", "_bits(a)[:1] != _bits(b)[:1]", _CHECKS
    ),
    "NaN not seen": Mutation(
        _CHECK, "jnp.where(jnp.isfinite(found), found, jnp.inf)", "jnp.nan_to_num(found)", _CHECKS
    ),
    "log-probabilities behind the end": Mutation(
        _FOUND, "self._heads[place, :count]", "self._heads[place]", _FIGURES
    ),
    "log-probabilities forgotten that are kept": Mutation(
        "pallas_paged/engine/core/step_outputs.py",
        "token_ids, _, logprobs = held_tokens(sequence)",
        "token_ids = held_tokens(sequence).token_ids",
        _FIGURES,
    ),
    "log-probabilities of one step alone": Mutation(
        _DEVICE_LOOP, "state.logprobs.at[:, step]", "state.logprobs.at[:, 0 * step]", _FIGURES
    ),
    "plain where more is asked for": Mutation(
        _PLANNER,
        "params.logprobs is None or (params.logprobs == 0 and self._plain_logprobs)",
        "params.logprobs is None or self._plain_logprobs",
        _FIGURES,
    ),
    "a program without log-probabilities will do": Mutation(
        _BUCKETS, "(bucket.has_logprobs >= has_logprobs or is_full)", "True", _SIZES
    ),
    "the model's own are never given": Mutation(
        _PROCESSED, 'if mode == "processed":', "if True:", "tests/engine/test_full_step.py"
    ),
    "the temperature forgotten": Mutation(
        _PROCESSED,
        "shifted(tiles, top) / temperature[:, None, None]",
        "shifted(tiles, top)",
        _DRAWN_FROM,
    ),
    "a drawn token left out": Mutation(
        _PROCESSED,
        "kept |= precede(shifted(tiles, top), Place(value, token + 1))",
        "pass",
        _DRAWN_FROM,
    ),
    "top-p forgotten": Mutation(
        _PROCESSED, "kept &= precede(shifted(tiles, top), end) |", "kept &= kept |", _DRAWN_FROM
    ),
    "a bisection that goes on too far": Mutation(
        _PREFIXES, "is_less = sums < limit", "is_less = sums <= limit", _DRAWN_FROM
    ),
    "more steps than a sequence has": Mutation(
        _DEVICE_LOOP,
        "is_live = state.step, state.is_live & (state.step < many.num_steps)",
        "is_live = state.step, state.is_live",
        _TESTS,
    ),
}


if __name__ == "__main__":
    sys.exit(run(MUTATIONS, sys.argv[1:]))
