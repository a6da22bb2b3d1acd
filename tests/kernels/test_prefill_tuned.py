"""Measured tunings of the prefill kernel: which one is taken, and the files they are in."""

import dataclasses
import json

import jax
import pytest

from benchmarks.attention_cases.arguments import AttentionSpec, build
from benchmarks.attention_cases.decode import make_case
from pallas_paged.dispatch import interpret_kernels
from pallas_paged.ops.attention import config as decode_configs
from pallas_paged.ops.attention import mosaic_gpu
from pallas_paged.ops.attention.config import DecodeConfig, DecodeKey, format_tuned, parse_tuned
from pallas_paged.ops.attention.hopper import prefill_tuned
from pallas_paged.ops.attention.hopper.prefill_config import PrefillTuning, prefill_tuning
from pallas_paged.ops.attention.hopper.prefill_tuned import (
    PrefillKey,
    fits,
    merged,
    parse,
    prefill_key,
    prefill_tuning_for,
)

KEY = PrefillKey("bfloat16", 128, 4, 16)
TUNED = PrefillTuning(64, 4)
DECODE = {DecodeKey("bfloat16", 128, 8, 16): DecodeConfig(tile=128, num_stages=2, ctas_per_sm=1)}
HEAD_DIMS, BLOCK_SIZES = (64, 80, 96, 128, 192, 256), (16, 32, 64, 128)


@pytest.fixture
def a_gpu(monkeypatch, tmp_path):
    """Where the tunings of "A GPU" are, and "Another" has none."""
    folder = tmp_path / "tuned"
    folder.mkdir()
    monkeypatch.setattr(prefill_tuned.resources, "files", lambda package: tmp_path)
    caches = (prefill_tuned.tuned_prefill, decode_configs.tuned_configs)
    for cache in caches:
        cache.cache_clear()
    yield folder / "a_gpu.json"
    for cache in caches:
        cache.cache_clear()


def test_the_key_of_a_problem():
    assert prefill_key(make_case(4, 128, 16).problem) == KEY
    quantised = make_case(8, 64, 32, cache_dtype="int8").problem
    assert prefill_key(quantised) == PrefillKey("int8", 64, 8, 32)


def test_the_measured_one_wins_where_it_fits(a_gpu):
    too_large = dataclasses.replace(KEY, block_size=64)
    a_gpu.write_text(merged(None, {}, {KEY: TUNED, too_large: PrefillTuning(128, 3)}, {}))
    rule = prefill_tuning(128)
    assert rule != TUNED
    assert prefill_tuning_for(KEY, "A GPU") == TUNED
    assert prefill_tuning_for(KEY, "Another") == rule
    assert prefill_tuning_for(dataclasses.replace(KEY, group=8), "A GPU") == rule
    assert prefill_tuning_for(too_large, "A GPU") == rule
    # Interpret mode knows no products with an operand in registers.
    assert prefill_tuning_for(KEY, "A GPU", interpreted=True) == prefill_tuning(128, True)


def test_the_wrapper_takes_what_is_looked_up(monkeypatch):
    spec = AttentionSpec(
        "chunk", (40,), (20,), num_q_heads=4, num_kv_heads=1, head_dim=128, block_size=16,
        dtype="bfloat16",
    )  # fmt: skip
    asked, taken = [], []

    def look_up(*args):
        asked.append(args)
        return TUNED

    monkeypatch.setattr(mosaic_gpu, "prefill_tuning_for", look_up)
    monkeypatch.setattr(
        mosaic_gpu, "_prefill_part", lambda *args, tuning, **_: taken.append(tuning) or args[-1]
    )
    options = dict.fromkeys(
        ("sliding_window", "logits_soft_cap", "alibi_slopes", "sinks"), None
    ) | {"scale": 0.1}
    with interpret_kernels():
        jax.eval_shape(
            lambda *arrays: mosaic_gpu.paged_attention(*arrays, **options), *build(spec).arrays
        )
        assert asked == [(KEY, jax.devices()[0].device_kind, True)]
        other = PrefillTuning(64, 2)
        jax.eval_shape(
            lambda *arrays: mosaic_gpu.paged_attention(*arrays, **options, tuning=other),
            *build(spec).arrays,
        )
    assert len(asked) == 1
    assert taken == [TUNED, other]


def test_nothing_is_shipped_yet_for_others():
    """By rule on every GPU without a file, which is what the kernels' tables are made with."""
    for head_dim in HEAD_DIMS:
        key = PrefillKey("bfloat16", head_dim, 4, 16)
        assert prefill_tuning_for(key, "no such GPU") == prefill_tuning(head_dim)
        quantised = dataclasses.replace(key, dtype="int8")
        rule = prefill_tuning(head_dim, quantised=True)
        assert prefill_tuning_for(quantised, "no such GPU") == rule


def test_what_is_chosen_by_rule_fits():
    for dtype in ("bfloat16", "float16", "int8", "float8_e4m3fn"):
        for head_dim in HEAD_DIMS:
            for block_size in BLOCK_SIZES:
                rule = prefill_tuning(head_dim, quantised=dtype in ("int8", "float8_e4m3fn"))
                assert fits(PrefillKey(dtype, head_dim, 4, block_size), rule)


def test_shared_memory_and_blocks_that_do_not_fit():
    # 128 queries and 128 rows of staging, 2 x 64 keys and values in each of the stages.
    assert fits(KEY, PrefillTuning(64, 4))
    assert not fits(KEY, PrefillTuning(64, 5))
    assert not fits(KEY, PrefillTuning(128, 3))
    assert not fits(KEY, PrefillTuning(128, 2, in_registers=False))
    # Two converting warpgroups leave too few registers for products with 256 columns.
    wide = PrefillKey("int8", 256, 4, 64)
    assert fits(wide, PrefillTuning(64, 2))
    assert not fits(wide, PrefillTuning(64, 2, converters=2))
    small = PrefillKey("bfloat16", 64, 4, 64)
    assert fits(small, PrefillTuning(192, 2))
    assert not fits(dataclasses.replace(small, block_size=128), PrefillTuning(192, 2))


def test_files_round_trip_and_keep_what_they_had():
    first = merged(None, DECODE, {KEY: TUNED}, {"device": "x"})
    assert parse(first) == (DECODE, {KEY: TUNED})
    assert json.loads(first)["about"] == {"device": "x"}
    other = dataclasses.replace(KEY, block_size=64)
    second = merged(first, {}, {other: TUNED, KEY: PrefillTuning(64, 3)}, {"device": "y"})
    assert parse(second) == (DECODE, {KEY: PrefillTuning(64, 3), other: TUNED})
    more = DecodeKey("bfloat16", 64, 8, 16)
    third = merged(second, {more: DecodeConfig()}, {}, {})
    assert parse(third) == (DECODE | {more: DecodeConfig()}, parse(second)[1])
    assert parse_tuned(third) == DECODE | {more: DecodeConfig()}, "decode reads the same file"


def test_a_file_with_decode_alone_is_read():
    text = format_tuned(DECODE, {})
    assert parse(text) == (DECODE, {})
    assert parse(merged(text, {}, {KEY: TUNED}, {})) == (DECODE, {KEY: TUNED})


@pytest.mark.parametrize(
    ("part", "field", "value", "match"),
    [
        ("config", "stages", None, "must have.*'stages'"),
        ("key", "group", None, "must have.*'group'"),
        ("config", "stagse", 3, "'stagse'"),
        ("config", "tile_keys", 48, "tile_keys=48"),
    ],
)
def test_files_are_checked_when_they_are_read(a_gpu, part, field, value, match):
    content = json.loads(merged(None, DECODE, {KEY: TUNED}, {}))
    if value is None:
        del content["prefill"][0][part][field]
    else:
        content["prefill"][0][part][field] = value
    a_gpu.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=match):
        prefill_tuning_for(KEY, "A GPU")


def test_decode_entries_lack_no_field_either():
    content = json.loads(merged(None, DECODE, {}, {}))
    del content["decode"][0]["config"]["min_tiles"]
    with pytest.raises(ValueError, match=r"'decode'.*'min_tiles'"):
        merged(json.dumps(content), {}, {KEY: TUNED}, {})
    with pytest.raises(ValueError, match="is a JSON object"):
        parse("[]")
