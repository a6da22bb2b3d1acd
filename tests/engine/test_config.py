"""Configuration and the size of the pool."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_paged.engine.config import DEFAULT_CPU_KV_CACHE_BYTES, EngineConfig
from pallas_paged.engine.device.implementations import resolve_kv_cache_dtype
from pallas_paged.engine.device.pool_size import plan_pool, round_num_blocks
from pallas_paged.engine.llm import LLM
from pallas_paged.engine.shape import resolve_max_model_len
from pallas_paged.models import ModelConfig
from pallas_paged.models.decoder import Decoder
from pallas_paged.models.llama import LlamaConfig


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dtype", "int8", "dtype='int8' must be one of"),
        ("load_format", "gguf", "load_format='gguf' must be one of ('auto', 'dummy')"),
        ("kv_cache_dtype", "fp8_e5m2", "kv_cache_dtype='fp8_e5m2' must be one of"),
        ("max_num_seqs", 0, "max_num_seqs=0 must be an integer >= 1"),
        ("max_num_seqs", True, "max_num_seqs=True must be an integer >= 1"),
        ("max_num_seqs", 513, "max_num_batched_tokens=512 must be at least max_num_seqs=513"),
        ("max_num_batched_tokens", 63, "max_num_batched_tokens=63 must be at least"),
        ("block_size", 0, "block_size=0 must be"),
        ("block_size", 16.0, "block_size=16.0 must be"),
        ("num_blocks", 1, "num_blocks=1 must be None or an integer >= 2"),
        ("max_model_len", 1, "max_model_len=1 must be"),
        ("gpu_memory_utilization", "0.5", "gpu_memory_utilization='0.5' must be in (0, 1]"),
        ("deterministic", "false", "deterministic='false' must be True or False"),
        ("kv_cache_memory_bytes", -1, "kv_cache_memory_bytes=-1 must be"),
        ("gpu_memory_utilization", 0, "gpu_memory_utilization=0 must be in (0, 1]"),
        ("gpu_memory_utilization", 1.1, "gpu_memory_utilization=1.1 must be in (0, 1]"),
        ("gpu_memory_utilization", float("nan"), "must be in (0, 1]"),
        ("seed", -2, "seed=-2 must be"),
        ("seed", 2**63, "seed=9223372036854775808 must be an integer from 0 to 2**63 - 1"),
        ("compilation_cache_dir", 3, "compilation_cache_dir=3 must be 'auto', the name of"),
        ("compilation_cache_dir", "", "compilation_cache_dir='' must be 'auto', the name of"),
        ("max_logprobs", -2, "max_logprobs=-2 must be an integer >= -1"),
        ("attention_implementation", "triton", "attention_implementation='triton' must be"),
        ("cache_implementation", "triton", "cache_implementation='triton' must be"),
        ("tensor_parallel_size", 0, "tensor_parallel_size=0 must be an integer >= 1"),
        ("enable_prefix_caching", 1, "enable_prefix_caching=1 must be True or False"),
        ("swap_space", -1, "swap_space=-1 must be a number of GiB >= 0"),
        ("swap_space", float("nan"), "swap_space=nan must be"),
        ("preemption_mode", "drop", "preemption_mode='drop' must be one of"),
        ("preemption_mode", "swap", "preemption_mode='swap' needs host memory; set swap_space"),
        ("scheduling_policy", "lifo", "scheduling_policy='lifo' must be one of"),
    ],
)
def test_a_wrong_field_is_refused_by_name(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        EngineConfig("model", **{field: value})
    assert message in str(error.value)


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(TypeError, match="max_sequences"):
        EngineConfig("model", max_sequences=3)


def test_the_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        EngineConfig("model").seed = 3


def test_max_model_len() -> None:
    sizes = {"vocab_size": 8, "hidden_size": 8, "num_layers": 1, "head_dim": 8}
    shape = ModelConfig(**sizes, num_q_heads=1, num_kv_heads=1, max_position_embeddings=64)
    assert resolve_max_model_len(EngineConfig("m"), shape) == 64
    assert resolve_max_model_len(EngineConfig("m", max_model_len=50), shape) == 50
    with pytest.raises(ValueError, match="max_model_len=100 is more than the 64 tokens"):
        resolve_max_model_len(EngineConfig("m", max_model_len=100), shape)


def test_names_that_users_know() -> None:
    assert EngineConfig("m", dtype="half").dtype == "float16"
    assert EngineConfig("m", dtype="float").dtype == "float32"
    assert EngineConfig("m", dtype=jnp.bfloat16).dtype == "bfloat16"  # type: ignore[arg-type]
    seeds = {EngineConfig("m", seed=seed).seed for seed in (None, -1, None, -1)}
    assert len(seeds) == 4
    for wrong in (["float16"], 16, jnp.int8):
        with pytest.raises(ValueError, match=r"dtype=.* must be one of"):
            EngineConfig("m", dtype=wrong)  # type: ignore[arg-type]


def test_types_that_a_cpu_does_not_have_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fields = {"architectures": ["LlamaForCausalLM"], "vocab_size": 32, "hidden_size": 16}
    fields |= {"intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    LLM(tmp_path, load_format="dummy", dtype="float32", num_blocks=8)
    assert not any("a CPU" in message for message in caplog.messages)
    LLM(tmp_path, load_format="dummy", dtype="half", kv_cache_dtype="fp8", num_blocks=8)
    warnings = [message for message in caplog.messages if "a CPU" in message]
    assert ["float16" in warnings[0], "float8_e4m3fn" in warnings[1]] == [True, True]


def test_a_scaled_model_takes_the_sequences_that_it_was_scaled_for(tmp_path: Path) -> None:
    fields = {"architectures": ["LlamaForCausalLM"], "vocab_size": 32, "hidden_size": 16}
    fields |= {"intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    fields |= {"max_position_embeddings": 128, "dtype": "float32"}
    fields |= {"rope_scaling": {"type": "yarn", "factor": 4.0}}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert LLM(tmp_path, load_format="dummy").max_model_len == 512
    assert LLM(tmp_path, load_format="dummy", max_model_len=500).max_model_len == 500
    with pytest.raises(ValueError, match="max_model_len=513 is more than the 512 tokens"):
        LLM(tmp_path, load_format="dummy", max_model_len=513)


def test_longrope_serves_original_lengths_unless_longer_ones_are_asked_for(tmp_path: Path) -> None:
    """As vLLM: what is asked for decides between the factors, of which short prompts need one."""
    scaling = {"type": "longrope", "original_max_position_embeddings": 32}
    scaling |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    fields = {"architectures": ["LlamaForCausalLM"], "vocab_size": 32, "hidden_size": 16}
    fields |= {"intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    fields |= {"max_position_embeddings": 128, "dtype": "float32", "rope_scaling": scaling}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    short, long = (LLM(tmp_path, load_format="dummy", max_model_len=n) for n in (None, 128))
    assert (short.max_model_len, long.max_model_len) == (32, 128)
    angles = [llm.model_config.rope.inv_freq(16) for llm in (short, long)]
    np.testing.assert_allclose(angles[0], 2 * angles[1])


def test_pool_sizes_lie_on_a_coarse_grid() -> None:
    assert [round_num_blocks(n) for n in (2, 3, 15, 16, 17, 100, 1000)] == [
        2,
        3,
        15,
        16,
        16,
        96,
        960,
    ]
    for n in range(2, 5000):
        assert n * 7 / 8 < round_num_blocks(n) <= n
    assert len({round_num_blocks(n) for n in range(1024, 2048)}) == 8


SHAPE = LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=16,
    num_layers=2,
    num_q_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_position_embeddings=4096,
)
BLOCK_BYTES = 2 * 2 * 1 * 16 * 8 * 4  # keys and values, layers, KV heads, S, D, float32


def plan(max_model_len: int = 4096, cache_dtype: str = "float32", **options: object):
    model = nnx.eval_shape(lambda: Decoder(SHAPE, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    config = EngineConfig("m", **options)
    return plan_pool(config, model, max_model_len, jnp.dtype(cache_dtype), "xla")


def test_num_blocks_wins_over_bytes() -> None:
    result = plan(num_blocks=77, kv_cache_memory_bytes=10 * BLOCK_BYTES)
    assert (result.num_blocks, result.block_bytes) == (77, BLOCK_BYTES)
    assert result.max_blocks_per_seq == 76


@pytest.mark.parametrize(("dtype", "name"), [("float8_e4m3fn", "fp8"), ("int8", "int8")])
def test_scales_count_among_a_blocks_bytes(dtype: str, name: str) -> None:
    config = EngineConfig("m", kv_cache_dtype=name, num_blocks=77)
    cache_dtype = resolve_kv_cache_dtype(config, jnp.dtype(jnp.bfloat16), SHAPE, "gpu")
    assert cache_dtype == dtype
    assert plan(cache_dtype=dtype, num_blocks=77).block_bytes == BLOCK_BYTES // 4 * (8 + 4) // 8


def test_bytes_are_an_upper_limit() -> None:
    result = plan(kv_cache_memory_bytes=100 * BLOCK_BYTES)
    assert result.num_blocks == 96


def test_the_default_on_a_cpu_is_a_stated_size() -> None:
    assert DEFAULT_CPU_KV_CACHE_BYTES <= 4 << 30
    assert plan().num_blocks == 64 * 256 + 1  # all sequences at their longest need less
    whole = round_num_blocks(DEFAULT_CPU_KV_CACHE_BYTES // BLOCK_BYTES)
    assert plan(max_num_seqs=64, max_model_len=10**9).num_blocks == whole


def test_a_pool_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match=f"a block takes {BLOCK_BYTES}"):
        plan(kv_cache_memory_bytes=BLOCK_BYTES)


def test_a_pool_larger_than_the_machine_is_refused() -> None:
    with pytest.raises(ValueError, match="choose a smaller num_blocks"):
        plan(num_blocks=10**9)


def test_the_plan_says_where_the_bytes_go() -> None:
    text = str(plan(num_blocks=77))
    assert "77 blocks of 16 tokens, 1216 tokens" in text
    assert "weights" in text
