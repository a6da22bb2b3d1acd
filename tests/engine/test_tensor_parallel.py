"""Devices that share a model give its tokens, and exchange no more than that takes.

The devices are simulated: eight of one CPU, see `tests/conftest.py`.
"""

import dataclasses
import json
import pathlib
from collections import Counter
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from pallas_paged.collectives import collectives
from pallas_paged.engine import (
    LLM,
    BeamSearchParams,
    RequestOutput,
    SamplingParams,
    StructuredOutputsParams,
)
from pallas_paged.engine.build import build
from pallas_paged.engine.config import EngineConfig
from pallas_paged.engine.core.buckets import Bucket
from pallas_paged.engine.device.placement import Placement
from pallas_paged.models import init_model
from pallas_paged.models.demo import DEMO_MODEL
from pallas_paged.models.tensors import tensors_of
from tests.engine.serving import (
    assert_idle,
    make_llm,
    nothing_compiles,
    reference_requests,
    same_tokens,
)
from tests.models.references import DATA, load_reference

GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
SAMPLED = dataclasses.replace(GREEDY, temperature=1.0, top_p=0.9, seed=3)
LIMITS = {"max_num_seqs": 8, "max_num_batched_tokens": 32, "block_size": 4}


def tokens_of(outputs: list[RequestOutput]) -> list[list[tuple[int, ...]]]:
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


@pytest.mark.parametrize(
    ("name", "num_devices"),
    [
        ("llama-gqa-llama3", 2),
        ("llama-mha-tied", 4),
        ("llama-mqa-linear", 2),  # one KV head, on both
        ("llama-mqa-linear", 4),
        ("mistral-sliding", 2),
        ("qwen2-sliding", 2),  # biases of queries, keys and values
        ("qwen3-tied", 2),  # norms of queries and keys
        ("opt-prenorm", 4),  # biases behind sums
        ("opt-postnorm-projected", 2),
    ],
)
def test_devices_give_transformers_tokens(name: str, num_devices: int) -> None:
    llm = make_llm(name, tensor_parallel_size=num_devices, **LIMITS)
    outputs = llm.generate(reference_requests(name)[:12], GREEDY, use_tqdm=False)
    assert_idle(llm)
    reference = load_reference(name)
    tokens = [output.outputs[0].token_ids for output in outputs]
    same_tokens(tokens, reference.greedy[:12], reference.margins[:12])


SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 300,  # no multiple of eight
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "dtype": "float32",
}


@pytest.fixture(scope="module", params=[300, 304], ids=["vocabulary whole", "divided"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: Any) -> pathlib.Path:
    """Returns a checkpoint of random weights with two KV heads for sixteen query heads."""
    folder = tmp_path_factory.mktemp("random")
    (folder / "config.json").write_text(json.dumps(SHAPE | {"vocab_size": request.param}))
    tensors = tensors_of(nnx.state(init_model(folder, seed=1)))
    values = {name: np.asarray(value) for name, value in tensors.items()}
    # Random weights are as good as sure of nothing: spread what they say.
    values["lm_head.weight"] = values["lm_head.weight"] * 20
    safetensors.numpy.save_file(values, folder / "model.safetensors")
    return folder


def test_one_two_four_and_eight_devices_give_the_same_tokens(folder: pathlib.Path) -> None:
    prompts = [
        {"prompt_token_ids": np.random.default_rng(i).integers(2, 300, 5 + 3 * i).tolist()}
        for i in range(8)
    ]
    params = dataclasses.replace(GREEDY, logprobs=2)
    found: dict[int, list[RequestOutput]] = {}
    for num_devices in (1, 2, 4, 8):
        llm = LLM(
            folder,
            tensor_parallel_size=num_devices,
            num_blocks=100,
            compilation_cache_dir=None,
            background_compilation=False,
            **LIMITS,
        )
        found[num_devices] = llm.generate(prompts, params, use_tqdm=False)
        assert_idle(llm)
    expected = [output.outputs[0] for output in found[1]]
    values = [
        [sorted((at.logprob for at in place.values()), reverse=True)[:2] for place in one.logprobs]
        for one in expected
        if one.logprobs is not None
    ]
    margins = np.array(values)
    wanted = np.array([one.token_ids for one in expected])
    assert len({tuple(row) for row in wanted.tolist()}) == len(prompts)
    for outputs in found.values():
        same_tokens(
            [output.outputs[0].token_ids for output in outputs],
            wanted,
            margins[..., 0] - margins[..., 1],
        )


@pytest.fixture(scope="module")
def whole() -> LLM:
    return make_llm("llama-gqa-llama3", num_blocks=200, **LIMITS)


def mixed_requests() -> tuple[list[dict[str, list[int]]], list[Any]]:
    """Returns prompts and parameters, of which some share a prefix."""
    short = [p for p in reference_requests("llama-gqa-llama3") if len(p["prompt_token_ids"]) <= 16]
    kinds: list[Any] = [
        GREEDY,
        SAMPLED,
        dataclasses.replace(SAMPLED, n=3),
        BeamSearchParams(3, 12, ignore_eos=True),
        dataclasses.replace(GREEDY, presence_penalty=0.5, logprobs=3, prompt_logprobs=1),
        dataclasses.replace(SAMPLED, logprobs=0),
        dataclasses.replace(SAMPLED, repetition_penalty=1.2, logit_bias={7: 2.0}, min_tokens=4),
    ]
    prefix = list(range(5, 17))
    prompts = [
        {"prompt_token_ids": [*prefix, 20 + i]} if i % 3 == 0 else short[i % len(short)]
        for i in range(21)
    ]
    return prompts, [kinds[i % len(kinds)] for i in range(21)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_blocks": 22, "preemption_mode": "recompute"},
        {"num_blocks": 22, "preemption_mode": "swap", "swap_space": 0.01},
        {"kv_cache_dtype": "int8"},
        {"num_scheduler_steps": 1, "enable_prefix_caching": False, "async_scheduling": False},
        {"deterministic": True},
        {"logprobs_mode": "processed"},
    ],
    ids=["plain", "recompute", "swap", "int8", "single steps", "deterministic", "processed"],
)
def test_whatever_requests_need(whole: LLM, options: dict[str, Any]) -> None:
    prompts, params = mixed_requests()
    reference = whole
    if options.keys() & {"kv_cache_dtype", "logprobs_mode"}:
        reference = make_llm("llama-gqa-llama3", num_blocks=200, **LIMITS | options)
    llm = make_llm(
        "llama-gqa-llama3",
        tensor_parallel_size=2,
        **{"num_blocks": 200, "swap_space": 0} | LIMITS | options,
    )
    outputs = llm.generate(prompts, params, use_tqdm=False)
    expected = reference.generate(prompts, params, use_tqdm=False)
    assert tokens_of(outputs) == tokens_of(expected)
    for mine, theirs in zip(outputs, expected, strict=True):
        if mine.prompt_logprobs is None:
            continue
        for one, other in zip(mine.prompt_logprobs, theirs.prompt_logprobs or (), strict=True):
            assert (one is None) == (other is None)
            for token in one or ():
                assert other is not None
                assert one[token].logprob == pytest.approx(other[token].logprob, abs=1e-4)
    assert_idle(llm)
    preempted = sum(o.metrics.num_preemptions for o in outputs if o.metrics is not None)
    assert (preempted > 0) == ("num_blocks" in options)
    assert (llm.kv_stats().num_swaps > 0) == ("swap_space" in options)
    hits = llm.kv_stats().num_hit_tokens
    assert (hits > 0) == options.get("enable_prefix_caching", True)


def test_grammars_and_text() -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["n"],
        "additionalProperties": False,
    }
    params = SamplingParams(
        temperature=1.0,
        seed=4,
        max_tokens=30,
        structured_outputs=StructuredOutputsParams(json=schema),
    )
    texts = []
    for num_devices in (1, 4):
        llm = LLM(
            DEMO_MODEL,
            dtype="float32",
            tensor_parallel_size=num_devices,
            num_blocks=100,
            compilation_cache_dir=None,
            background_compilation=False,
            **LIMITS,
        )
        outputs = llm.generate(["x = ", "def f("], params, use_tqdm=False)
        texts.append([output.outputs[0].text for output in outputs])
    assert texts[0] == texts[1]
    assert all(0 <= json.loads(text)["n"] <= 99 for text in texts[1])


@pytest.mark.parametrize(
    "speculative_config",
    [
        {"method": "ngram", "num_speculative_tokens": 3},
        {
            "method": "draft_model",
            "model": str(DATA / "llama-mha-tied"),
            "num_speculative_tokens": 3,
        },
    ],
    ids=["ngram", "draft model"],
)
def test_guesses(speculative_config: dict[str, Any]) -> None:
    prompts = [{"prompt_token_ids": [7, 8, 9, 7, 8, 9, 7, 8]}, {"prompt_token_ids": [3, 4]}]
    found = []
    for num_devices in (1, 2):
        llm = make_llm(
            "llama-mqa-linear",
            tensor_parallel_size=num_devices,
            speculative_config=speculative_config,
            **LIMITS | {"max_model_len": 64},
        )
        found.append(tokens_of(llm.generate(prompts, [GREEDY, SAMPLED], use_tqdm=False)))
        assert_idle(llm)
    assert found[0] == found[1]


def test_each_device_has_its_share_and_nothing_compiles_later() -> None:
    llm = make_llm("llama-mqa-linear", tensor_parallel_size=4, **LIMITS)
    llm.warm_up()
    prompts, params = reference_requests("llama-mqa-linear")[:8], [GREEDY, SAMPLED] * 4
    with nothing_compiles(llm.runner):
        llm.generate(prompts, params, use_tqdm=False)
    for array in jax.tree.leaves(llm.runner.kv_caches):
        shares = [shard.data.shape for shard in array.addressable_shards]
        assert shares == [(array.shape[0], 1, *array.shape[2:])] * 4
    qkv = llm.runner.programs.params["model"]["layers"][0]["self_attn"]["qkv_proj"]["weight"]
    assert [s.data.shape for s in qkv[...].addressable_shards] == [(1, 3 * 8, 32)] * 4
    head = llm.runner.programs.params["lm_head"]["weight"]
    assert [s.data.shape for s in head[...].addressable_shards] == [(128 // 4, 32)] * 4


@pytest.mark.parametrize("name", ["llama-mqa-linear", "opt-prenorm"])
def test_a_decode_step_exchanges_two_sums_per_layer_and_the_logits(name: str) -> None:
    llm = make_llm(name, tensor_parallel_size=4, num_scheduler_steps=1, **LIMITS)
    bucket = Bucket(8, 8, llm.runner.buckets.table_widths[-1], True, False)
    text = llm.runner.programs.lower(bucket).compile().as_text()
    assert text is not None
    found = collectives(text)
    hidden, vocab = llm.model_config.hidden_size, llm.model_config.vocab_size
    count = Counter((each.kind, each.num_bytes) for each in found)
    assert count == {
        ("all-reduce", 8 * hidden * 4): 2 * llm.model_config.num_layers + 1,  # and the embedding's
        ("all-gather", 8 * vocab * 4): 1,
    }
    assert all(each.num_times == 1 for each in found)


@pytest.mark.parametrize(
    ("name", "num_devices", "message"),
    [
        ("llama-gqa-llama3", 4, "num_q_heads=6 cannot be split over 4 devices"),
        ("qwen2-tied", 2, "num_q_heads=5"),
        ("llama-gqa-llama3", 6, "intermediate_size=64 cannot be split over 6 devices"),
    ],
)
def test_what_cannot_be_divided_is_refused(name: str, num_devices: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_llm(name, tensor_parallel_size=num_devices)


def test_too_few_devices_are_refused(folder: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"needs as many devices, and JAX sees 8 .*XLA_FLAGS="):
        LLM(folder, tensor_parallel_size=16, compilation_cache_dir=None)


def test_a_placement_on_other_devices_is_refused() -> None:
    config = EngineConfig(str(DATA / "llama-mha-tied"), tensor_parallel_size=2)
    with pytest.raises(ValueError, match=r"tensor_parallel_size=2 does not go with .* 4 devices"):
        build(config, Placement.on(*jax.devices()[:4]))
