"""Breaks the decode kernel on purpose, one way at a time, and sees its tests fail.

python -m tests.kernels.mutate_decode            # all of them, about half a minute each
python -m tests.kernels.mutate_decode zeros ...  # some, by name
"""

import sys

from tests.mutations import Mutation, run

_KERNEL = "pallas_paged/ops/attention/hopper/decode_kernel.py"
_LOAD = "pallas_paged/ops/attention/hopper/decode_load.py"
_TILE = "pallas_paged/ops/attention/hopper/decode_tile.py"
_PARTS = "pallas_paged/ops/attention/hopper/decode_parts.py"
_MERGE = "pallas_paged/ops/attention/hopper/decode_merge.py"
_WORK_LIST = "pallas_paged/ops/attention/work_list.py"
_CONVERSION = "pallas_paged/ops/attention/hopper/quantised.py"
_SOFTMAX = "pallas_paged/ops/attention/online_softmax.py"
_SMEM = "pallas_paged/ops/attention/smem.py"
_TESTS = "tests/kernels/test_mosaic_decode.py"
_PLANS = "tests/kernels/test_work_list.py"
_DECODE, _WINDOW, _TOKENS, _LONG = (
    f"{_TESTS}::test_equals_the_reference[{i}]" for i in (0, 1, 3, 4)
)
_FP8, _INT8, _FP8_HALF = (f"{_TESTS}::test_equals_the_reference[{i}]" for i in (8, 10, 11))
_MANY = f"{_TESTS}::test_a_merge_of_many_parts"
_FENCES = "tests/kernels/test_fences.py::test_decode"
_NUMBERS, _QUANTISED = f"{_FENCES}[numbers]", f"{_FENCES}[quantised]"


MUTATIONS = {
    "another head's columns sent": Mutation(_PARTS, " + problem.first_column(head)", "", _TESTS),
    "another head's lse taken": Mutation(
        "pallas_paged/ops/attention/hopper/decode.py",
        "first[:, None] + jnp",
        "0 * first[:, None] + jnp",
        _TESTS,
    ),
    "a length one too long": Mutation(
        _TILE,
        "return jnp.minimum(token + item.first_position, item.length - 1)",
        "return jnp.minimum(token + item.first_position + 1, item.length)",
        _TOKENS,
    ),
    "a query position one too far": Mutation(
        _TILE, "visible = keys <= positions", "visible = keys <= positions + 1", _DECODE
    ),
    "a window one too wide": Mutation(
        _TILE, "keys > positions - window", "keys >= positions - window", _WINDOW
    ),
    "values for keys": Mutation(_LOAD, "cache.k.at[block, head", "cache.v.at[block, head", _DECODE),
    "another head's keys": Mutation(
        _LOAD, "cache.k.at[block, head", "cache.k.at[block, jnp.maximum(head - 1, 0)", _DECODE
    ),
    "no wait for the keys": Mutation(
        _TILE, "plgpu.barrier_wait(cta.barriers.k.at[tile.slot])", "pass", _DECODE
    ),
    "no wait for the values": Mutation(
        _TILE,
        "plgpu.barrier_wait(cta.barriers.v.at[tile.slot])\n        _zero",
        "_zero",
        _DECODE,
    ),
    "a tile loaded one step early": Mutation(
        _KERNEL,
        "lambda: load_tile(cta, later, place)",
        "lambda: load_tile(cta, later - 1, place)",
        _DECODE,
    ),
    "a wrong scale": Mutation(_SOFTMAX, "return scale * LOG2E if", "return scale if", _DECODE),
    "a wrong cap": Mutation(_SOFTMAX, "(2 * cap * LOG2E) / power", "(cap * LOG2E) / power", _LONG),
    "slopes of the wrong sign": Mutation(
        _TILE, "logits += spread_columns(slopes", "logits -= spread_columns(slopes", _TOKENS
    ),
    "no sink in the merge": Mutation(
        _MERGE,
        "finish(problem, state, inputs.sinks, item.head)",
        "finish(problem, state, None, item.head)",
        _LONG,
    ),
    "the sink in every part": Mutation(
        _KERNEL,
        "finish(cta.problem, state, None, head)\n",
        "finish(cta.problem, state, cta.inputs.sinks, head)\n",
        _LONG,
    ),
    "zeros": Mutation(
        _SOFTMAX,
        "spread(factor, some.shape) for some in",
        "spread(factor * 0, some.shape) for some in",
        _DECODE,
    ),
    "no correction": Mutation(
        _TILE,
        "corrected = some * spread_columns(correction, some.shape)",
        "corrected = some",
        _DECODE,
    ),
    "equal weights in the merge": Mutation(
        _MERGE, "weight = jnp.exp2(lse - maximum)", "weight = jnp.exp2(lse - lse)", _LONG
    ),
    "a part left out of the merge": Mutation(
        _MERGE, "num_parts = last_part - cta + 1", "num_parts = last_part - cta", _LONG
    ),
    "parts left out of the merge that do not fill a turn": Mutation(
        _MERGE, "num_parts - few + (many - 1)", "num_parts - few", _MANY
    ),
    "the last few parts left out of the merge": Mutation(
        _MERGE, "rest = turns * many < num_parts", "rest = num_parts < 0", _MANY
    ),
    "no correction between turns of the merge": Mutation(
        _MERGE,
        "numerator = numerator * spread_columns(correction, numerator.shape)",
        "pass",
        _MANY,
    ),
    "one chunk of head_dim merged for all": Mutation(
        _MERGE, "pl.ds(chunk * _CHUNK, _CHUNK)]", "pl.ds(0, _CHUNK)]", _MANY
    ),
    "NaN of a tail in the values": Mutation(
        _TILE, "(position + cta.config.tile > tile.length)", "(position > tile.length)", _DECODE
    ),
    "NaN of a tail beside values that stay": Mutation(_SMEM, " & (rows < end)", "", _DECODE),
    "padding not written": Mutation(
        _KERNEL,
        "write_padding(problem, ctas[number, CtaField.STEP_TOKENS]",
        "(lambda *_: 0)(0",
        _DECODE,
    ),
    "a sequence in another's place": Mutation(
        _WORK_LIST,
        "rank[None, :] == indices[:, None] + 1",
        "rank[None, :] == indices[:, None]",
        f"{_PLANS}::test_sequences_with_work_side_by_side",
    ),
    "shares that count sequences without work": Mutation(
        _WORK_LIST,
        "_sum(is_before & has_work[None, :])",
        "_sum(is_before)",
        f"{_PLANS}::test_every_tile_once_in_equal_shares",
    ),
    "shares that overlap": Mutation(
        _WORK_LIST, "begin = jnp.minimum(ctas * share, total)", "begin = ctas * (share - 1)", _LONG
    ),
    "quantised: keys without their scales": Mutation(
        _TILE, "return products * spread_rows(scales, products.shape)", "return products", _INT8
    ),
    "quantised: weights without the values' scales": Mutation(
        _TILE, "return weights * spread_rows(scales, weights.shape)", "return weights", _INT8
    ),
    "quantised: float16 values without their scales": Mutation(
        _CONVERSION, "x *= plgpu.layout_cast", "plgpu.layout_cast", _FP8_HALF
    ),
    "quantised: the keys' scales for the values": Mutation(
        _LOAD, "cache.v_scale.at[block, head", "cache.k_scale.at[block, head", _INT8
    ),
    "quantised: another head's scales": Mutation(
        _LOAD,
        "cache.k_scale.at[block, head",
        "cache.k_scale.at[block, jnp.maximum(head - 1, 0)",
        _INT8,
    ),
    "quantised: another block's scales": Mutation(
        _LOAD, "cache.v_scale.at[block, head", "cache.v_scale.at[block - 1, head", _INT8
    ),
    "quantised: scales one token off": Mutation(
        _CONVERSION, "is_before = row < i * copy_rows", "is_before = row <= i * copy_rows", _INT8
    ),
    "quantised: bytes without a sign": Mutation(
        _CONVERSION,
        "stored = stored.astype(jnp.bfloat16)",
        "stored = stored.astype(jnp.uint8).astype(jnp.bfloat16)",
        _INT8,
    ),
    "quantised: no wait for bytes and scales": Mutation(
        _TILE,
        "plgpu.barrier_wait(cta.barriers.v.at[tile.slot])\n    stored",
        "stored",
        _INT8,
    ),
    "quantised: the next tile's keys not converted ahead": Mutation(
        _TILE, "pl.when(step < cta.num_tiles)(lambda: convert_keys(cta, step))", "pass", _FP8
    ),
    "quantised: the first tile's keys not converted ahead": Mutation(
        _KERNEL,
        "pl.when(cta.num_tiles > 0)(lambda: convert_keys(cta, jnp.int32(0)))",
        "pass",
        _FP8,
    ),
    "quantised: no wait for keys that are converted": Mutation(
        _TILE, "plgpu.barrier_wait(cta.barriers.k.at[slot])", "pass", f"{_FP8} {_INT8}"
    ),
    "fences: keys converted while they are multiplied": Mutation(
        _TILE,
        "lambda: _convert_values(cta, tile))",
        "lambda: convert_keys(cta, tile.step))",
        _QUANTISED,
    ),
    "quantised: NaN of a tail's scales": Mutation(
        _CONVERSION,
        ", scales, 0.0)",
        ", scales, scales)",
        _INT8,
    ),
    "quantised: NaN of a tail's values": Mutation(
        _CONVERSION, "x = jnp.where(is_kept, x, jnp.zeros_like(x))", "pass", _FP8
    ),
    "fences: weights and values not committed": Mutation(
        _TILE, "plgpu.commit_smem()  # weights and values", "pass  # weights and values", _NUMBERS
    ),
    "fences: converted keys not committed": Mutation(
        _TILE,
        "plgpu.commit_smem()  # converted keys",
        "pass  # converted keys",
        _QUANTISED,
    ),
    "fences: staged results not committed": Mutation(
        _PARTS,
        "store(staged.lse, as_column(lse * LN2))\n    plgpu.commit_smem()",
        "store(staged.lse, as_column(lse * LN2))",
        _NUMBERS,
    ),
    "fences: staged zeros not committed": Mutation(
        _PARTS,
        "plgpu.layout_cast(zeros, TILE_LAYOUT))\n        plgpu.commit_smem()",
        "plgpu.layout_cast(zeros, TILE_LAYOUT))",
        _NUMBERS,
    ),
    "fences: a result staged over one that is sent": Mutation(
        _PARTS,
        "plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what was there",
        "pass  # what was there",
        _NUMBERS,
    ),
    "fences: zeros staged over a result that is sent": Mutation(
        _PARTS,
        "plgpu.wait_smem_to_gmem(0, wait_read_only=True)\n        zeros",
        "zeros",
        _NUMBERS,
    ),
    "fences: the kernel ends before its copies": Mutation(
        _KERNEL, "plgpu.wait_smem_to_gmem(0)", "pass", _NUMBERS
    ),
    "fences: the merge ends before its copies": Mutation(
        _MERGE, "plgpu.wait_smem_to_gmem(0)", "pass", _NUMBERS
    ),
}


if __name__ == "__main__":
    sys.exit(run(MUTATIONS, sys.argv[1:]))
