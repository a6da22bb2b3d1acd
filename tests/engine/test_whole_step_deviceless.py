"""Whole steps of models in their published widths, compiled for GPUs: memory and launches.

Two layers stand for all: layers are unrolled, and what a further one adds is what the second added.
"""

import dataclasses
from collections.abc import Callable

import pytest

from pallas_paged.engine.buckets import Bucket
from pallas_paged.engine.config import EngineConfig
from pallas_paged.engine.step_report import SHAPES, StepReport, compile_step

DECODE = Bucket(64, 64, is_decode=True)
MIXED = Bucket(512, 64, is_decode=False)


def report(
    name: str,
    num_layers: int,
    bucket: Bucket,
    target: str,
    vocab_size: int | None = None,
    **options: str,
) -> StepReport:
    shape = dataclasses.replace(SHAPES[name], num_layers=num_layers)
    if vocab_size is not None:
        shape = dataclasses.replace(shape, vocab_size=vocab_size)
    config = EngineConfig(name, dtype="bfloat16", **options)
    return compile_step(shape, config, bucket, target, num_blocks=4000, max_model_len=2048)


@pytest.mark.parametrize(
    ("name", "bucket", "target", "most_launches"),
    [
        # 5 matrix products, the write, the attention and its merge, 2 norms, 2 sums, rotations of
        # q and k, the values' cast, the gate. What plans the attention is not among them: layers
        # share it.
        ("llama-8b", DECODE, "h100", 16),
        # The same without rotations, with biases, and the attention in two parts.
        ("opt-13b", MIXED, "h100", 15),
    ],
    ids=["llama-decode", "opt-mixed"],
)
def test_a_step_in_place_with_few_launches(
    name: str, bucket: Bucket, target: str, most_launches: int
) -> None:
    one, two = (report(name, n, bucket, target) for n in (1, 2))
    assert two.num_cache_copies == 0
    assert two.in_place_bytes >= two.cache_bytes
    assert two.cache_bytes == 2 * one.cache_bytes
    assert two.temporary_bytes < 100 << 20 < two.cache_bytes
    assert two.temporary_bytes <= 1.5 * one.temporary_bytes
    written = [len(step.launches.kernels) for step in (one, two)]
    assert written[1] == 2 * written[0] >= 2, two.launches.kernels
    assert not any("while" in loop for loop in two.launches.loops), two.launches.loops
    added = two.launches.total - one.launches.total
    assert added <= most_launches, (added, two.launches)


def test_a_mixed_step_on_an_a100(in_sm80_process: Callable[..., StepReport]) -> None:
    """In its layer the write, the attention of all sequences in one launch, and its merge."""
    step = in_sm80_process(report, "llama-8b", 1, MIXED, "a100-40gb")
    assert step.num_cache_copies == 0
    assert step.in_place_bytes >= step.cache_bytes
    assert step.temporary_bytes < 150 << 20 < step.cache_bytes
    assert len(step.launches.kernels) == 3, step.launches.kernels


def test_a_named_implementation_is_what_runs() -> None:
    names = {
        cache: report(
            "llama-8b",
            1,
            Bucket(8, 8, is_decode=True),
            "h100",
            vocab_size=256,
            attention_implementation="xla",
            cache_implementation=cache,
        ).launches.kernels
        for cache in ("xla", "mosaic_gpu")
    }
    assert names["xla"] == ()
    assert len(names["mosaic_gpu"]) == 1
