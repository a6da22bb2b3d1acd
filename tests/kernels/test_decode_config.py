"""Configurations of the decode kernel: checks, shared memory, look-up."""

import dataclasses
import functools
import itertools

import pytest

from benchmarks.attention_cases.decode import candidate_configs, decode_cases, make_case
from pallas_paged.ops.attention import config as configs
from pallas_paged.ops.attention.ampere import problem as ampere_problem
from pallas_paged.ops.attention.config import (
    SM80,
    SM86,
    SM90,
    DecodeConfig,
    DecodeKey,
    decode_config,
    fits,
    format_tuned,
    heuristic,
    parse_tuned,
    shared_memory_bytes,
    tuned_file_name,
)
from pallas_paged.ops.attention.hopper.decode_problem import scratch_types
from pallas_paged.ops.attention.mosaic_gpu import HEAD_DIMS, decode_key
from tests.kernels.ampere_cases import CompileCase

CASE = make_case(4, 128, 16)
SCRATCH = functools.partial(scratch_types, CASE.problem)
KEY = DecodeKey("bfloat16", 128, 8, 16)


def test_wrong_fields_are_refused():
    for fields in ({"tile": 16}, {"num_stages": 0}, {"ctas_per_sm": 0}, {"min_tiles": 0}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            DecodeConfig(**fields)
    with pytest.raises(ValueError, match="converts_ahead needs two tiles"):
        DecodeConfig(num_stages=1)
    assert not DecodeConfig(num_stages=1, converts_ahead=False).converts_ahead


def test_shared_memory():
    # Tiles of 64 keys and values of 256 bytes in 3 stages, 4 times 8 queries, weights, output, lse,
    # 2 KiB for reductions, 10 barriers.
    expected = 3 * 2 * 64 * 256 + 4 * 8 * 256 + 1024 + 8 * 256 + 1024 + 2048 + 10 * 8
    assert shared_memory_bytes(SCRATCH(DecodeConfig())) == expected
    assert fits(DecodeConfig(), SCRATCH(DecodeConfig()), SM90)
    for config in (DecodeConfig(ctas_per_sm=3), DecodeConfig(num_stages=8), DecodeConfig(tile=32)):
        assert not fits(config, SCRATCH(config), SM90)


def test_the_rule_finds_one_for_every_case():
    for head_dim, block_size, (group, tokens) in itertools.product(
        HEAD_DIMS, (16, 128), ((1, 1), (16, 1), (1, 8))
    ):
        problem = make_case(group, head_dim, block_size, tokens).problem
        scratch = functools.partial(scratch_types, problem)
        config = heuristic(decode_key(problem), scratch)
        assert fits(config, scratch(config), SM90)
        assert config.num_stages >= 2
    assert CASE.config == DecodeConfig(num_stages=3, ctas_per_sm=2)


@pytest.mark.parametrize("target", ["a100-40gb", "a10", "l4"])
@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_the_rule_finds_one_for_every_case_of_an_older_chip(target, cache_dtype):
    """Two tiles in flight at least; with 99 KiB, and so smaller tiles where keys are long."""
    limits = SM80 if target == "a100-40gb" else SM86
    tiles = set()
    for head_dim, block_size, group, max_query_len in itertools.product(
        HEAD_DIMS, (16, 128), (1, 4, 16), (1, 8, 256)
    ):
        case = CompileCase(
            group, head_dim, block_size, max_query_len, cache_dtype=cache_dtype, target=target
        )
        config = case.chosen_config
        assert fits(config, ampere_problem.scratch_types(case.problem, config), limits)
        assert config.num_stages >= 2
        tiles.add(config.tile)
    assert tiles == ({64} if limits == SM80 else {32, 64})
    assert CompileCase(4, 256, 16, 1, target="l4").chosen_config == DecodeConfig(32, 3, 1)


def test_the_measured_one_wins_where_it_fits(monkeypatch):
    tuned = {KEY: DecodeConfig(tile=128, num_stages=2, ctas_per_sm=1)}
    monkeypatch.setattr(configs, "tuned_configs", {"A GPU": tuned, "Another": {}}.__getitem__)
    assert decode_config(KEY, "A GPU", SCRATCH) == tuned[KEY]
    assert decode_config(KEY, "Another", SCRATCH) == CASE.config
    other = dataclasses.replace(KEY, block_size=64)
    assert decode_config(other, "A GPU", SCRATCH) == CASE.config
    tuned[KEY] = DecodeConfig(num_stages=20)
    assert decode_config(KEY, "A GPU", SCRATCH) == CASE.config


def test_files_of_measured_configurations():
    measured = {KEY: DecodeConfig(tile=128), DecodeKey("float16", 64, 8, 16): DecodeConfig()}
    assert parse_tuned(format_tuned(measured, {"device": "x"})) == measured
    assert tuned_file_name("NVIDIA H100 80GB HBM3") == "nvidia_h100_80gb_hbm3.json"
    assert configs.tuned_configs("no such GPU") == {}


def test_large_tiles_are_for_few_columns():
    tiles = [
        {config.tile for config in candidate_configs(make_case(8, 64, 16, tokens).problem)}
        for tokens in (1, 4, 8)
    ]
    assert tiles == [{64, 128}, {64, 128}, {64}]


def test_names_of_cases_are_unique():
    names = [case.name for case in decode_cases()]
    assert len(set(names)) == len(names) > 90
