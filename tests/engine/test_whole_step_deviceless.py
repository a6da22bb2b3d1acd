"""Whole steps of models in their published widths, compiled for GPUs: memory and launches.

Two layers stand for all: layers are unrolled, and what a further one adds is what the second added.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_paged.deviceless import (
    compile_lowered,
    target_device,
    target_memory_bytes,
    without_compilation_cache,
)
from pallas_paged.engine.config import EngineConfig
from pallas_paged.engine.core.buckets import Bucket
from pallas_paged.engine.core.grammar import NUM_MASKS
from pallas_paged.engine.device.implementations import (
    choose_attention,
    choose_writes,
    resolve_kv_cache_dtype,
)
from pallas_paged.engine.device.programs import StepPrograms
from pallas_paged.engine.device.step_report import SHAPES, StepReport, compile_step
from pallas_paged.models import abstract_model
from pallas_paged.models.decoder import DecoderConfig
from pallas_paged.models.llama import LlamaConfig
from pallas_paged.models.qwen2 import Qwen2Config
from pallas_paged.models.qwen3 import Qwen3Config

DECODE = Bucket(64, 64, 128, is_decode=True)
UNFILTERED = dataclasses.replace(DECODE, filters=False)
MIXED = Bucket(512, 64, 128, is_decode=False)
STATE = [("new_row_state", 64), ("edit_rows", 64), ("edit_masks", NUM_MASKS)]
SHARING = dataclasses.replace(DECODE, shares_prefix=True)
PROMPTS = Bucket(512, 8, 128, is_decode=False, has_decodes=False)


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
    return compile_step(shape, config, bucket, target, num_blocks=4000)


def check_in_place(step: StepReport) -> None:
    assert step.moves == ()
    assert step.in_place_bytes >= step.cache_bytes


def check_one_command_buffer(step: StepReport) -> None:
    """One launch of the host for the whole step, and nothing that the host would look at first.

    A sort is one instruction and more launches than one.
    """
    launches, schedule = step.launches, step.schedule
    assert launches.loops == ()
    assert schedule.outside == ()
    (held,) = schedule.command_buffers
    assert {*held} == {*launches.kernels, *launches.products, *launches.others}


def test_what_a_layer_adds_to_a_decode_step() -> None:
    """Its launches, listed, and no memory but its cache's."""
    one, two = (report("llama-8b", n, UNFILTERED, "h100", vocab_size=1152) for n in (1, 2))
    for step in (one, two):
        check_in_place(step)
        check_one_command_buffer(step)
    assert two.cache_bytes == 2 * one.cache_bytes
    assert two.temporary_bytes < 100 << 20 < two.cache_bytes
    assert two.temporary_bytes <= 1.1 * one.temporary_bytes
    # 4 matrix products, two of which add their result to what went into the layer; 2 norms, the
    # gate; the rotation with the write, the attention and its merge. What plans the attention is
    # not among them: layers share it.
    added = two.launches.total - one.launches.total
    assert added <= 10, (added, two.launches)
    assert one.launches.total <= 34, one.launches
    assert len(two.launches.products) - len(one.launches.products) == 4
    assert not any("gemm" in name for name in two.launches.products)  # all of them are cuBLAS's
    assert len(one.launches.kernels) == 3
    assert len(two.launches.kernels) == 6


@pytest.mark.parametrize(("mode", "filters"), [("raw", False), ("processed", True)])
def test_what_the_logprobs_of_tokens_add_to_a_decode_step(mode: str, filters: bool) -> None:
    bucket = dataclasses.replace(DECODE, filters=filters)
    options = {"vocab_size": 1152, "logprobs_mode": mode}
    plain = report("llama-8b", 1, bucket, "h100", **options)
    step = report("llama-8b", 1, dataclasses.replace(bucket, has_logprobs=True), "h100", **options)
    check_in_place(step)
    check_one_command_buffer(step)
    added = step.launches.total - plain.launches.total
    assert added <= 3, (added, step.launches)


@pytest.mark.parametrize(
    ("config", "changes", "most"),
    [
        # The norms of queries and of keys, and the rotation with them: XLA's own, in one launch
        # less than where a kernel rotates what two have normed.
        (Qwen3Config, {"qk_norm": True}, 12),
        # The bias, in the shape of the product, and queries padded to what the tensor cores take.
        (
            Qwen2Config,
            {"qkv_bias": True, "num_q_heads": 28, "num_kv_heads": 4, "hidden_size": 3584},
            12,
        ),
        # As many as with the rows' own scales.
        (LlamaConfig, {"kv_cache_dtype": "float8_e4m3fn"}, 10),
    ],
    ids=["qwen3", "qwen2", "llama-static-scales"],
)
@pytest.mark.slow
def test_what_a_layer_of_another_model_adds(
    config: type[DecoderConfig],
    changes: dict[str, Any],
    most: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ("hidden_size", "intermediate_size", "num_q_heads", "num_kv_heads", "head_dim")
    names += ("num_layers", "vocab_size", "max_position_embeddings")
    fields = {name: getattr(SHAPES["llama-8b"], name) for name in names} | changes
    monkeypatch.setitem(SHAPES, "other", config(**fields))
    one, two = (report("other", n, UNFILTERED, "h100", vocab_size=1152) for n in (1, 2))
    check_in_place(two)
    check_one_command_buffer(two)
    added = two.launches.total - one.launches.total
    assert added <= most, (added, two.launches)


@pytest.mark.parametrize(
    ("name", "bucket", "kv_cache_dtype", "num_kernels", "most_launches"),
    [
        # As above.
        pytest.param("llama-8b", UNFILTERED, "fp8", 6, 24 + 2 * 10, marks=pytest.mark.slow),
        # The attention is in two parts, of which the last layer, where only last tokens attend, has
        # one. Top-k and top-p are searched.
        ("llama-8b", MIXED, "auto", 7, 95 + 2 * 10),
        pytest.param("opt-13b", MIXED, "auto", 7, 95 + 2 * 10, marks=pytest.mark.slow),
        # In each layer decode and merge once more; the queries side by side, weights and the sum.
        ("llama-8b", SHARING, "auto", 10, 90 + 2 * 15),
        # Without decode: two kernels less in the first layer, and a plan more for the last one.
        ("llama-8b", PROMPTS, "auto", 5, 100 + 2 * 10 - 2),
    ],
    ids=["llama-decode-fp8", "llama-mixed", "opt-mixed", "llama-sharing", "llama-prompts"],
)
def test_two_layers_in_place_with_few_launches(
    name: str, bucket: Bucket, kv_cache_dtype: str, num_kernels: int, most_launches: int
) -> None:
    """What a step launches whatever its layers are, and twice what one of these does.

    Of the former, two write into the block tables and read the rows of the batch; some take the
    last tokens' rows for the last layer's attention, which has a plan of its own.
    """
    step = report(name, 2, bucket, "h100", vocab_size=1152, kv_cache_dtype=kv_cache_dtype)
    check_in_place(step)
    check_one_command_buffer(step)
    assert step.temporary_bytes < 100 << 20 < step.cache_bytes
    assert len(step.launches.kernels) == num_kernels, step.launches.kernels
    assert step.launches.total <= most_launches, step.launches


@pytest.mark.parametrize(
    ("bucket", "kv_cache_dtype"),
    [
        (DECODE, "auto"),
        (dataclasses.replace(DECODE, is_full=True), "auto"),
        pytest.param(dataclasses.replace(DECODE, is_full=True), "fp8", marks=pytest.mark.slow),
        pytest.param(dataclasses.replace(MIXED, is_full=True), "auto", marks=pytest.mark.slow),
    ],
    ids=["sampled", "full", "full-fp8", "full-mixed"],
)
def test_a_step_that_samples_is_one_command_buffer(bucket: Bucket, kv_cache_dtype: str) -> None:
    """With the whole vocabulary: what searches it must not have become a loop."""
    step = report("llama-8b", 1, bucket, "h100", kv_cache_dtype=kv_cache_dtype)
    check_in_place(step)
    check_one_command_buffer(step)


@pytest.mark.parametrize("num_drafts", [0, 3])
def test_no_program_for_a_gpu_waits_for_the_host(num_drafts: int) -> None:
    """Several steps in a program are as many turns as the bucket says; drafts, no loop at all."""
    bucket = dataclasses.replace(UNFILTERED, num_steps=4)
    if num_drafts:
        bucket = Bucket(32, 8, 128, is_decode=False, num_drafts=num_drafts)
    programs = one_layer_programs()
    with jax.default_device(target_device("h100")), without_compilation_cache():
        lowered = [programs.lower(name) for name in (bucket, *programs.others([]), *STATE)]
        device = target_device("h100")
        texts = [compile_lowered(program, device).as_text() for program in lowered]
    assert not any("conditional(" in text for text in texts)
    loops = [line for text in texts for line in text.splitlines() if " while(" in line]
    assert len(loops) == (not num_drafts)
    assert all('"known_trip_count":{"n":"4"' in line for line in loops), loops


def report_small(target: str, bucket: Bucket, kv_cache_dtype: str) -> StepReport:
    """Of one layer."""
    options = {"vocab_size": 1152, "kv_cache_dtype": kv_cache_dtype}
    return report("llama-8b", 1, bucket, target, **options)


@pytest.mark.parametrize(
    ("target", "bucket", "kv_cache_dtype", "num_kernels"),
    [
        pytest.param("a100-40gb", MIXED, "auto", 3, marks=pytest.mark.slow),
        ("l4", DECODE, "fp8", 3),
        pytest.param("l4", MIXED, "auto", 3, marks=pytest.mark.slow),
        # The write, into float8, is XLA's.
        pytest.param("a10", DECODE, "fp8", 2, marks=pytest.mark.slow),
        pytest.param("a10", MIXED, "int8", 3, marks=pytest.mark.slow),
        pytest.param("b200", DECODE, "auto", 3, marks=pytest.mark.slow),
        pytest.param("b200", MIXED, "fp8", 3, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_step_of_one_kernel(
    in_process_for: Callable[..., StepReport],
    target: str,
    bucket: Bucket,
    kv_cache_dtype: str,
    num_kernels: int,
) -> None:
    """In its layer the write, the attention of all sequences in one launch, and its merge."""
    step = in_process_for(target, report_small, target, bucket, kv_cache_dtype)
    check_in_place(step)
    check_one_command_buffer(step)
    assert step.temporary_bytes < 100 << 20 < step.cache_bytes
    assert len(step.launches.kernels) == num_kernels, step.launches.kernels


@pytest.mark.parametrize(
    ("target", "kv_cache_dtype", "writes"),
    [
        ("a10", "auto", "mosaic_gpu"),
        ("rtx3090", "fp8", "xla"),
        ("rtx3090", "int8", "mosaic_gpu"),
        ("l4", "fp8", "mosaic_gpu"),
        ("l40s", "auto", "mosaic_gpu"),
        ("rtx4090", "int8", "mosaic_gpu"),
        ("b200", "fp8", "mosaic_gpu"),
    ],
)
def test_what_runs_where_nobody_names_it(target: str, kv_cache_dtype: str, writes: str) -> None:
    shape, dtype = SHAPES["llama-8b"], jnp.dtype("bfloat16")
    config = EngineConfig("llama-8b", kv_cache_dtype=kv_cache_dtype)
    cache_dtype = resolve_kv_cache_dtype(config, dtype, shape, "gpu")
    specs = shape.cache_specs(config.block_size, cache_dtype)
    with jax.default_device(target_device(target)):
        assert choose_attention(config, shape, dtype, specs) == "mosaic_gpu"
        assert choose_writes(config, dtype, specs) == writes


@pytest.mark.slow
def test_a_pool_that_fills_the_memory_makes_no_step_compute_twice() -> None:
    """XLA would save temporaries, as if weights and caches were too large by mistake."""
    shape = dataclasses.replace(SHAPES["llama-8b"], num_layers=1, vocab_size=1152)
    num_blocks = target_memory_bytes("h100") * 9 // 10 // (64 << 10)
    caches = tuple(spec.shapes(num_blocks) for spec in shape.cache_specs(16, jnp.bfloat16))
    programs = StepPrograms(abstract_model(shape, "bfloat16"), caches, 64, 512, 32)
    with jax.default_device(target_device("h100")), without_compilation_cache():
        lowered = programs.lower(Bucket(8, 8, 128, is_decode=True))
        text = compile_lowered(lowered, target_device("h100")).as_text()
    assert "remat" not in text


def one_layer_programs(*implementations: str) -> StepPrograms:
    shape = dataclasses.replace(SHAPES["llama-8b"], num_layers=1, vocab_size=256)
    model = abstract_model(shape, "bfloat16")
    caches = tuple(spec.shapes(4000) for spec in shape.cache_specs(16, jnp.bfloat16))
    return StepPrograms(model, caches, 64, 512, 32, *implementations)


def num_kernels(cache_implementation: str) -> int:
    """Returns how many kernels of ours a step of one layer has, as it goes to the compiler."""
    programs = one_layer_programs("xla", cache_implementation)
    with jax.default_device(target_device("h100")):
        text = programs.lower(Bucket(8, 8, 128, is_decode=True)).as_text()
    return len(re.findall(r"custom_call @mosaic_gpu", text))


def test_a_named_implementation_is_what_runs() -> None:
    assert [num_kernels(name) for name in ("xla", "mosaic_gpu")] == [0, 1]
