"""An engine runs where its placement says, with the same tokens, whatever its steps need."""

import jax
import pytest
from flax import nnx

from pallas_paged.deviceless import target_device as described_device
from pallas_paged.engine import SamplingParams
from pallas_paged.engine.build import Built, build
from pallas_paged.engine.config import EngineConfig
from pallas_paged.engine.device.placement import DEFAULT_DEVICE, Placement
from pallas_paged.engine.engine import Engine
from tests.engine.bigram_model import run
from tests.engine.serving import reference_requests
from tests.models.references import DATA

NAME = "llama-gqa-llama3"
PROMPTS = [p["prompt_token_ids"] for p in reference_requests(NAME)[:6]]
PARAMS = [
    SamplingParams(
        max_tokens=16,
        ignore_eos=True,
        seed=row,
        temperature=row % 2,
        presence_penalty=row % 3 / 2,
        logprobs=row % 2,
        prompt_logprobs=0 if row == 2 else None,
    )
    for row in range(len(PROMPTS))
]


def engine_on(placement: Placement | None, num_devices: int = 1) -> Built:
    """Returns an engine with one shape of steps, whose pool is so small that groups are swapped."""
    config = EngineConfig(
        str(DATA / NAME),
        num_blocks=26,
        block_size=4,
        max_num_seqs=8,
        max_num_batched_tokens=32,
        swap_space=0.01,
        preemption_mode="swap",
        deterministic=True,
        seed=0,
        tensor_parallel_size=num_devices,
        compilation_cache_dir=None,
    )
    return build(config, placement)


def tokens_of(built: Built) -> list[list[int]]:
    outputs = run(Engine(built.parts), PROMPTS, PARAMS)
    assert any(output.metrics.num_preemptions for output in outputs), "nothing was swapped"
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return tokens_of(engine_on(None))


@pytest.mark.parametrize("devices", [slice(1, 2), slice(0, 2)], ids=["the second", "both"])
def test_an_engine_runs_on_the_devices_of_its_placement(
    devices: slice, expected: list[list[int]]
) -> None:
    mine = set(jax.devices()[devices])
    built = engine_on(Placement.on(*jax.devices()[devices]), len(mine))
    assert tokens_of(built) == expected
    runner = built.runner
    on_each = runner.rows, runner.row_state
    for array in jax.tree.leaves((on_each, runner.kv_caches, runner.programs.params)):
        assert array.devices() == mine
    assert all(array.sharding.is_fully_replicated for array in jax.tree.leaves(on_each))


def test_one_device_is_not_part_of_the_programs() -> None:
    """What was compiled for one card, here or without it, is found for another."""
    built = engine_on(Placement.on(jax.devices()[1]))
    bucket = built.runner.buckets.all()[0]
    there = built.runner.programs.lower(bucket).as_text()
    assert engine_on(None).runner.programs.lower(bucket).as_text() == there
    assert "sharding" not in there


def test_the_default_device_is_asked_for_when_it_is_needed() -> None:
    device = described_device("h100")
    with jax.default_device(device):
        assert DEFAULT_DEVICE.device == device
        assert DEFAULT_DEVICE.inputs.device_set == {device}
    assert DEFAULT_DEVICE.device == jax.devices()[0]


def test_parameters_that_lie_there_are_not_copied() -> None:
    param = nnx.Param(jax.numpy.ones(8))
    put = Placement.on(jax.devices()[0]).put_parameters({"p": param})["p"]
    assert put[...].unsafe_buffer_pointer() == param[...].unsafe_buffer_pointer()


def test_processes_with_gpus_share_no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, cpu = Placement.on(described_device("h100")), Placement.on(jax.devices()[0])
    assert gpu.compiler_options == cpu.compiler_options == {}
    monkeypatch.setattr(Placement, "is_local", False)
    assert gpu.compiler_options == {"xla_gpu_shard_autotuning": False}  # by XLA's own name
    assert cpu.compiler_options == {}
    jax.jit(jax.numpy.sin).lower(1.0).compile(compiler_options=dict(gpu.compiler_options))
