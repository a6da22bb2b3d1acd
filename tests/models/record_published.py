"""Counts the parameters of the published sizes with transformers' own modules.

Run once, in an environment with torch and transformers, from the repository's root:

    python tests/models/record_published.py

Writes `data/published.json`: by model name, the fields of its config.json and the number of its
parameters. The fields that give a shape are those of the published config.json files; no weights
are made.
"""

import json
from pathlib import Path
from typing import Any

import torch
import transformers


def opt(hidden_size: int, layers: int, heads: int, **options: Any) -> dict[str, Any]:
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "activation_function": "relu",
        "attention_dropout": 0.0,
        "bos_token_id": 2,
        "do_layer_norm_before": True,
        "dropout": 0.1,
        "eos_token_id": 2,
        "ffn_dim": 4 * hidden_size,
        "hidden_size": hidden_size,
        "init_std": 0.02,
        "layerdrop": 0.0,
        "max_position_embeddings": 2048,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "pad_token_id": 1,
        "prefix": "</s>",
        "torch_dtype": "float16",
        "use_cache": True,
        "vocab_size": 50272,
        "word_embed_proj_dim": hidden_size,
        **options,
    }


def llama(
    hidden_size: int, intermediate_size: int, layers: int, heads: int, **options: Any
) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": intermediate_size,
        "max_position_embeddings": 2048,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "use_cache": True,
        "vocab_size": 32000,
        **options,
    }


def llama2(*sizes: int, **options: Any) -> dict[str, Any]:
    new = {"max_position_embeddings": 4096, "pretraining_tp": 1, "rope_scaling": None}
    return llama(*sizes, **new, **options)


def llama3(*sizes: int, **options: Any) -> dict[str, Any]:
    new = {"max_position_embeddings": 8192, "rope_theta": 500000.0, "num_key_value_heads": 8}
    new |= {"attention_bias": False, "torch_dtype": "bfloat16", "vocab_size": 128256}
    return llama(*sizes, **new | options)


def llama31(*sizes: int, factor: float = 8.0, **options: Any) -> dict[str, Any]:
    scaling = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192, "rope_type": "llama3"}
    new = {"max_position_embeddings": 131072, "mlp_bias": False, "rope_scaling": scaling}
    new |= {"eos_token_id": [128001, 128008, 128009]}
    return llama3(*sizes, **new | options)


def qwen2(
    hidden_size: int, intermediate_size: int, layers: int, heads: int, kv_heads: int, **options: Any
) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": intermediate_size,
        "max_position_embeddings": 32768,
        "max_window_layers": layers,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
        **options,
    }


def qwen3(
    hidden_size: int, intermediate_size: int, layers: int, heads: int, kv_heads: int, **options: Any
) -> dict[str, Any]:
    new = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128}
    new |= {"attention_bias": False, "max_position_embeddings": 40960, "rope_scaling": None}
    new |= {"sliding_window": None}
    return qwen2(hidden_size, intermediate_size, layers, heads, kv_heads, **new | options)


def mistral(hidden_size: int, intermediate_size: int, layers: int, **options: Any) -> Any:
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": intermediate_size,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 32768,
        **options,
    }


PUBLISHED = {
    "opt-125m": opt(768, 12, 12),
    "opt-350m": opt(1024, 24, 16, do_layer_norm_before=False, word_embed_proj_dim=512),
    "opt-1.3b": opt(2048, 24, 32),
    "opt-2.7b": opt(2560, 32, 32),
    "opt-6.7b": opt(4096, 32, 32),
    "opt-13b": opt(5120, 40, 40),
    "opt-30b": opt(7168, 48, 56),
    "opt-66b": opt(9216, 64, 72),
    "opt-175b": opt(12288, 96, 96),
    "llama-7b": llama(4096, 11008, 32, 32, rms_norm_eps=1e-6),
    "llama-13b": llama(5120, 13824, 40, 40, rms_norm_eps=1e-6),
    "llama-30b": llama(6656, 17920, 60, 52, rms_norm_eps=1e-6),
    "llama-65b": llama(8192, 22016, 80, 64),
    "llama-2-7b": llama2(4096, 11008, 32, 32),
    "llama-2-13b": llama2(5120, 13824, 40, 40),
    "llama-2-70b": llama2(8192, 28672, 80, 64, num_key_value_heads=8),
    "llama-3-8b": llama3(4096, 14336, 32, 32),
    "llama-3-70b": llama3(8192, 28672, 80, 64),
    "llama-3.1-8b": llama31(4096, 14336, 32, 32),
    "llama-3.1-405b": llama31(16384, 53248, 126, 128),
    "llama-3.2-1b": llama31(2048, 8192, 16, 32, factor=32.0, head_dim=64, tie_word_embeddings=True),
    "llama-3.2-3b": llama31(
        3072, 8192, 28, 24, factor=32.0, head_dim=128, tie_word_embeddings=True
    ),
    "qwen2.5-0.5b": qwen2(896, 4864, 24, 14, 2, tie_word_embeddings=True),
    "qwen2.5-1.5b": qwen2(1536, 8960, 28, 12, 2, tie_word_embeddings=True),
    "qwen2.5-3b": qwen2(2048, 11008, 36, 16, 2, tie_word_embeddings=True),
    "qwen2.5-7b": qwen2(3584, 18944, 28, 28, 4, vocab_size=152064),
    "qwen2.5-14b": qwen2(5120, 13824, 48, 40, 8, vocab_size=152064),
    "qwen2.5-32b": qwen2(5120, 27648, 64, 40, 8, vocab_size=152064),
    "qwen2.5-72b": qwen2(8192, 29568, 80, 64, 8, vocab_size=152064),
    "qwen3-0.6b": qwen3(1024, 3072, 28, 16, 8, tie_word_embeddings=True),
    "qwen3-1.7b": qwen3(2048, 6144, 28, 16, 8, tie_word_embeddings=True),
    "qwen3-4b": qwen3(2560, 9728, 36, 32, 8, tie_word_embeddings=True),
    "qwen3-8b": qwen3(4096, 12288, 36, 32, 8),
    "qwen3-14b": qwen3(5120, 17408, 40, 40, 8),
    "qwen3-32b": qwen3(5120, 25600, 64, 64, 8),
    "mistral-7b-v0.1": mistral(
        4096, 14336, 32, rope_theta=10000.0, sliding_window=4096, vocab_size=32000
    ),
    "mistral-7b-v0.3": mistral(4096, 14336, 32),
    "mistral-nemo-12b": mistral(
        5120, 14336, 40, head_dim=128, max_position_embeddings=1024000, vocab_size=131072
    ),
    "mistral-small-24b": mistral(
        5120, 32768, 40, head_dim=128, rope_theta=100000000.0, vocab_size=131072
    ),
}


def num_parameters(fields: dict[str, Any]) -> int:
    config = transformers.AutoConfig.for_model(**json.loads(json.dumps(fields)))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in model.parameters())


def main() -> None:
    recorded = {
        name: {"config": fields, "num_parameters": num_parameters(fields)}
        for name, fields in PUBLISHED.items()
    }
    for name, entry in recorded.items():
        print(f"{name:16} {entry['num_parameters']:>15,}")
    file = Path(__file__).parent / "data" / "published.json"
    file.write_text(json.dumps(recorded, indent=1) + "\n")


if __name__ == "__main__":
    main()
