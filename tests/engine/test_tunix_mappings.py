"""Tunix's models without Tunix: made-up ones with the names and layouts of its classes.

That these are Tunix's own, `tests/with_tunix` holds.
"""

import dataclasses
import logging
import re
import types
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import load_file

from pallas_paged.engine import LLM, SamplingParams
from pallas_paged.engine.tunix_mappings import config_of, dtype_of, mapping_of
from pallas_paged.models import load_config
from pallas_paged.models.demo import DEMO_MODEL
from pallas_paged.models.given import GivenArrays
from pallas_paged.models.llama import LlamaConfig
from pallas_paged.models.matching import abstract_parameters
from pallas_paged.models.qwen2 import Qwen2Config
from pallas_paged.models.qwen3 import Qwen3Config
from pallas_paged.models.tensors import places

SOURCE = """
def apply_rope(inputs, positions, head_dim, rope_theta=1_000_000):
    return inputs

class Attention:
    def block(self, x):
        return apply_rope(x, 0, head_dim=2{theta})

class {name}:
    def __init__(self, config, embedding):
        self.config = config
        self.embedder = types.SimpleNamespace(input_embedding=embedding)
        self.layers = [types.SimpleNamespace(attn=Attention())]

    def __call__(self, x):
        return {call}
"""
"""As `tunix.models.*.model` is: Llama 3 and Qwen 3 leave `apply_rope` its default theta."""


@dataclasses.dataclass
class Config:
    """Of Tunix's, by whose fields its models are read."""

    num_layers: int = 3
    vocab_size: int = 64
    embed_dim: int = 32
    hidden_dim: int = 48
    num_heads: int = 4
    head_dim: int = 8
    num_kv_heads: int = 2
    rope_theta: int = 10000
    norm_eps: float = 1e-5


@dataclasses.dataclass
class LlamaFields(Config):
    weight_tying: bool = False


@dataclasses.dataclass
class QwenFields(Config):
    use_tied_embedding: bool = False
    num_experts: int | None = None
    dtype: Any = jnp.bfloat16


FAMILIES: Mapping[str, tuple[str, type[Config], str]] = {
    "llama": ("llama3.model.Llama3", LlamaFields, "x"),
    "qwen2": ("qwen2.model.Qwen2", QwenFields, "self.config.rope_theta"),
    "qwen3": ("qwen3.model.Qwen3", QwenFields, "x"),
}


def make_model(family: str, *, passes_theta: bool = False, **fields: Any) -> Any:
    path, config, call = FAMILIES[family]
    module, _, name = path.rpartition(".")
    theta = ", rope_theta=self.config.rope_theta" if passes_theta else ""
    scope = {"__name__": f"tunix.models.{module}", "types": types}
    exec(SOURCE.format(name=name, call=call, theta=theta), scope)
    kind: Any = scope[name]
    return kind(config(**fields), np.zeros((2, 2), np.float32))


def to_tunix(name: str, tensor: np.ndarray, config: Any) -> tuple[str, np.ndarray]:
    """Returns a tensor of a checkpoint as Tunix's loaders have it: permuted, then reshaped.

    See `_get_key_and_transform_mapping` in `tunix/models/*/params.py`.
    """
    heads = {"q": config.num_heads, "k": config.num_kv_heads, "v": config.num_kv_heads}
    whole = {
        "model.embed_tokens.weight": ("embedder.input_embedding", tensor),
        "model.norm.weight": ("final_norm.w", tensor),
        "lm_head.weight": ("lm_head.w", tensor.T),
    }
    if name in whole:
        return whole[name]
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    parts = rest.split(".")
    if len(parts) == 2:
        return f"layers.{layer}.{parts[0]}.w", tensor
    part, projection, kind = parts
    if part == "mlp":
        return f"layers.{layer}.mlp.{projection}.kernel", tensor.T
    if kind == "bias":
        return f"layers.{layer}.attn.{projection[0]}_bias", tensor
    if projection.endswith("norm"):
        return f"layers.{layer}.attn.{projection}.w", tensor
    if projection == "o_proj":
        value = tensor.T.reshape(config.num_heads, config.head_dim, config.embed_dim)
    else:
        value = tensor.T.reshape(config.embed_dim, heads[projection[0]], config.head_dim)
    return f"layers.{layer}.attn.{projection}.w", value


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_all_tensors_of_a_checkpoint_come_back(family: str, is_tied: bool) -> None:
    field = "weight_tying" if family == "llama" else "use_tied_embedding"
    model = make_model(family, **{field: is_tied})
    _, abstract = abstract_parameters(config_of(model, 128), jnp.float32)
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.random(place.shape, np.float32) for name, place in places(abstract).items()
    }
    state = dict(to_tunix(name, tensor, model.config) for name, tensor in tensors.items())
    assert ("lm_head.w" in state) is not is_tied
    mapping = mapping_of(model)
    assert {re.sub(r"\.\d+\.", ".*.", name) for name in state} == mapping.keys()
    given = GivenArrays(state, mapping).given
    assert given.keys() == tensors.keys()
    for name, one in given.items():
        value = one.array if one.transform is None else one.transform(one.array)
        np.testing.assert_array_equal(value, tensors[name], err_msg=name)


def test_a_model_in_tunixs_layout_serves_and_is_updated() -> None:
    shape = load_config(DEMO_MODEL)
    fields = {
        "num_layers": shape.num_layers,
        "embed_dim": shape.hidden_size,
        "num_heads": shape.num_q_heads,
        "num_kv_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "weight_tying": True,
    }
    model = make_model("llama", **fields)
    tensors = load_file(DEMO_MODEL / "model.safetensors")
    state = dict(
        to_tunix(name, np.asarray(tensor, np.float32), model.config)
        for name, tensor in tensors.items()
    )
    options = {"dtype": "float32", "max_num_seqs": 4, "num_blocks": 30, "max_model_len": 64}
    llm = LLM.from_model(
        shape, DEMO_MODEL, state=state, mapping=mapping_of(model), eos_token_ids=[1], **options
    )
    params = SamplingParams(temperature=0, max_tokens=12)

    def text(llm: LLM) -> str | None:
        return llm.generate("def main():", params, use_tqdm=False)[0].outputs[0].text

    expected = text(LLM(str(DEMO_MODEL), **options))
    assert text(llm) == expected
    other = {name: tensor[::-1] for name, tensor in state.items()}
    llm.update_weights(other, mapping_of(model))
    assert text(llm) != expected
    llm.update_weights(state, mapping_of(model))
    assert text(llm) == expected


@pytest.mark.parametrize("passes_theta", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_angles_are_those_that_the_model_turns_by(
    family: str, passes_theta: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model(family, passes_theta=passes_theta)
    with caplog.at_level(logging.WARNING):
        shape = config_of(model, 128)
    assert shape.rope.rope_theta == (10000.0 if passes_theta else 1e6)
    assert bool(caplog.records) is not passes_theta
    for record in caplog.records:
        assert "rope_theta=1000000, whatever its configuration says (10000)" in record.message


def test_the_shapes_of_the_families() -> None:
    llama = config_of(make_model("llama", weight_tying=True), 100)
    qwen2 = config_of(make_model("qwen2"), 100)
    qwen3 = config_of(make_model("qwen3", rope_theta=1_000_000), 100)
    assert isinstance(llama, LlamaConfig)
    assert isinstance(qwen2, Qwen2Config)
    assert isinstance(qwen3, Qwen3Config)
    assert (llama.tie_word_embeddings, qwen2.tie_word_embeddings) == (True, False)
    assert (llama.qkv_bias, qwen2.qkv_bias, qwen3.qkv_bias) == (False, True, False)
    assert (llama.qk_norm, qwen2.qk_norm, qwen3.qk_norm) == (False, False, True)
    assert (qwen2.rope.rope_theta, qwen3.rope.rope_theta) == (10000.0, 1e6)
    assert (llama.rms_norm_eps, llama.max_position_embeddings) == (1e-5, 100)
    assert (llama.hidden_size, llama.intermediate_size, llama.head_dim) == (32, 48, 8)
    assert (llama.num_layers, llama.num_q_heads, llama.num_kv_heads) == (3, 4, 2)


def test_what_it_computes_in() -> None:
    assert dtype_of(make_model("llama")) == jnp.float32
    assert dtype_of(make_model("qwen2")) == jnp.bfloat16


def test_models_that_are_not_known_are_refused() -> None:
    for function in (mapping_of, lambda model: config_of(model, 100)):
        with pytest.raises(NotImplementedError, match=r"Llama3.*pass config= and mapping="):
            function(Config())
    with pytest.raises(NotImplementedError, match="num_experts=8"):
        config_of(make_model("qwen3", num_experts=8), 100)
