"""Breaks how weights are exchanged, scored with and given back, on purpose.

python -m tests.engine.mutate_weights                  # all of them, about half a minute each
python -m tests.engine.mutate_weights "a name" ...     # some, by name
"""

import sys

from tests.mutations import Mutation, run

_CORE = "pallas_paged/engine/core/engine_core.py"
_SWAPPING = "pallas_paged/engine/core/swapping.py"
_WEIGHTS = "pallas_paged/engine/weights.py"
_PLACING = "pallas_paged/engine/device/new_weights.py"
_SOURCES = "pallas_paged/models/new_weights.py"
_TEST = "tests/engine/test_weights.py"
_SLEEPING = "tests/engine/test_sleeping.py"
_SCORE = "tests/engine/test_score.py"
_MADE = "tests/models/test_new_weights.py"

MUTATIONS = {
    "cached prefixes of the old weights": Mutation(
        _SWAPPING,
        "            sequence.hits.clear()\n    memory.free_all()",
        "            sequence.hits.clear()",
        f"{_TEST}::test_new_weights_take_the_place_of_the_old_ones",
    ),
    "blocks in host memory of the old weights": Mutation(
        _SWAPPING,
        "            group.forget_swapped()\n            group.status = SequenceStatus.WAITING\n",
        "",
        f"{_TEST}::test_preempted_and_swapped_requests_go_on_too",
    ),
    "rows that the device has forgotten": Mutation(
        _CORE,
        "        self._planner.reset()\n\n    def note_new",
        "\n    def note_new",
        f"{_SLEEPING}::test_memory_is_given_back_and_comes_again",
    ),
    "a version that running requests do not hear of": Mutation(
        _CORE,
        "                sequence.versions = (*kept, (place, self.weights_version))",
        "                sequence.versions = kept or sequence.versions",
        f"{_TEST}::test_keeping_lets_requests_go_on_with_new_weights_alone",
    ),
    "a version that new requests do not hear of": Mutation(
        _CORE,
        "        self._versions = ((0, self.weights_version),)\n        for group",
        "        for group",
        f"{_TEST}::test_waiting_lets_requests_end_with_the_old_weights",
    ),
    "runs of versions that begin anew with each delta": Mutation(
        "pallas_paged/engine/text/open_request.py",
        "        completion.num_cleared += 1\n",
        "",
        f"{_TEST}::test_deltas_have_versions_too",
    ),
    "a caller's arrays that are donated": Mutation(
        _WEIGHTS,
        "now[path] if path not in self._shared and self.are_there else None",
        "now[path] if self.are_there else None",
        f"{_TEST}::test_tensors_are_joined_in_the_memory_of_those_that_they_replace",
    ),
    "memory that is not reused": Mutation(
        _PLACING,
        "[array for array in old if array is not None]",
        "[]",
        f"{_TEST}::test_tensors_are_joined_in_the_memory_of_those_that_they_replace",
    ),
    "values that are lost": Mutation(
        _PLACING,
        "recipe.dtype == jnp.float16 and source.is_cast",
        "False",
        f"{_TEST}::test_values_too_large_for_float16_are_refused_before_anything_changes",
    ),
    "an old model that stays in memory": Mutation(
        "pallas_paged/engine/device/programs.py",
        "        self.model = nnx.merge(self.graphdef, jax.eval_shape(lambda x: x, params))\n",
        "",
        f"{_SLEEPING}::test_memory_is_given_back_and_comes_again",
    ),
    "projections in the wrong order": Mutation(
        _SOURCES,
        "jnp.concatenate(pieces, axis=1)",
        "jnp.concatenate(pieces[::-1], axis=1)",
        _MADE,
    ),
    "copies of KV heads one behind the other": Mutation(
        _SOURCES,
        "spread(x, piece.shape, piece.copies)",
        "jnp.concatenate([spread(x, (piece.shape[0] // piece.copies, *piece.shape[1:]), 1)]"
        " * piece.copies)",
        _MADE,
    ),
    "a dtype that nobody looks at": Mutation(
        _SOURCES,
        "if name in expected and tensor.dtype not in DTYPES",
        "if False",
        f"{_TEST}::test_a_wrong_state_is_refused_by_name_and_the_old_one_stays",
    ),
    "scores of the tokens before": Mutation(
        "pallas_paged/engine/scoring_params.py",
        "return len(tokens) - self.num_scored, tokens",
        "return len(tokens) - self.num_scored - 1, tokens",
        _SCORE,
    ),
    "a pool that stays": Mutation(
        "pallas_paged/engine/device/runner.py",
        "        self.kv_caches, self.row_state = (), None\n        self._chunks.clear()\n",
        "",
        f"{_SLEEPING}::test_memory_is_given_back_and_comes_again",
    ),
    "weights that nobody reads again": Mutation(
        "pallas_paged/engine/sleeping.py",
        "            self._weights.reload()\n",
        "",
        f"{_SLEEPING}::test_memory_is_given_back_and_comes_again",
    ),
}


if __name__ == "__main__":
    sys.exit(run(MUTATIONS, sys.argv[1:]))
