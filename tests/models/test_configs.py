import dataclasses
import json
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_paged.models.config import ModelConfig
from pallas_paged.models.llama import LlamaConfig
from pallas_paged.models.opt import OPTConfig
from pallas_paged.models.qwen3 import Qwen3Config
from pallas_paged.models.registry import FAMILIES, config_from_hf
from pallas_paged.models.rope import Rope
from pallas_paged.models.rope_scaling import LinearRope, Llama3Rope, LongRope, YarnRope
from tests.models.references import DATA

PUBLISHED = json.loads((DATA / "published.json").read_text())
ROPES = json.loads((DATA / "ropes.json").read_text())
"""By `record_ropes.py`."""

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
OPT = {
    "architectures": ["OPTForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
QWEN = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 2}
MISTRAL = QWEN | {"architectures": ["MistralForCausalLM"]}
SLIDING = {"use_sliding_window": True, "sliding_window": 4}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ORIGINAL = "original_max_position_embeddings"
LLAMA3 |= {ORIGINAL: 32, "rope_type": "llama3"}
LONGROPE = {"type": "longrope", ORIGINAL: 32}
LONGROPE |= {"short_factor": [1, 1, 2, 2], "long_factor": [1, 2, 3, 4]}


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        (LLAMA, [None, None]),
        (OPT, [None, None]),
        (MISTRAL | {"sliding_window": 6}, [6, 6]),
        (QWEN | SLIDING | {"max_window_layers": 1}, [None, 4]),
    ],
    ids=["llama", "opt", "mistral", "qwen2"],
)
def test_each_layer_says_what_it_keeps(fields, windows):
    config = config_from_hf(fields)
    specs = config.cache_specs(16, jnp.int8)
    assert [spec.sliding_window for spec in specs] == windows
    assert config.first_layers(1).cache_specs(16, jnp.int8) == specs[:1]
    for spec in specs:
        cache = spec.shapes(7)
        assert cache.k.shape == cache.v.shape == (7, config.num_kv_heads, 16, config.head_dim)
        assert cache.k.dtype == jnp.int8
        assert cache.k_scale is not None


def num_parameters(config: ModelConfig) -> int:
    build = FAMILIES[config.architecture].model
    model = nnx.eval_shape(lambda: build(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    return sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(model)))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_number_of_parameters(name, caplog):
    published = PUBLISHED[name]
    with caplog.at_level(logging.WARNING):
        config = config_from_hf(published["config"])
    assert not caplog.records
    first, second = (
        num_parameters(config_from_hf(published["config"] | {"num_hidden_layers": n}))
        for n in (1, 2)
    )
    expected = published["num_parameters"]
    assert first + (config.num_layers - 1) * (second - first) == expected


def test_published_fields_are_read():
    llama32 = config_from_hf(PUBLISHED["llama-3.2-3b"]["config"])
    assert llama32 == LlamaConfig(
        vocab_size=128256,
        hidden_size=3072,
        intermediate_size=8192,
        num_layers=28,
        num_q_heads=24,
        num_kv_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope=Llama3Rope(
            rope_theta=500000.0,
            factor=32.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
        tie_word_embeddings=True,
        checkpoint_dtype="bfloat16",
    )
    opt350m = config_from_hf(PUBLISHED["opt-350m"]["config"])
    assert opt350m == OPTConfig(
        vocab_size=50272,
        hidden_size=1024,
        ffn_dim=4096,
        word_embed_proj_dim=512,
        num_layers=24,
        num_q_heads=16,
        num_kv_heads=16,
        head_dim=64,
        max_position_embeddings=2048,
        do_layer_norm_before=False,
        tie_word_embeddings=True,
        checkpoint_dtype="float16",
    )
    assert config_from_hf(PUBLISHED["llama-7b"]["config"]).num_kv_heads == 32
    qwen3 = config_from_hf(PUBLISHED["qwen3-0.6b"]["config"])
    assert qwen3 == Qwen3Config(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_layers=28,
        num_q_heads=16,
        num_kv_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rope=Rope(rope_theta=1000000.0),
        qk_norm=True,
        sliding_windows=(None,) * 28,
        tie_word_embeddings=True,
        checkpoint_dtype="bfloat16",
    )
    qwen2 = config_from_hf(PUBLISHED["qwen2.5-7b"]["config"])
    assert (qwen2.qkv_bias, qwen2.output_bias, qwen2.head_dim) == (True, False, 128)
    assert set(qwen2.sliding_windows) == {None}
    mistral = config_from_hf(PUBLISHED["mistral-7b-v0.1"]["config"])
    assert (mistral.head_dim, mistral.sliding_windows) == (128, (4096,) * 32)
    nemo = config_from_hf(PUBLISHED["mistral-nemo-12b"]["config"])
    assert (nemo.head_dim, nemo.num_q_heads, set(nemo.sliding_windows)) == (128, 32, {None})


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({}, (None, None)),
        ({"use_sliding_window": True}, (None, None)),  # from layer 28 on
        ({"use_sliding_window": True, "max_window_layers": 0}, (4096, 4096)),
        (
            {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
            (None, 9),
        ),
        (
            {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
            (None, None),
        ),
        ({"sliding_window": 9, "max_window_layers": 0}, (None, None)),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 9,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            (9, None),
        ),
    ],
)
@pytest.mark.parametrize("family", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_sliding_windows_of_qwen(family, fields, windows):
    assert config_from_hf(QWEN | {"architectures": [family]} | fields).sliding_windows == windows


@pytest.mark.parametrize(
    ("fields", "windows"),
    [({}, (4096, 4096)), ({"sliding_window": None}, (None, None)), ({"sliding_window": 3}, (3, 3))],
)
def test_sliding_windows_of_mistral(fields, windows):
    assert config_from_hf(MISTRAL | fields).sliding_windows == windows


def test_qwen3_heads_have_128_dimensions_where_no_field_says_so():
    assert config_from_hf(QWEN | {"architectures": ["Qwen3ForCausalLM"]}).head_dim == 128
    assert config_from_hf(QWEN).head_dim == 8


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, Rope(rope_theta=10000.0)),
        ({"rope_theta": 500}, Rope(rope_theta=500.0)),
        ({"rope_scaling": None, "rope_theta": 7.0}, Rope(rope_theta=7.0)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, Rope(rope_theta=7.0)),
        ({"rope_parameters": {"rope_theta": 7.0}, "rope_theta": 9.0}, Rope(rope_theta=7.0)),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, LinearRope(factor=2.0)),
        (
            {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0}},
            LinearRope(factor=2.0),
        ),
        (
            {"rope_scaling": LLAMA3, "rope_theta": 5.0},
            Llama3Rope(
                rope_theta=5.0,
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=32,
            ),
        ),
        (
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 5.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 32,
                    "attention_factor": 1.5,
                    "mscale": None,
                    "finetuned": True,
                }
            },
            YarnRope(
                rope_theta=5.0,
                factor=4.0,
                original_max_position_embeddings=32,
                attention_factor=1.5,
            ),
        ),
    ],
)
def test_rope_in_both_spellings(fields, expected):
    assert config_from_hf(LLAMA | fields).rope == expected


@pytest.mark.parametrize(
    ("base", "fields", "message"),
    [
        (LLAMA, {"architectures": None}, "architectures=None .* only LlamaForCausalLM, OPTFor"),
        (LLAMA, {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "model_type='gpt2'"),
        (LLAMA, {"vocab_size": None}, "no 'vocab_size'"),
        (LLAMA, {"hidden_size": "32"}, "hidden_size='32' must be of type int"),
        (LLAMA, {"num_hidden_layers": True}, "num_hidden_layers=True must be of type int"),
        (LLAMA, {"num_hidden_layers": 0}, "num_layers=0 must be positive"),
        (LLAMA, {"num_key_value_heads": 3}, "num_q_heads=4 must be divisible by num_kv_heads=3"),
        (LLAMA, {"num_attention_heads": 5}, "hidden_size=32 must be a multiple of"),
        (LLAMA, {"head_dim": 7}, "head_dim=7 must be even"),
        (LLAMA, {"rms_norm_eps": 0.0}, "rms_norm_eps=0.0 must be positive"),
        (LLAMA, {"rms_norm_eps": 10**400}, "rms_norm_eps has 10+, which is no finite number of 32"),
        (LLAMA, {"num_hidden_layers": 10**400}, "num_hidden_layers=10+ must be at most 2147483647"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only silu"),
        (LLAMA, {"attention_bias": 1}, "attention_bias=1 must be of type bool"),
        (LLAMA, {"pretraining_tp": 2}, "pretraining_tp=2 is not supported, only 1"),
        (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config=.* is not supported"),
        (LLAMA, {"torch_dtype": "int8"}, "torch_dtype='int8' is not supported, only float32 or"),
        (LLAMA, {"dtype": "float64"}, "dtype='float64' is not supported"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        (LLAMA, {"rope_theta": -1.0}, "rope_theta=-1.0 must be positive"),
        (LLAMA, {"rope_scaling": "linear"}, "rope_scaling='linear' must be of type dict"),
        (
            LLAMA,
            {"rope_scaling": {"rope_type": "proportional", "factor": 2.0}},
            "rope_scaling: rope_type='proportional' is not supported, only default or linear or",
        ),
        (
            LLAMA,
            {"rope_scaling": {"type": "dynamic", "alpha": 2.0}},
            "rope_scaling has no 'factor'",
        ),
        (
            LLAMA,
            {"rope_scaling": {"type": "dynamic", "factor": 2.0, ORIGINAL: 32}},
            "original_max_position_embeddings=32 is not supported, only 64",
        ),
        (
            LLAMA,
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "head_dim": 2},
            "head_dim=2 must be at least 4 for rope type 'dynamic'",
        ),
        (
            LLAMA,
            {"rope_scaling": LONGROPE | {"long_factor": [1.0] * 3}},
            r"long_factor has 3 numbers, but heads have 4 pairs \(head_dim=8\)",
        ),
        (LLAMA, {"rope_scaling": LONGROPE | {"long_factor": None}}, "has no 'long_factor'"),
        (
            LLAMA,
            {"rope_scaling": LONGROPE | {"short_factor": [1, 2, True, 3]}},
            "short_factor has True, which is no finite number",
        ),
        (
            LLAMA,
            {"rope_scaling": LONGROPE | {"short_factor": [1, 2, 0, 3]}},
            r"short_factor=\(1.0, 2.0, 0.0, 3.0\) must be positive",
        ),
        (
            LLAMA,
            {"rope_scaling": LONGROPE | {ORIGINAL: 1}},
            "original_max_position_embeddings=1 must be more than 1",
        ),
        (
            LLAMA,
            {"rope_scaling": {"type": "linear", "factor": math.inf}},
            "factor has inf, which is no finite number",
        ),
        (
            LLAMA,
            {"rope_scaling": {"type": "linear", "factor": 1e308}},
            r"factor has 1e\+308, which is no finite number of 32 bits",
        ),
        (
            LLAMA,
            {"rope_scaling": {"type": "yarn", "factor": 2.0}, "rope_theta": 1.0},
            "rope_theta=1.0 must be more than 1 for YaRN",
        ),
        (LLAMA, {"rope_scaling": {"type": "su"}}, "rope_scaling: type='su' is not supported"),
        (LLAMA, {"rope_scaling": {"type": "linear"}}, "rope_scaling has no 'factor'"),
        (
            LLAMA,
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 3.0}},
            "beta_fast not supported with rope type 'linear'",
        ),
        (
            LLAMA,
            {"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default"}},
            "remove one of them",
        ),
        (
            LLAMA,
            {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}},
            "low_freq_factor=4.0 must lie",
        ),
        (
            LLAMA,
            {
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 2.0,
                    "original_max_position_embeddings": 32,
                    "short_mscale": 1.0,
                }
            },
            "short_mscale not supported with rope type 'yarn'",
        ),
        (LLAMA, {"layer_types": ["sliding_attention"] * 2}, "'sliding_attention', which is not su"),
        (OPT, {"layer_types": ["full_attention"]}, "layer_types has 1 entries for num_hidden_la"),
        (QWEN, {"layer_types": ["full_attention"]}, "layer_types has 1 entries for num_hidden_la"),
        (QWEN, {"layer_types": ["linear_attention"] * 2}, "layer_types has 'linear_attention'"),
        (
            QWEN,
            {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4},
            "layer_types has 'sliding_attention', but use_sliding_window is false or",
        ),
        (QWEN, SLIDING | {"sliding_window": 0, "max_window_layers": 0}, "must be positive, or Non"),
        (QWEN, {"hidden_act": "relu"}, "hidden_act='relu' is not supported, only silu"),
        (MISTRAL, {"sliding_window": -1}, "must be positive, or None for no limit"),
        (MISTRAL, {"sliding_window": 1.5}, "sliding_window=1.5 must be of type int"),
        (MISTRAL, {"layer_types": ["full_attention"] * 2}, "only sliding_attention"),
        (
            MISTRAL,
            {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": None},
            "layer_types has 'sliding_attention', which is not supported, only full_attention",
        ),
        (OPT, {"ffn_dim": None}, "no 'ffn_dim'"),
        (OPT, {"ffn_dim": -1}, "ffn_dim=-1 must be positive"),
        (OPT, {"activation_function": "silu"}, "activation_function='silu' is not supported, only"),
        (OPT, {"do_layer_norm_before": "yes"}, "do_layer_norm_before='yes' must be of type bool"),
        (OPT, {"num_attention_heads": 3}, "hidden_size=32 must be a multiple of"),
        (OPT, {"is_encoder_decoder": True}, "is_encoder_decoder=True is not supported"),
    ],
)
def test_refused_by_name(base, fields, message):
    config_from_hf(base)
    with pytest.raises(ValueError, match=message):
        config_from_hf(base | fields)


def test_fields_that_nobody_reads_are_reported(caplog):
    with caplog.at_level(logging.WARNING):
        config_from_hf(LLAMA | {"window": 3, "use_cache": False, "head_dim": None, "other": None})
    assert [record.getMessage() for record in caplog.records] == [
        "config.json: ignoring fields that no model here uses: window"
    ]


def test_configs_are_checked_when_built_and_frozen():
    config = config_from_hf(OPT)
    with pytest.raises(ValueError, match="activation_function='tanh'"):
        dataclasses.replace(config, activation_function="tanh")
    with pytest.raises(ValueError, match="checkpoint_dtype='int4'"):
        dataclasses.replace(config, checkpoint_dtype="int4")
    with pytest.raises(ValueError, match="must have one entry for each of the 2 layers"):
        dataclasses.replace(config_from_hf(QWEN), sliding_windows=(3,))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 3


@pytest.mark.parametrize(
    ("rope_scaling", "longest"),
    [
        ({"type": "default"}, 64),
        (LLAMA3, 64),  # max_position_embeddings is scaled already
        (LONGROPE, 64),
        (LONGROPE | {"factor": 8.0}, 64),
        ({"type": "linear", "factor": 4}, 256),
        ({"type": "dynamic", "factor": 2.5}, 160),
        ({"type": "yarn", "factor": 4.0}, 256),
        ({"type": "yarn", "factor": 4.0, ORIGINAL: 32}, 128),
        ({"type": "yarn", "factor": 1.51, ORIGINAL: 31}, 46),
        ({"type": "yarn", "factor": None, ORIGINAL: 32}, 64),
    ],
)
def test_longest_sequences_are_those_of_vllm(rope_scaling, longest):
    """The rule in its `_get_and_verify_max_len`."""
    config = config_from_hf(LLAMA | {"rope_scaling": rope_scaling})
    assert (config.max_model_len, config.max_position_embeddings) == (longest, 64)


def test_longest_sequences_of_published_models():
    fields = PUBLISHED["qwen2.5-7b"]["config"]
    assert config_from_hf(fields).max_model_len == 32768
    yarn = {"type": "yarn", "factor": 4.0, ORIGINAL: 32768}
    assert config_from_hf(fields | {"rope_scaling": yarn}).max_model_len == 131072
    qwen3 = PUBLISHED["qwen3-0.6b"]["config"] | {"rope_scaling": yarn}
    assert config_from_hf(qwen3).max_model_len == 131072  # its max_position_embeddings is 40960
    assert config_from_hf(PUBLISHED["llama-3.2-3b"]["config"]).max_model_len == 131072
    assert config_from_hf(OPT).max_model_len == 2048


@pytest.mark.parametrize("name", ROPES)
def test_angles_are_those_of_transformers(name):
    recorded = ROPES[name]
    config = config_from_hf(recorded["config"])
    if recorded["seq_len"] is not None:
        config = config.for_length(recorded["seq_len"])
    angles = config.rope.inv_freq(config.head_dim)
    np.testing.assert_allclose(angles, recorded["inv_freq"], rtol=1e-6)
    assert config.rope.magnitude == pytest.approx(recorded["attention_factor"], rel=1e-12)
    assert recorded["seq_len"] in (None, config.max_model_len)


def test_longrope_chooses_by_the_longest_length():
    config = config_from_hf(LLAMA | {"rope_scaling": LONGROPE})
    assert (config.default_max_model_len, config.max_model_len) == (32, 64)
    assert config.rope == config_from_hf(LLAMA | {"rope_scaling": LONGROPE}).rope
    long, short = (config.for_length(n).rope for n in (33, 32))
    assert isinstance(long, LongRope)
    np.testing.assert_array_equal(config.rope.inv_freq(8), short.inv_freq(8))
    np.testing.assert_allclose(Rope().inv_freq(8) / long.inv_freq(8), [1, 2, 3, 4], rtol=1e-6)
    np.testing.assert_allclose(Rope().inv_freq(8) / short.inv_freq(8), [1, 1, 2, 2], rtol=1e-6)


def test_dynamic_scaling_is_of_the_longest_length():
    """What transformers computes for a sequence of that length; nothing up to the original one."""
    config = config_from_hf(LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 4.0}})
    plain = Rope().inv_freq(8)
    assert config.default_max_model_len == config.max_model_len == 256
    np.testing.assert_array_equal(config.for_length(64).rope.inv_freq(8), plain)
    np.testing.assert_array_equal(config.for_length(256).rope.inv_freq(8), config.rope.inv_freq(8))
    assert config.for_length(128).rope.inv_freq(8)[-1] > config.rope.inv_freq(8)[-1]


def test_rope_scalings():
    plain = Rope().inv_freq(64)
    np.testing.assert_allclose(LinearRope(factor=4.0).inv_freq(64), plain / 4, rtol=1e-6)
    yarn = YarnRope(factor=4.0, original_max_position_embeddings=128).inv_freq(64)
    assert yarn[0] == plain[0]
    np.testing.assert_allclose(yarn[-1], plain[-1] / 4, rtol=1e-6)
    assert YarnRope(factor=1.0, original_max_position_embeddings=128).magnitude == 1.0
    assert YarnRope(factor=math.e, original_max_position_embeddings=128).magnitude == 1.1
