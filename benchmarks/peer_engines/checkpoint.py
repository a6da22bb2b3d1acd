"""A checkpoint of random weights, which engines load like any other."""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from benchmarks import random_models


def write_checkpoint(name: str, folder: pathlib.Path, seed: int) -> None:
    """Writes a Hugging Face folder with random weights, for a shape in `random_models.CONFIGS`.

    It has no tokenizer, and `config.json` no EOS. Weights are float32 and normal, a matrix's scaled
    by its inputs, so that greedy outputs go on to other tokens, and few of these are near ties.
    """
    config = random_models.CONFIGS[name] | {"dtype": "float32"}
    config |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    rng = np.random.default_rng(seed)
    tensors = {}
    for tensor, shape in _llama_shapes(config):
        if len(shape) == 1:
            tensors[tensor] = np.ones(shape, np.float32)
        else:
            # Twice as much makes logits of the size that a trained model's are.
            factor = 2 if shape[0] == config["vocab_size"] else 1
            scale = np.float32(factor * shape[1] ** -0.5)
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
