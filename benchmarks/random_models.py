"""Named shapes for models without a checkpoint: what a benchmark needs of a model is its sizes."""

import json
import pathlib
from typing import Any


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
    "20m": _llama(384, 8, "6/2", 1024, 4096, 4096, "float32"),
    "100m": _llama(768, 12, "12/4", 2048, 16384, 4096, "float32"),
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
