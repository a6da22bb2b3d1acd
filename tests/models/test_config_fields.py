"""Fields that are absent, null or at a value that changes nothing mean what they do elsewhere.

The fields and their defaults are those of transformers' own classes, which need no torch.
"""

import dataclasses
import json
import logging
from typing import Any

import pytest
import transformers

from pallas_paged.models.config import ModelConfig
from pallas_paged.models.decoder import DecoderConfig
from pallas_paged.models.opt import OPTConfig
from pallas_paged.models.registry import config_from_hf

FAMILIES = {
    "LlamaForCausalLM": transformers.LlamaConfig,
    "MistralForCausalLM": transformers.MistralConfig,
    "Qwen2ForCausalLM": transformers.Qwen2Config,
    "Qwen3ForCausalLM": transformers.Qwen3Config,
    "OPTForCausalLM": transformers.OPTConfig,
}
SIZES = {"vocab_size", "hidden_size", "intermediate_size", "ffn_dim"}
SIZES |= {"num_hidden_layers", "num_attention_heads"}
"""A file has these: transformers would take those of some model of the family."""


def default_fields(family: str) -> dict[str, Any]:
    """Returns a `config.json` with every field that the family has in transformers."""
    fields = json.loads(FAMILIES[family]().to_json_string(use_diff=False))
    return fields | {"architectures": [family]}


def variants(family: str) -> list[tuple[str, dict[str, Any]]]:
    """Returns files in which one field is absent or null, with what tells them apart."""
    fields = default_fields(family)
    found = [("every field at its default", fields)]
    for field in dataclasses.fields(FAMILIES[family]):
        found.append((f"{field.name} null", fields | {field.name: None}))
        if field.name not in SIZES:
            absent = {name: value for name, value in fields.items() if name != field.name}
            found.append((f"{field.name} absent", absent))
    sizes = {name: fields[name] for name in fields if name in SIZES}
    return [*found, ("sizes only", sizes | {"architectures": [family]})]


def meaning_of_ours(config: ModelConfig) -> dict[str, Any]:
    """Returns what both have, by transformers' names."""
    meaning = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_q_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    if isinstance(config, OPTConfig):
        names = ("ffn_dim", "word_embed_proj_dim", "activation_function", "do_layer_norm_before")
        names += ("enable_bias", "layer_norm_elementwise_affine")
        meaning |= {name: getattr(config, name) for name in names}
        return meaning | {"_remove_final_layer_norm": config.remove_final_layer_norm}
    assert isinstance(config, DecoderConfig)
    return meaning | {
        "intermediate_size": config.intermediate_size,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_type": config.rope.rope_type,
        "rope_theta": config.rope.rope_theta,
        "attention_bias": config.output_bias,
        "mlp_bias": config.mlp_bias,
        "windows": [config.sliding_window(layer) for layer in range(config.num_layers)],
    }


def meaning_of_theirs(config: Any, names: Any) -> dict[str, Any]:
    """Returns the same of transformers' object; what a family lacks there it has not."""
    derived = {
        "head_dim": getattr(config, "head_dim", config.hidden_size // config.num_attention_heads),
        "attention_bias": getattr(config, "attention_bias", False),
        "mlp_bias": getattr(config, "mlp_bias", False),
        "windows": windows_of_theirs(config),
        **(getattr(config, "rope_parameters", None) or {}),
    }
    return {name: derived[name] if name in derived else getattr(config, name) for name in names}


def windows_of_theirs(config: Any) -> list[int | None]:
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in types]


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_null_and_default_fields_mean_what_they_do_in_transformers(family, caplog):
    compared = 0
    for name, fields in variants(family):
        try:
            theirs = FAMILIES[family](**json.loads(json.dumps(fields)))
        except Exception:
            continue  # transformers itself refuses it
        with caplog.at_level(logging.WARNING):
            ours = meaning_of_ours(config_from_hf(fields))
        assert ours == meaning_of_theirs(theirs, ours), name
        assert not caplog.records, name
        compared += 1
    assert compared > len(dataclasses.fields(FAMILIES[family]))


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_required(family):
    fields = default_fields(family)
    for size in SIZES & fields.keys():
        with pytest.raises(ValueError, match=f"config.json has no '{size}'"):
            config_from_hf({name: value for name, value in fields.items() if name != size})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "neutral",
    [
        {"rope_scaling": None},
        {"rope_scaling": {}},
        {"rope_parameters": {}},
        {"rope_parameters": {}, "rope_scaling": {"type": "default"}},
        {"rope_scaling": {"type": "default", "factor": None}},
        {"rope_scaling": {"type": "mrope", "rope_type": "default"}},
        {"rope_theta": None},
        {"partial_rotary_factor": 1.0},
        {"partial_rotary_factor": None},
        {"quantization_config": None},
        {"quantization_config": {}},
        {"pruned_heads": {}},
        {"add_cross_attention": False},
        {"torch_dtype": "auto"},
        {"dtype": None, "torch_dtype": None},
        {"use_sliding_window": False, "sliding_window": None},
        {"architectures": None},
        {"architectures": []},
        {"original_max_position_embeddings": 2048},
        {"full": True},
    ],
    ids=str,
)
def test_values_that_change_nothing(family, neutral):
    fields = default_fields(family) | ({"sliding_window": None} if "Mistral" in family else {})
    fields.pop("rope_parameters", None)
    expected = config_from_hf(fields)
    if "full" in neutral:
        neutral = {"layer_types": ["full_attention"] * expected.num_layers}
    assert config_from_hf(fields | neutral) == expected


def test_two_names_of_one_activation():
    fields = default_fields("LlamaForCausalLM")
    assert config_from_hf(fields | {"hidden_act": "swish"}) == config_from_hf(fields)


def test_mistrals_window_in_every_layer_may_be_said_twice():
    fields = default_fields("MistralForCausalLM")
    types = {"layer_types": ["sliding_attention"] * 32}
    assert config_from_hf(fields | types) == config_from_hf(fields)


def test_the_new_name_of_the_dtype_comes_first():
    fields = default_fields("LlamaForCausalLM") | {"dtype": "bfloat16", "torch_dtype": "float32"}
    assert config_from_hf(fields).checkpoint_dtype == "bfloat16"
    assert config_from_hf(fields | {"dtype": None}).checkpoint_dtype == "float32"
