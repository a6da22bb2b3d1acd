"""Records what compressed-tensors computes with static scales for the KV cache.

Run once, in an environment with torch, transformers and compressed-tensors, from the repository's
root:

    python tests/models/record_kv_scales.py

Of the checkpoint `llama-gqa-llama3` in `data/`: `kv_scales.json` has for each kind of scales the
`quantization_config` and the tensors that llm-compressor writes, `kv_scales.npz` a prompt and the
logits of its tokens. Each scale is half of what would hold the largest number, so that some do not
fit.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationStatus,
    apply_quantization_config,
)

DATA = Path(__file__).parent / "data"
LARGEST = {"float": 448.0, "int": 127.0}


def load() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        DATA / "llama-gqa-llama3", dtype=torch.float32
    ).eval()


def largest_by_head(model: Any, prompt: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Returns, by layer, the largest magnitude of each KV head's keys and values."""
    layers = model(prompt, use_cache=True).past_key_values.layers
    return [
        {name: x.abs().amax((0, 2, 3)) for name, x in (("k", layer.keys), ("v", layer.values))}
        for layer in layers
    ]


@torch.no_grad()
def main() -> None:
    prompt = torch.from_numpy(np.random.default_rng(0).integers(3, 160, (1, 40)))
    model = load()
    largest = largest_by_head(model, prompt)
    described: dict[str, Any] = {}
    arrays = {"prompt": prompt[0].numpy().astype(np.int32), "exact": model(prompt).logits[0]}
    for type_ in ("float", "int"):
        for strategy in ("tensor", "attn_head"):
            scheme = QuantizationArgs(num_bits=8, type=type_, symmetric=True, strategy=strategy)
            config = QuantizationConfig(config_groups={}, kv_cache_scheme=scheme)
            model = load()
            apply_quantization_config(model, config)
            for layer, of_heads in zip(model.model.layers, largest, strict=True):
                attention = layer.self_attn
                for name, scale in (("k", attention.k_scale), ("v", attention.v_scale)):
                    amax = of_heads[name] if strategy == "attn_head" else of_heads[name].max()
                    scale.data[:] = (amax / LARGEST[type_] / 2).reshape(scale.shape)
                attention.quantization_status = QuantizationStatus.FROZEN
            described[f"{type_} {strategy}"] = {
                "quantization_config": config.model_dump(mode="json"),
                "tensors": {
                    name: tensor.tolist()
                    for name, tensor in model.named_parameters()
                    if name.endswith(("_scale", "_zero_point"))
                },
            }
            arrays[f"{type_} {strategy}"] = model(prompt).logits[0]
    (DATA / "kv_scales.json").write_text(json.dumps(described, indent=1) + "\n")
    np.savez_compressed(DATA / "kv_scales.npz", **{k: np.asarray(v) for k, v in arrays.items()})


if __name__ == "__main__":
    main()
