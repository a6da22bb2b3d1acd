"""Breaks the attention kernels for sm_100a on purpose, one way at a time; see `tests.mutations`.

python -m tests.kernels.mutate_blackwell            # all of them, about a quarter of a minute each
python -m tests.kernels.mutate_blackwell zeros ...  # some, by name
"""

import sys

from tests.mutations import Mutation, run

_FOLDER = "pallas_paged/ops/attention/blackwell"
_KERNEL = f"{_FOLDER}/kernel.py"
_MERGE = f"{_FOLDER}/merge.py"
_PARTS = f"{_FOLDER}/parts.py"
_ATTEND = f"{_FOLDER}/attend.py"
_TESTS = "tests/kernels/test_mosaic_blackwell.py"


def _mutation(old: str, new: str, test: str, file: str = _KERNEL) -> Mutation:
    return Mutation(file, old, new, f"{_TESTS}::test_equals_the_reference[{test}]")


def _unfenced(old: str) -> Mutation:
    new = old.replace("plgpu.commit_smem()", "pass")
    return Mutation(_KERNEL, old, new, "tests/kernels/test_fences.py::test_whole_steps")


MUTATIONS = {
    "a length one too long": _mutation(
        "jnp.minimum(query_position, item.length - 1)",
        "jnp.minimum(query_position + 1, item.length)",
        "decode",
    ),
    "values for keys": _mutation("(inputs.k_cache, smem.k,", "(inputs.v_cache, smem.k,", "decode"),
    "keys for values": _mutation("(inputs.v_cache, smem.v,", "(inputs.k_cache, smem.v,", "decode"),
    "another head's keys": _mutation(
        "place = block(i), item.head, ",
        "place = block(i), jnp.maximum(item.head - 1, 0), ",
        "decode",
    ),
    "no wait for the keys": _mutation("plgpu.barrier_wait(barriers.k.at[slot])", "pass", "decode"),
    "no wait for the values": _mutation(
        "plgpu.barrier_wait(barriers.v.at[slot])", "pass", "decode"
    ),
    "no wait for the queries": _mutation("plgpu.barrier_wait(barriers.q)", "pass", "decode"),
    "no wait for the logits": _mutation("plgpu.barrier_wait(barriers.logits)", "pass", "decode"),
    "no wait for the product before": _mutation(
        "pl.when(tile > begin)(lambda: plgpu.barrier_wait(barriers.sums))", "pass", "split"
    ),
    "a slot loaded too early": _mutation(
        "lambda: start_copies(step - 1 + stages, *place)",
        "lambda: start_copies(step + stages, *place)",
        "decode",
    ),
    "logits added to the tile's before": _mutation(
        "barriers.logits, accumulate=False", "barriers.logits, accumulate=tile > begin", "split"
    ),
    "sums of the last tile alone": _mutation(
        "barriers.sums, accumulate=tile > begin", "barriers.sums, accumulate=False", "split"
    ),
    "sums of the item before": _mutation(
        "barriers.sums, accumulate=tile > begin", "barriers.sums, accumulate=True", "decode"
    ),
    "no correction": _mutation("sums * across(correction, sums.shape)", "sums * 1.0", "split"),
    "the denominator not corrected": _mutation(
        "denominator * correction + total", "denominator + total", "split"
    ),
    "weights left where they are": _mutation("            plgpu.commit_tmem()\n", "", "decode"),
    "NaN of a tail in the values": _mutation(
        "(position + tile_size > item.length)", "(position > item.length)", "decode"
    ),
    "NaN left of the window in the values": _mutation("| (position < first_key)", "", "tokens"),
    "scales of keys for values": _mutation(
        "tile_scales(all_v_scales,", "tile_scales(all_k_scales,", "fp8"
    ),
    "scales of another block": _mutation("block(p.start // rows_of_copy)", "block(0)", "shared"),
    "scales of other tokens": _mutation("begin + p.start % rows_of_copy", "begin", "wide"),
    "keys converted for values": _mutation(
        "convert_tile(problem, values, smem.v_numbers)",
        "convert_tile(problem, smem.k.at[slot], smem.v_numbers)",
        "int8",
    ),
    "the sink in every part": _mutation(
        "finished_rows(maximum, denominator, None)",
        "finished_rows(maximum, denominator, sink)",
        "split",
    ),
    "no sink in the merge": _mutation(
        "sink = None if sinks is None else", "sink = None if True else", "split", _MERGE
    ),
    "half of a part twice": _mutation(
        "rows.at[:, pl.ds(first, half)]", "rows.at[:, pl.ds(0, half)]", "split"
    ),
    "a part over another": _mutation(
        "jnp.where(begin == 0, num_ctas, 0)", "jnp.where(begin == 0, 0, 0)", "split"
    ),
    "a part left out of the merge": _mutation(
        "fori_loop(cta, last_part + 1, add_values",
        "fori_loop(cta, last_part, add_values",
        "split",
        _MERGE,
    ),
    "equal weights in the merge": _mutation(
        "across(jnp.exp2(part_lse - maximum), values.shape)",
        "across(jnp.exp2(part_lse - part_lse), values.shape)",
        "split",
        _MERGE,
    ),
    "another part's rows": _mutation(
        "pl.ds(place * problem.rows, LANES)", "pl.ds(part * problem.rows, LANES)", "split", _MERGE
    ),
    "results not written out before the next": _mutation(
        "    plgpu.wait_smem_to_gmem(0)\n", "", "decode", _PARTS
    ),
    "results of the rows before": _mutation("    plgpu.commit_smem()\n", "", "decode", _PARTS),
    "tokens of a run in another order": _mutation(
        "jnp.arange(LANES, dtype=jnp.int32) // problem.group",
        "jnp.arange(LANES, dtype=jnp.int32) % problem.group",
        "mixed",
        _ATTEND,
    ),
    "converted keys not fenced": _unfenced("smem.k_numbers)\n                plgpu.commit_smem()"),
    "converted values not fenced": _unfenced(
        "smem.v_numbers)\n                plgpu.commit_smem()"
    ),
    "zeroed values not fenced": _unfenced(
        "_zero_values(problem, values, *valid)\n                    plgpu.commit_smem()"
    ),
}

if __name__ == "__main__":
    sys.exit(run(MUTATIONS, sys.argv[1:]))
