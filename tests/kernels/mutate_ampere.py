"""Breaks the attention kernels for sm_80, sm_86 and sm_89 on purpose; see `tests.mutations`.

python -m tests.kernels.mutate_ampere            # all of them, about half a minute each
python -m tests.kernels.mutate_ampere zeros ...  # some, by name
"""

import sys

from tests.mutations import Mutation, run

_KERNEL = "pallas_paged/ops/attention/ampere/kernel.py"
_PARTS = "pallas_paged/ops/attention/ampere/parts.py"
_QUANTISED = "pallas_paged/ops/attention/ampere/quantised.py"
_WORK_LIST = "pallas_paged/ops/attention/work_list.py"
_SOFTMAX = "pallas_paged/ops/attention/online_softmax.py"
_PACKING = "pallas_paged/ops/attention/packing.py"
_CONFIG = "pallas_paged/ops/attention/config.py"
_TESTS = "tests/kernels/test_mosaic_ampere.py"


def _mutation(old: str, new: str, test: str, file: str = _KERNEL) -> Mutation:
    return Mutation(file, old, new, f"{_TESTS}::test_equals_the_reference[{test}]")


def _mutated_choice(old: str, new: str, test: str, file: str = _CONFIG) -> Mutation:
    return Mutation(file, old, new, f"tests/kernels/test_{test}")


MUTATIONS = {
    "a length one too long": _mutation(
        "jnp.minimum(query_position, item.length - 1)",
        "jnp.minimum(query_position + 1, item.length)",
        "decode-late",
    ),
    "a query position one too far": _mutation(
        "visible = distances <= 0", "visible = distances <= 1", "decode-late", _PARTS
    ),
    "a window one too wide": _mutation(
        "distances > -problem.sliding_window",
        "distances >= -problem.sliding_window",
        "prefill-early",
        _PARTS,
    ),
    "values for keys": _mutation(
        "((inputs.k_cache, smem.k)", "((inputs.v_cache, smem.k)", "decode-late"
    ),
    "keys for values": _mutation(
        "(inputs.v_cache, smem.v))", "(inputs.k_cache, smem.v))", "decode-late"
    ),
    "another head's keys": _mutation(
        "cache.at[block, item.head], begin",
        "cache.at[block, jnp.maximum(item.head - 1, 0)], begin",
        "decode-late",
    ),
    "no wait for the keys": _mutation("wait(step, copies_of_tile)", "pass", "decode-late"),
    "no wait for the values": _mutation("wait(step, 0)", "pass", "decode-late"),
    "a wait one copy short": _mutation(
        "started_since += (stages - 1) * 2 * copies_of_tile",
        "started_since += (stages - 1) * 2 * copies_of_tile + 1",
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
    "a wrong scale": _mutation(
        "return scale * LOG2E if", "return scale if", "decode-late", _SOFTMAX
    ),
    "no cap": _mutation("    if cap is not None:", "    if False:", "split-late", _PARTS),
    "a wrong cap": _mutation(
        "(2 * cap * LOG2E) / power", "(cap * LOG2E) / power", "split-late", _SOFTMAX
    ),
    "no slopes": _mutation("if slope is not None:", "if False:", "tokens-early", _PARTS),
    "slopes of the wrong sign": _mutation(
        "logits += across(slope", "logits -= across(slope", "tokens-early", _PARTS
    ),
    "slopes of other rows": _mutation(
        "jnp.tile(per_head.reshape(num_kv_heads, -1), (1, num_tokens))",
        "jnp.repeat(per_head.reshape(num_kv_heads, -1), num_tokens, axis=1)",
        "tokens-early",
        _PACKING,
    ),
    "no sinks": _mutation("    if sink is not None:", "    if False:", "split-late", _SOFTMAX),
    "no sink in the merge": _mutation(
        "sink = None if sinks is None else", "sink = None if True else", "split-late"
    ),
    "the sink in every part": _mutation(
        "finished(state, None, across)", "finished(state, sink, across)", "split-late"
    ),
    "zeros": _mutation(
        "spread(factor, some.shape) for some",
        "spread(factor * 0, some.shape) for some",
        "mixed-late",
        _SOFTMAX,
    ),
    "no correction": _mutation(
        "some * across(correction, some.shape) for some in",
        "some * 1.0 for some in",
        "decode-late",
        _PARTS,
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
        "jnp.where(mask, heads,", "jnp.where(mask | True, heads,", "mixed-late", _PACKING
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
    "no scales of keys": _mutation(
        "along(scales * factor", "along(scales / scales * factor", "fp8-late", _PARTS
    ),
    "scales of keys in another unit": _mutation(
        "problem.scale / problem.unit", "problem.scale", "int8-early", _PARTS
    ),
    "scales of values in another unit": _mutation(
        "scales * (1.0 / problem.unit)", "scales", "wide-late", _QUANTISED
    ),
    "scales of keys for values": _mutation(
        "tile_scales(all_v_scales, item, position) if has_registers",
        "tile_scales(all_k_scales, item, position) if has_registers",
        "fp8-late",
    ),
    "scales of another block": _mutation(
        "blocks[p.start // copy_rows]", "blocks[0]", "shared-early"
    ),
    "scales of other tokens": _mutation("begin + p.start % copy_rows", "begin", "wide-late"),
    "scales of another head": _mutation(
        "scales.at[block, item.head]",
        "scales.at[block, jnp.maximum(item.head - 1, 0)]",
        "shared-early",
    ),
    "NaN of a tail in the scales": _mutation(
        " & (keys < valid[1])", "", "shared-early", _QUANTISED
    ),
    "NaN left of the window in the scales": _mutation(
        "(keys >= valid[0]) & ", "", "fp8-late", _QUANTISED
    ),
    "converted keys for values": _mutation(
        "convert_tile(problem, smem.v", "convert_tile(problem, smem.k", "int8-early"
    ),
    "a tile not converted": _mutation(
        "if smem.numbers is not None:\n                convert_tile(problem, smem.k",
        "if False:\n                convert_tile(problem, smem.k",
        "int8-early",
    ),
    "int8 without its sign": _mutation(
        "^ _bits(0x4C80)", "^ _bits(0x4C00)", "int8-early", _QUANTISED
    ),
    "float8 with its sign twice": _mutation(
        "_bits(0xBFFF)", "_bits(0xFFFF)", "wide-late", _QUANTISED
    ),
    "the end of a flat copy missing": _mutation("for i in (0, 1)", "for i in (0, 0)", "flat-late"),
    "a flat copy to another block's place": _mutation(
        "flat.at[pl.ds(first + i, ", "flat.at[pl.ds(i, ", "flat-late"
    ),
    "a wait for half of the flat copies": _mutation(
        "wait(step, copies_of_tile)", "wait(step, copies_of_tile + num_copies)", "flat-late"
    ),
    "rows behind half a tile zeroed": _mutation(
        "size = min(_ZEROED_ROWS, tile.shape[0])",
        "size = _ZEROED_ROWS",
        "small-late",
        "pallas_paged/ops/attention/smem.py",
    ),
    "another family's kernels": _mutation(
        'kernel_family() == "ampere"',
        "compute_capability() == (8, 0)",
        "small-late",
        "pallas_paged/ops/attention/mosaic_gpu.py",
    ),
    "an A100's shared memory for all": _mutated_choice(
        "(8, 9): SM86", "(8, 9): SM80", "decode_config.py"
    ),
    "a tile that the chip is not asked for": _mutated_choice(
        "is_room and config.tile >= limits.smallest_tile", "is_room", "decode_config.py"
    ),
    "whole tiles alone": _mutated_choice(
        "product((64, 32), ", "product((64,), ", "decode_config.py"
    ),
    "a chip without a family": _mutated_choice(
        "(8, 6), (8, 9)),", "(8, 9)),", "dispatch.py", "pallas_paged/dispatch.py"
    ),
}

if __name__ == "__main__":
    sys.exit(run(MUTATIONS, sys.argv[1:]))
