"""Pool, runner and block copies take each layer's cache from its own spec."""

import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_paged.cache_spec import BlockArray, CacheSpec
from pallas_paged.engine.config import EngineConfig
from pallas_paged.engine.core.buckets import Bucket
from pallas_paged.engine.core.plan import StepPlan
from pallas_paged.engine.device import implementations
from pallas_paged.engine.device.block_programs import BlockPrograms
from pallas_paged.engine.device.pool_size import buckets_for, plan_pool
from pallas_paged.engine.device.runner import ModelRunner
from pallas_paged.engine.kv.host_pool import BlockMove, SwappedChunk
from pallas_paged.engine.kv.sharing import NO_COPIES, CopyPairs
from tests.engine.bigram_model import Bigram, BigramConfig, make_table

FLOAT32 = jnp.dtype(jnp.float32)
WIDE = CacheSpec.attention(2, 4, 8, FLOAT32, v_head_dim=24)
SLIDING = CacheSpec.attention(1, 4, 16, FLOAT32, sliding_window=6)
LATENT = CacheSpec("latent", (BlockArray("latent", (4, 96), FLOAT32),), 4)
RECURRENT = CacheSpec("recurrent", (BlockArray("state", (8, 8), FLOAT32),), None)
NUM_BLOCKS = 9


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayeredConfig(BigramConfig):
    specs: tuple[CacheSpec, ...]

    def cache_specs(self, block_size: int, dtype: Any) -> tuple[CacheSpec, ...]:
        return self.specs


def layered(*specs: CacheSpec) -> Bigram:
    model = Bigram(make_table())
    model.config = LayeredConfig(**vars(model.config), specs=specs)
    return model


def plan(*specs: CacheSpec) -> Any:
    config = EngineConfig("m", num_blocks=NUM_BLOCKS, block_size=4)
    return plan_pool(config, layered(*specs), 32, FLOAT32, "xla")


def make_runner(*specs: CacheSpec) -> ModelRunner:
    config = EngineConfig("m", max_num_seqs=2, max_num_batched_tokens=8, block_size=4)
    return ModelRunner(
        layered(*specs),
        num_blocks=NUM_BLOCKS,
        block_size=4,
        kv_cache_dtype=FLOAT32,
        max_num_seqs=2,
        buckets=buckets_for(config, 8, "cpu", specs),
        swaps=True,
    )


def test_a_block_takes_what_each_layer_takes() -> None:
    assert plan(WIDE, SLIDING, SLIDING).block_bytes == 4 * (2 * 4 * (8 + 24) + 2 * 4 * (16 + 16))


def test_each_layer_gets_its_own_cache() -> None:
    shapes = [(cache.k.shape, cache.v.shape) for cache in make_runner(WIDE, SLIDING).kv_caches]
    assert shapes == [((9, 2, 4, 8), (9, 2, 4, 24)), ((9, 1, 4, 16), (9, 1, 4, 16))]


def test_blocks_of_unlike_layers_move_together() -> None:
    rng = np.random.default_rng(0)
    caches = tuple(
        jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape), a.dtype), s.zeros(9))
        for s in (WIDE, SLIDING)
    )
    before = [np.array(array) for array in jax.tree.leaves(caches)]
    programs = BlockPrograms(caches, 2, swaps=True)
    chunk = SwappedChunk(0, 8)
    moved = programs.swap_out(caches, BlockMove(chunk, np.array([5, 2], np.int32)))
    ids = np.array([7, 3, 0, 0, 0, 0, 0, 0], np.int32)
    caches = programs.swap_in(caches, BlockMove(chunk, ids), moved)
    for array, old in zip(jax.tree.leaves(caches), before, strict=True):
        np.testing.assert_array_equal(array[jnp.array([7, 3, 4])], old[[5, 2, 4]])


def move_plan(**moves: Any) -> StepPlan:
    """Returns a plan of which only what comes before its step matters."""
    nothing = np.zeros(0, np.int32)
    plan = StepPlan(
        step_id=0,
        bucket=Bucket(8, 2, 8, is_decode=False),
        dropped_chunks=(),
        swap_outs=(),
        swap_ins=(),
        copies=NO_COPIES,
        table_edits=(),
        row_edits=(),
        mask_edits=(),
        inputs=nothing,
        wants_logprobs=False,
        prompt_targets=nothing.reshape(3, 0),
    )
    return plan._replace(**moves)


def test_a_plan_swaps_out_before_it_swaps_in_and_copies_last() -> None:
    """One block is emptied, filled and copied in one plan."""
    runner = make_runner(WIDE, SLIDING)
    rng = np.random.default_rng(0)
    runner.kv_caches = jax.tree.map(
        lambda a: jnp.asarray(rng.standard_normal(a.shape), a.dtype), runner.kv_caches
    )
    before = [np.array(array) for array in jax.tree.leaves(runner.kv_caches)]

    def move(number: int, block: int) -> BlockMove:
        ids = np.zeros(8, np.int32)
        ids[0] = block
        return BlockMove(SwappedChunk(number, 8), ids)

    one = np.array([3], np.int32)
    runner._move_blocks(move_plan(swap_outs=(move(0, 5),)))
    runner._move_blocks(
        move_plan(swap_outs=(move(1, 3),), swap_ins=(move(0, 3),), copies=CopyPairs(one, one + 1))
    )
    runner._move_blocks(move_plan(swap_ins=(move(1, 6),)))
    for array, old in zip(jax.tree.leaves(runner.kv_caches), before, strict=True):
        np.testing.assert_array_equal(array[jnp.array([3, 4, 6])], old[[5, 5, 3]])


@pytest.mark.parametrize("spec", [LATENT, RECURRENT], ids=lambda spec: spec.kind)
def test_kinds_that_no_pool_holds_are_refused_by_name(spec: CacheSpec) -> None:
    for start in (plan, make_runner):
        with pytest.raises(NotImplementedError, match=f"a '{spec.kind}' cache"):
            start(WIDE, spec)


def test_layers_of_unlike_choices_run_with_xla_and_say_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a GPU whose kernels serve the head size of some layers only."""
    config = EngineConfig("m")
    shape = layered(WIDE, SLIDING).config
    choose = implementations.choose_attention

    def choice(_: str, q: Any, k: Any, v: Any, **options: Any) -> str:
        return "fast" if k.shape == v.shape else "other"

    monkeypatch.setattr(implementations.attention, "attention_implementation", choice)
    with caplog.at_level(logging.WARNING):
        assert choose(config, shape, FLOAT32, (SLIDING, SLIDING)) == "fast"
        assert not caplog.records
        assert choose(config, shape, FLOAT32, (SLIDING, WIDE)) == "xla"
    assert "no attention of ['fast', 'other'] serves all layers" in caplog.text
