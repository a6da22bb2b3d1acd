"""Breaks the sm_80 attention kernels on purpose, one way at a time; see `tests.mutations`.

python -m tests.kernels.mutate_ampere            # all of them, about half a minute each
python -m tests.kernels.mutate_ampere zeros ...  # some, by name
"""

import sys

from tests.mutations import Mutation, run

_KERNEL = "pallas_paged/ops/attention/mosaic_gpu_ampere_kernel.py"
_WRAPPER = "pallas_paged/ops/attention/mosaic_gpu_ampere.py"
_WORK_LIST = "pallas_paged/ops/attention/work_list.py"
_TESTS = "tests/kernels/test_mosaic_ampere.py"


def _mutation(old: str, new: str, test: str, file: str = _KERNEL) -> Mutation:
    return Mutation(file, old, new, f"{_TESTS}::test_equals_the_reference[{test}]")


MUTATIONS = {
    "a length one too long": _mutation(
        "jnp.minimum(query_position, item.length - 1)",
        "jnp.minimum(query_position + 1, item.length)",
        "decode-late",
    ),
    "a query position one too far": _mutation(
        "visible = distances <= 0", "visible = distances <= 1", "decode-late"
    ),
    "a window one too wide": _mutation(
        "distances > -problem.sliding_window",
        "distances >= -problem.sliding_window",
        "prefill-early",
    ),
    "values for keys": _mutation("((k_cache, k_smem)", "((v_cache, k_smem)", "decode-late"),
    "keys for values": _mutation("(v_cache, v_smem))", "(k_cache, v_smem))", "decode-late"),
    "another head's keys": _mutation(
        "cache.at[block, item.head, ",
        "cache.at[block, jnp.maximum(item.head - 1, 0), ",
        "decode-late",
    ),
    "no wait for the keys": _mutation("wait(step, num_copies)", "pass", "decode-late"),
    "no wait for the values": _mutation("wait(step, 0)", "pass", "decode-late"),
    "a wait one copy short": _mutation(
        "started_since += (stages - 1) * 2 * num_copies",
        "started_since += (stages - 1) * 2 * num_copies + 1",
        "decode-late",
    ),
    "no wait at the end of a share": _mutation(
        "lambda: plgpu.wait_gmem_to_smem(0)", "lambda: None", "decode-late"
    ),
    "a tile loaded over one that is read": _mutation(
        "lambda: start_copies(step + stages, *place)",
        "lambda: start_copies(step + stages - 1, *place)",
        "decode-early",
    ),
    "a wrong scale": _mutation("(problem.scale * _LOG2E)", "(problem.scale)", "decode-late"),
    "no cap": _mutation("    if cap is None:", "    if True:", "split-late"),
    "a wrong cap": _mutation("(2 * cap * _LOG2E)", "(cap * _LOG2E)", "split-late"),
    "no slopes": _mutation("if slope is not None:", "if False:", "tokens-early"),
    "slopes of the wrong sign": _mutation(
        "logits += _across(slope", "logits -= _across(slope", "tokens-early"
    ),
    "slopes of other rows": _mutation(
        "jnp.tile(per_head.reshape(problem.num_kv_heads, -1), (1, problem.max_tokens))",
        "jnp.repeat(per_head.reshape(problem.num_kv_heads, -1), problem.max_tokens, axis=1)",
        "tokens-early",
        _WRAPPER,
    ),
    "no sinks": _mutation("    if sink is not None:", "    if False:", "split-late"),
    "no sink in the merge": _mutation(
        "sink = None if sinks is None else", "sink = None if True else", "split-late"
    ),
    "the sink in every part": _mutation(
        "_finish(state, None)", "_finish(state, sink)", "split-late"
    ),
    "zeros": _mutation(
        "_across(factor, some.shape) for some",
        "_across(factor * 0, some.shape) for some",
        "mixed-late",
    ),
    "no correction": _mutation(
        "some * _across(correction, some.shape) for some in",
        "some * 1.0 for some in",
        "decode-late",
    ),
    "equal weights in the merge": _mutation(
        "weight = jnp.exp2(part_lse - maximum)",
        "weight = jnp.exp2(part_lse - part_lse)",
        "split-late",
    ),
    "a part left out of the merge": _mutation(
        "(cta, last_part + 1, one_part", "(cta, last_part, one_part", "split-late"
    ),
    "NaN of a tail in the values": _mutation(
        "(position + tile_size > item.length)", "(position > item.length)", "decode-late"
    ),
    "NaN left of the window in the values": _mutation(
        "| (position < first_key)", "", "tokens-early"
    ),
    "padding not zeroed": _mutation(
        "jnp.where(mask, heads,", "jnp.where(mask | True, heads,", "mixed-late", _WRAPPER
    ),
    "runs that overlap": _mutation(
        "QueryRuns(rows, lens, starts[rows] + offsets, tokens)",
        "QueryRuns(rows, lens, starts[rows], tokens)",
        "prefill-early",
        _WORK_LIST,
    ),
    "lengths of the whole sequence": _mutation(
        "lens = lens[rows] - counts[rows] + offsets + tokens",
        "lens = lens[rows]",
        "prefill-early",
        _WORK_LIST,
    ),
}

if __name__ == "__main__":
    sys.exit(run(MUTATIONS, sys.argv[1:]))
