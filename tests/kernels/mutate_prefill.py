"""Breaks the sm_90a prefill kernel on purpose, one way at a time; see `tests.mutations`.

python -m tests.kernels.mutate_prefill            # all of them, about a quarter of a minute each
python -m tests.kernels.mutate_prefill zeros ...  # some, by name
"""

import sys

from tests.mutations import Mutation, run

_PLAN = "pallas_paged/ops/attention/hopper/prefill_plan.py"
_PARTS = "pallas_paged/ops/attention/hopper/prefill_parts.py"
_WRAPPER = "pallas_paged/ops/attention/hopper/prefill.py"
_KERNEL = "pallas_paged/ops/attention/hopper/prefill_kernel.py"
_ROWS = "pallas_paged/ops/attention/hopper/prefill_softmax.py"
_MASK = "pallas_paged/ops/attention/hopper/prefill_mask.py"
_WALK = "pallas_paged/ops/attention/hopper/prefill_walk.py"
_WRITE = "pallas_paged/ops/attention/hopper/prefill_write.py"
_LOAD = "pallas_paged/ops/attention/hopper/prefill_load.py"
_SOFTMAX = "pallas_paged/ops/attention/online_softmax.py"
_PACKING = "pallas_paged/ops/attention/packing.py"
_TESTS = "tests/kernels/test_mosaic_prefill.py"
_WALKS = "tests/kernels/test_prefill_walk.py"
_SEVERAL = f"{_TESTS}::test_a_thread_block_has_several_tiles"
_FENCES = "tests/kernels/test_fences.py::test_prefill"
_OTHERS = f"{_TESTS}::test_rows_of_others_stay"
_LATE = f"{_TESTS}::test_a_sink_of_minus_infinity_is_none"


def _mutation(file: str, old: str, new: str, test: str) -> Mutation:
    """`test` is a test or a case of the one that compares with the reference."""
    return Mutation(
        file, old, new, test if "::" in test else f"{_TESTS}::test_equals_reference[{test}]"
    )


MUTATIONS = {
    "a position one too late": _mutation(
        _PLAN, "query_lens[row] + offset\n", "query_lens[row] + offset + 1\n", "group5"
    ),
    "a window one too narrow": _mutation(
        _PLAN, "position - sliding_window + 1", "position - sliding_window + 2", _LATE
    ),
    "a token left out": _mutation(
        _PLAN, "query_lens[row] - offset, size", "query_lens[row] - offset - 1, size", "group5"
    ),
    "tiles that overlap": _mutation(
        _PLAN, "(tile - before[row]) * size", "(tile - before[row]) * (size - 1)", "group16"
    ),
    "another sequence's blocks": _mutation(
        _PLAN, "tokens, position, sequence,", "tokens, position, sequence * 0,", "group5"
    ),
    "sequences of others too": _mutation(
        _PLAN, "query_lens >= min_query_len)", "query_lens >= 1)", _OTHERS
    ),
    "another token's lse": _mutation(
        _PLAN, "token_tiles, in_row % size", "token_tiles, (in_row + 1) % size", "group5"
    ),
    "a step at the end without a mask": _mutation(
        _WALK, "(first_position + 1) // size", "(first_position + size) // size", "group5"
    ),
    "a step at a window's begin without a mask": _mutation(
        _WALK,
        "pl.cdiv(jnp.maximum(key_end - problem.sliding_window, 0), size)",
        "jnp.maximum(key_end - problem.sliding_window, 0) // size",
        "wide",
    ),
    "a wrong scale": _mutation(_SOFTMAX, "return scale * LOG2E if", "return scale if", _LATE),
    "a slot free after one warpgroup": _mutation(
        _PARTS,
        "consumed = plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS",
        "consumed = plgpu.Barrier(num_arrivals=1",
        "chunked",
    ),
    "values for keys": _mutation(
        _LOAD, "enumerate((inputs.cache.k,", "enumerate((inputs.cache.v,", "group5"
    ),
    "keys for values": _mutation(_LOAD, "inputs.cache.v))", "inputs.cache.k))", "group5"),
    "another head's keys": _mutation(
        _LOAD, "cache.at[page, tile.kv_head,", "cache.at[page, 0,", _OTHERS
    ),
    "another head's queries": _mutation(
        _LOAD,
        "inputs.q.at[:, tile.kv_head * problem.group + head,",
        "inputs.q.at[:, head,",
        _OTHERS,
    ),
    "the block before the last": _mutation(
        _LOAD, "pieces_per_block, last_block)", "pieces_per_block, last_block - 1)", "group5"
    ),
    "the first half of a block twice": _mutation(
        _LOAD, "lax.rem(piece, pieces_per_block) * rows", "0 * rows", "group7"
    ),
    "loads over what is read": _mutation(
        _LOAD,
        "_wait_until_consumed(problem, turn, barriers.tiles)\n                copies",
        "copies",
        "chunked",
    ),
    "queries over queries that are read": _mutation(
        _LOAD,
        "wait() if part > 0 else pl.when(tile.number > 0)(wait)",
        "pl.when((tile.number > 0) & (part == 0))(wait)",
        "group2",
    ),
    "no wait for the queries": _mutation(
        _KERNEL, "plgpu.barrier_wait(barriers.q)", "pass", "group5"
    ),
    "no wait for the keys": _mutation(
        _KERNEL,
        "plgpu.barrier_wait(rows.barriers.tiles.filled.at[k_slot])\n\n    def",
        "pass\n\n    def",
        "chunked",
    ),
    "no wait for the keys ahead": _mutation(
        _KERNEL,
        "plgpu.barrier_wait(rows.barriers.tiles.filled.at[k_slot])\n    rows.take_turn()",
        "rows.take_turn()",
        "chunked",
    ),
    "no wait for the values": _mutation(
        _KERNEL, "plgpu.barrier_wait(rows.barriers.tiles.filled.at[v_slot])", "pass", "chunked"
    ),
    "values of another slot": _mutation(
        _KERNEL,
        "values = rows.smem.tiles.numbers.at[v_slot]\n    rows.take",
        "values = rows.smem.tiles.numbers.at[v_slot - 1]\n    rows.take",
        "group5",
    ),
    "ahead: values of the same step": _mutation(
        _KERNEL, "for slot in (k_slot, v_slot)", "for slot in (k_slot, k_slot + 1)", "chunked"
    ),
    "ahead: the values of the last step left out": _mutation(
        _KERNEL, "state = _add(rows, tile.end - 1, carried)", "state = carried.state", "group5"
    ),
    "ahead: the first step without a mask": _mutation(
        _KERNEL,
        "_weigh(rows, False, tile.begin, state)",
        "_weigh(rows, True, tile.begin, state)",
        "group5",
    ),
    "turns: none is taken for the values": _mutation(
        _KERNEL,
        "rows.take_turn()\n    if rows.problem.tuning.in",
        "if rows.problem.tuning.in",
        "wide",
    ),
    "quantised: each of two converters asks for keys and values": _mutation(
        _LOAD,
        "return request(i * problem.loaders + loader, place)",
        "return request(i, place)",
        "int8-cap",
    ),
    "a factor below 0 left to the exponent": _mutation(
        _PARTS, "is None and self.logits_factor > 0", "is None", f"{_TESTS}::test_scales"
    ),
    "the largest logit without its factor": _mutation(
        _ROWS, "largest * factor", "largest", f"{_TESTS}::test_scales"
    ),
    "NaN of a tail in the values": _mutation(
        _MASK, " | (begin + size > tile.key_end)", "", "group5"
    ),
    "NaN left of the window in the values": _mutation(
        _MASK, "(begin < tile.key_begin) | ", "", _LATE
    ),
    "a query position one too far": _mutation(
        _ROWS, "visible = distances <= 0", "visible = distances <= 1", "group5"
    ),
    "a window one too wide": _mutation(
        _ROWS,
        "distances > -problem.sliding_window",
        "distances >= -problem.sliding_window",
        _LATE,
    ),
    "a wrong cap": _mutation(
        _SOFTMAX, "(2 * cap * LOG2E) * (root", "(cap * LOG2E) * (root", "group5"
    ),
    "slopes of the wrong sign": _mutation(
        _ROWS, "logits + across(slope", "logits - across(slope", "int8"
    ),
    "slopes of other rows": _mutation(
        _PACKING,
        "jnp.repeat(per_head, num_tokens)",
        "jnp.tile(per_head, num_tokens)",
        "int8",
    ),
    "no sinks": _mutation(_KERNEL, "if inputs.sinks is not None:", "if False:", "group5"),
    "sinks of padding": _mutation(
        _KERNEL, "jnp.where(tile.key_end > 0, 1.0, 0.0)", "1.0", "group5"
    ),
    "a sink of minus infinity": _mutation(
        _KERNEL, " * LOG2E, LOWEST)", " * LOG2E, -jnp.inf)", _LATE
    ),
    "no correction": _mutation(
        _KERNEL,
        "numerator * across(correction, numerator.shape)",
        "numerator + 0 * across(correction, numerator.shape)",
        "wide",
    ),
    "zeros": _mutation(
        _WRITE, "* across(factor, part.shape)", "* across(factor * 0, part.shape)", "group5"
    ),
    "lse in base 2": _mutation(_WRITE, "state.maximum * LN2", "state.maximum", "group5"),
    "a half that is not there yet": _mutation(
        _WRITE, "meet(barriers.pair)  # a head's", "pass  # a head's", "group5"
    ),
    "rows of others overwritten": _mutation(
        _WRITE, "pl.when((tile.num_tokens & size) != 0)", "pl.when(tile.num_tokens > 0)", _OTHERS
    ),
    "rows of others lost": _mutation(
        _WRAPPER, "jax.new_ref(others[0] if others else", "jax.new_ref(", _OTHERS
    ),
    "lse of others lost": _mutation(
        _WRAPPER, "-jnp.inf if into is None else into[1]", "-jnp.inf", _OTHERS
    ),
    "quantised: the keys' scales for the values": _mutation(
        _LOAD, "(cache.v, cache.v_scale)", "(cache.v, cache.k_scale)", "int8"
    ),
    "quantised: no wait for bytes and scales": _mutation(
        _LOAD,
        "plgpu.barrier_wait(barriers.tiles.arrived.at[lax.rem(turn, slots)])",
        "pass",
        "int8",
    ),
    "quantised: converted over what is read": _mutation(
        _LOAD,
        "_wait_until_consumed(problem, turn, barriers.tiles)\n            _convert",
        "_convert",
        "int8",
    ),
    "quantised: bytes of another step": _mutation(
        _LOAD, "tile.begin + place.turn // 2,", "tile.begin + place.turn // 2 - 1,", "int8-cap"
    ),
    "quantised: NaN of a tail": _mutation(
        _LOAD, "jnp.where(is_key, size, tile.key_end - first_key)", "size", "int8"
    ),
    "quantised: NaN left of the window": _mutation(
        _LOAD, "jnp.where(is_key, 0, tile.key_begin - first_key)", "0", "fp8"
    ),
    "quantised: keys scaled twice": _mutation(
        _LOAD, "(rows[0], jnp.where(is_key, 0, rows[1]))", "rows", "int8"
    ),
    "quantised: keys without their scales": _mutation(
        _KERNEL,
        "logits = _times_columns(logits, rows.smem.tiles.scales.at[k_slot])",
        "logits = logits * problem.logits_factor",
        "int8",
    ),
    "quantised: weights without the values' scales": _mutation(
        _KERNEL,
        "weights = _times_columns(weights, rows.smem.tiles.scales.at[v_slot])",
        "pass",
        "int8-cap",
    ),
    "quantised: no scale of the logits": _mutation(
        _LOAD, "jnp.where(is_key, problem.logits_factor, 1.0)", "1.0", "int8"
    ),
    "walk: the ring begins anew with each tile": _mutation(
        _WALK, "steps_before - begin,", "steps_before * 0 - begin,", f"{_SEVERAL}[three-stages]"
    ),
    "walk: the last tile of a thread block left out": _mutation(
        _WALK,
        "return rounds + (",
        "return rounds + 0 * (",
        f"{_WALKS}::test_each_pair_is_taken_once_in_order",
    ),
    "walk: every round in the same order": _mutation(
        _WALK,
        "lax.rem(round_, 2) == 0",
        "lax.rem(round_, 2) < 2",
        f"{_WALKS}::test_long_and_short_work_goes_to_the_same_thread_blocks",
    ),
    "walk: records that are of no tile too": _mutation(
        _WALK, "inputs.num_tiles[0]", "inputs.tiles.shape[0]", f"{_SEVERAL}[numbers]"
    ),
    "walk: queries over those of the tile before": _mutation(
        _LOAD,
        "wait() if part > 0 else pl.when(tile.number > 0)(wait)",
        "wait() if part > 0 else None",
        f"{_SEVERAL}[numbers]",
    ),
    "large arrays: log-sum-exps written by threads": Mutation(
        _WRITE,
        "plgpu.copy_smem_to_gmem(smem.lse, lse.at[tile.index, tile.kv_head])",
        "lse[tile.index, tile.kv_head] = smem.lse[...]",
        "tests/kernels/test_deviceless_prefill.py::test_arrays_of_more_than_2_to_the_31_numbers",
    ),
    "fences: queries not committed": Mutation(
        _KERNEL,
        "layout=TILE_LAYOUT)\n        plgpu.commit_smem()",
        "layout=TILE_LAYOUT)",
        f"{_FENCES}[pieces]",
    ),
    "fences: masked values not committed": Mutation(
        _MASK, "plgpu.commit_smem()\n        meet(pair)", "meet(pair)", f"{_FENCES}[pieces]"
    ),
    "fences: weights not committed": Mutation(
        _KERNEL,
        "[...] = weights\n    plgpu.commit_smem()",
        "[...] = weights",
        f"{_FENCES}[weights]",
    ),
    "fences: staged results not committed": Mutation(
        _WRITE,
        "part.astype(problem.dtype)\n        plgpu.commit_smem()",
        "part.astype(problem.dtype)",
        f"{_FENCES}[pieces]",
    ),
    "fences: results staged over others that are sent": Mutation(
        _WRITE, "plgpu.wait_smem_to_gmem(0, wait_read_only=True)", "pass", f"{_FENCES}[pieces]"
    ),
    "fences: results that may not have arrived at the end": Mutation(
        _KERNEL, "plgpu.wait_smem_to_gmem(0)", "pass", f"{_FENCES}[pieces]"
    ),
    "fences: converted numbers not committed": Mutation(
        _LOAD, "plgpu.commit_smem()", "pass", f"{_FENCES}[quantised]"
    ),
}

if __name__ == "__main__":
    sys.exit(run(MUTATIONS, sys.argv[1:]))
