"""Named shapes for models without a checkpoint: what a benchmark needs of a model is its sizes."""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from safetensors.numpy import save_file


def _llama(
    hidden_size: int,
    num_layers: int,
    heads: str,
    intermediate_size: int,
    vocab_size: int,
    max_position_embeddings: int,
    dtype: str,
    **fields: Any,
) -> dict[str, Any]:
    num_q_heads, num_kv_heads = map(int, heads.split("/"))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_q_heads,
        "num_key_value_heads": num_kv_heads,
        "max_position_embeddings": max_position_embeddings,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "dtype": dtype,
    } | fields


CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": _llama(32, 2, "4/2", 64, 300, 256, "float32"),
    "20m": _llama(384, 8, "6/2", 1024, 4096, 2048, "float32"),
    "100m": _llama(768, 12, "12/4", 2048, 16384, 2048, "float32"),
    "smollm2": _llama(
        576, 30, "9/3", 1536, 49152, 8192, "float32", rope_theta=100000.0, tie_word_embeddings=True
    ),
    "8b": _llama(4096, 32, "32/8", 14336, 128256, 8192, "bfloat16", rope_theta=500000.0),
}
"""What `config.json` holds, by name: Llamas; the last two like SmolLM2 135M and Llama 3 8B."""


def write_config(name: str, folder: pathlib.Path) -> None:
    """Writes the `config.json` of a named shape, all that `LLM(load_format="dummy")` reads.

    Raises:
      ValueError: there is no such shape.
    """
    if name not in CONFIGS:
        raise ValueError(f"random_model={name!r} must be one of {', '.join(CONFIGS)}")
    (folder / "config.json").write_text(json.dumps(CONFIGS[name], indent=2) + "\n")


def write_checkpoint(name: str, folder: pathlib.Path, seed: int) -> None:
    """Writes a Hugging Face folder with random float32 weights of a named shape, without tokenizer.

    `config.json` names no EOS, so that every engine generates what it is asked for. Weights are
    normal, each matrix scaled by its inputs; such models go on to say new things when they are
    greedy, and their logits are as far apart as those of trained ones.

    Raises:
      ValueError: there is no such shape.
    """
    write_config(name, folder)
    config = CONFIGS[name] | {"dtype": "float32"}
    config |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    rng = np.random.default_rng(seed)
    tensors = {}
    for tensor, shape in _llama_shapes(config):
        if len(shape) == 1:
            tensors[tensor] = np.ones(shape, np.float32)
        else:
            scale = np.float32(_scale(tensor, shape))
            tensors[tensor] = scale * rng.standard_normal(shape, np.float32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _llama_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields names and shapes of a Llama's tensors."""
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    vocab = (config["vocab_size"], hidden)
    yield "model.embed_tokens.weight", vocab
    for layer in range(config["num_hidden_layers"]):
        of_layer = f"model.layers.{layer}"
        yield f"{of_layer}.input_layernorm.weight", (hidden,)
        yield f"{of_layer}.post_attention_layernorm.weight", (hidden,)
        for part, rows in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
            yield f"{of_layer}.self_attn.{part}_proj.weight", (rows, hidden)
        yield f"{of_layer}.mlp.gate_proj.weight", (wide, hidden)
        yield f"{of_layer}.mlp.up_proj.weight", (wide, hidden)
        yield f"{of_layer}.mlp.down_proj.weight", (hidden, wide)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", vocab


def _scale(tensor: str, shape: tuple[int, ...]) -> float:
    """Returns the standard deviation of a matrix's weights."""
    scale = shape[1] ** -0.5
    return {"lm_head.weight": 2 * scale, "model.embed_tokens.weight": 2 * scale}.get(tensor, scale)
