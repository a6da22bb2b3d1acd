"""Steps of models that GPUs share, compiled for them: what they exchange, memory and kernels.

Two layers stand for all, as in `test_whole_step_deviceless`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from pallas_paged.collectives import collectives
from pallas_paged.deviceless import compile_lowered, target_devices, without_compilation_cache
from pallas_paged.engine.config import EngineConfig
from pallas_paged.engine.core.buckets import Bucket
from pallas_paged.engine.device.block_programs import BlockPrograms
from pallas_paged.engine.device.exchanges import Exchanges, by_kind, least
from pallas_paged.engine.device.placement import Placement
from pallas_paged.engine.device.step_report import SHAPES, StepReport, compile_step
from pallas_paged.models.config import ModelConfig

DECODE = Bucket(64, 64, 128, is_decode=True, filters=False)
MIXED = Bucket(512, 64, 128, is_decode=False)
FULL = dataclasses.replace(MIXED, is_full=True)
SEVERAL = dataclasses.replace(DECODE, num_steps=4)


def two_layers(name: str, **changes: Any) -> ModelConfig:
    """Returns a model with a small vocabulary, whose shares are like nothing else in a step."""
    return dataclasses.replace(SHAPES[name], **{"num_layers": 2, "vocab_size": 1160} | changes)


def report(shape: ModelConfig, bucket: Bucket, target: str, num_devices: int) -> StepReport:
    config = EngineConfig("", dtype="bfloat16", tensor_parallel_size=num_devices)
    return compile_step(shape, config, bucket, target, num_blocks=4000)


def check_nothing_is_moved(step: StepReport) -> None:
    """No gather and no copy of a weight or a cache."""
    assert step.moves == ()
    assert step.in_place_bytes >= step.cache_bytes
    assert step.temporary_bytes < 100 << 20


@pytest.mark.parametrize(
    ("num_devices", "num_kv_heads"),
    [
        pytest.param(2, 8, marks=pytest.mark.slow),
        (4, 8),
        (8, 8),
        # Fewer KV heads than devices: each is on several of them.
        pytest.param(4, 2, marks=pytest.mark.slow),
        (8, 2),
    ],
)
def test_what_a_decode_step_exchanges(num_devices: int, num_kv_heads: int) -> None:
    """Two all-reduces in each layer, one of the embeddings, and the logits; kernels as on one."""
    shape = two_layers("llama-8b", num_kv_heads=num_kv_heads)
    step = report(shape, DECODE, "h100", num_devices)
    check_nothing_is_moved(step)
    found = by_kind(step.collectives)
    activations = 64 * 4096 * 2
    assert found == (
        Exchanges("all-gather", 1, 64 * 1160 * 4),
        Exchanges("all-reduce", 2 * 2 + 1, 5 * activations),
    )
    assert found == least(shape, "bfloat16", DECODE, num_devices)
    # In each layer the rotation with the write, the attention and its merge, as on one device.
    assert len(step.launches.kernels) == 6, step.launches.kernels
    one_head = 4000 * 16 * 128 * 2
    heads = max(1, num_kv_heads // num_devices)
    assert step.cache_bytes == pytest.approx(2 * 2 * heads * one_head, rel=0.01)


@pytest.mark.parametrize(
    "bucket",
    [MIXED, pytest.param(FULL, marks=pytest.mark.slow), SEVERAL],
    ids=str,
)
def test_other_steps_exchange_the_least(bucket: Bucket) -> None:
    """Also of the last layer, and in a loop of several decode steps."""
    shape = two_layers("llama-8b")
    step = report(shape, bucket, "h100", 4)
    check_nothing_is_moved(step)
    assert by_kind(step.collectives) == least(shape, "bfloat16", bucket, 4)
    assert step.launches.kernels or bucket == SEVERAL  # whose launches are in the loop


@pytest.mark.slow
@pytest.mark.parametrize("bucket", [DECODE, MIXED], ids=str)
def test_an_opt_on_a100s(in_process_for: Callable[..., StepReport], bucket: Bucket) -> None:
    shape = two_layers("opt-13b")
    step = in_process_for("a100-40gb", report, shape, bucket, "a100-40gb", 4)
    check_nothing_is_moved(step)
    assert by_kind(step.collectives) == least(shape, "bfloat16", bucket, 4)
    assert len(step.launches.kernels) >= 4, step.launches.kernels


def test_a_vocabulary_that_cannot_be_divided_is_on_every_device() -> None:
    shape = two_layers("llama-8b", num_layers=1, vocab_size=1151)
    step = report(shape, DECODE, "h100", 2)
    check_nothing_is_moved(step)
    assert by_kind(step.collectives) == (
        Exchanges("all-gather", 1, 64 * 1152 * 4),  # of logits, in parts of one size
        Exchanges("all-reduce", 2, 2 * 64 * 4096 * 2),
    )
    assert by_kind(step.collectives) == least(shape, "bfloat16", DECODE, 2)


def test_copies_of_blocks_exchange_nothing() -> None:
    """Each device copies what it has of them, to the host and back too."""
    shape, placement = two_layers("llama-8b"), Placement.on(*target_devices("h100", 4))
    caches = tuple(spec.shapes(64) for spec in shape.cache_specs(16, "bfloat16"))
    programs = BlockPrograms(caches, 8, swaps=True, placement=placement)
    names = dict(programs.names())
    assert sorted(names) == ["copy", "gather", "scatter"]
    with placement.as_target(), without_compilation_cache():
        lowered = [programs.lower(*name) for name in names.items()]
        texts = [compile_lowered(one, placement.device).as_text() for one in lowered]
    assert [collectives(text) for text in texts] == [[]] * 3
    assert all("mosaic_gpu" in text for text in texts)


def test_the_sum_of_what_a_text_has() -> None:
    """By hand: 3 layers of 2 all-reduces of 4 x 8 numbers of 2 bytes, and of 5 tokens at first."""
    shape = dataclasses.replace(
        SHAPES["llama-8b"], num_layers=3, hidden_size=8, vocab_size=6, num_q_heads=8
    )
    mixed = Bucket(5, 4, 8, is_decode=False)
    rows = 5 + (2 + 2) * 5 + 2 * 4  # embeddings, two layers of all tokens, one of the last ones
    assert least(shape, "bfloat16", mixed, 2) == (
        Exchanges("all-gather", 1, 4 * 6 * 4),
        Exchanges("all-reduce", 7, rows * 8 * 2),
    )
    assert least(shape, "float32", mixed, 2, deterministic=True)[1].num_bytes == 7 * 5 * 8 * 4
    assert least(shape, "bfloat16", mixed, 4) == (
        Exchanges("all-gather", 1, 4 * 8 * 4),
        Exchanges("all-reduce", 6, (rows - 5) * 8 * 2),
    )
    assert least(shape, "bfloat16", mixed, 1) == ()
