"""Makes the small checkpoints in `data/` and records what transformers computes with them.

Run once, in an environment with torch, transformers and absl-py, from the repository's root:

    python tests/models/record_references.py

Every checkpoint is a Hugging Face folder with random weights, large enough for logits to have
margins, and beside them `reference.npz`, as `pallas_paged.models.record_reference` writes it.
"""

import argparse
import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

PROMPT_LENGTHS = (1, 2, 7, 15, 16, 17, 33, 48, 3, 4, 5, 8, 9, 11, 12, 14)
PROMPT_LENGTHS += (18, 20, 23, 24, 27, 30, 31, 32, 35, 40, 47, 50, 63, 64, 65, 70)
NUM_WITH_LOGITS = 8
NUM_GREEDY = 32
MAX_POSITIONS = 128
MIN_MARGIN = 1e-3

# By its path: the package itself needs jax, which this environment need not have.
_RECORDER = Path(__file__).parents[2] / "models" / "record_reference.py"
_spec = importlib.util.spec_from_file_location("record_reference", _RECORDER)
assert _spec is not None
assert _spec.loader is not None
recorder = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(recorder)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A checkpoint to make.

    Attributes:
      config: of the transformers model.
      seed: of weights and prompts.
      gain: standard deviation of a layer's output for inputs of deviation 1.
      shard_size: the most bytes in a file, None for one file.
      old_config: whether config.json is rewritten as transformers 4 wrote it.
      eos_token_id: in generation_config.json; tokens recorded here do not stop at it.
    """

    config: transformers.PretrainedConfig
    seed: int
    gain: float = 1.0
    shard_size: str | None = None
    old_config: bool = False
    eos_token_id: int | list[int] = 2


def decoder(kind: Any, **options: Any) -> Any:
    sizes = {"num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"vocab_size": 128, "hidden_size": 32, "max_position_embeddings": MAX_POSITIONS}
    return kind(**sizes | options)


def llama(**options: Any) -> transformers.LlamaConfig:
    return decoder(transformers.LlamaConfig, **options)


def qwen2(**options: Any) -> transformers.Qwen2Config:
    return decoder(transformers.Qwen2Config, **options)


def qwen3(**options: Any) -> transformers.Qwen3Config:
    return decoder(transformers.Qwen3Config, **options)


def mistral(**options: Any) -> transformers.MistralConfig:
    return decoder(transformers.MistralConfig, **options)


def opt(**options: Any) -> transformers.OPTConfig:
    sizes = {"num_attention_heads": 4, "ffn_dim": 64, "num_hidden_layers": 2}
    sizes |= {"vocab_size": 128, "hidden_size": 32, "max_position_embeddings": MAX_POSITIONS}
    return transformers.OPTConfig(**sizes | options)


VARIANTS = {
    "llama-mha-tied": Variant(llama(tie_word_embeddings=True), seed=103, gain=1.5),
    "llama-gqa-llama3": Variant(
        llama(
            vocab_size=160,
            hidden_size=48,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=16,
            attention_bias=True,
            mlp_bias=True,
            rms_norm_eps=1e-3,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        ),
        seed=12,
        gain=1.5,
        shard_size="100KB",
        old_config=True,
        eos_token_id=[2, 3],
    ),
    "llama-mqa-linear": Variant(
        llama(
            num_key_value_heads=1,
            rope_parameters={"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0},
        ),
        seed=13,
        gain=1.5,
    ),
    "llama-yarn": Variant(
        llama(
            num_key_value_heads=2,
            head_dim=16,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 1000.0,
                "factor": 4.0,
                "beta_fast": 8.0,
                "original_max_position_embeddings": 32,
            },
        ),
        seed=24,
        gain=1.5,
    ),
    "opt-prenorm": Variant(opt(), seed=103, gain=2.0),
    "opt-postnorm-projected": Variant(
        opt(do_layer_norm_before=False, word_embed_proj_dim=16),
        seed=104,
        gain=1.5,
        shard_size="60KB",
    ),
    "opt-gelu-plain": Variant(
        opt(
            activation_function="gelu",
            enable_bias=False,
            layer_norm_elementwise_affine=False,
            tie_word_embeddings=False,
            _remove_final_layer_norm=True,
        ),
        seed=103,
    ),
    "qwen2-tied": Variant(
        qwen2(
            hidden_size=40,
            num_attention_heads=5,
            num_key_value_heads=1,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        ),
        seed=207,
        gain=1.5,
    ),
    "qwen2-sliding": Variant(
        qwen2(
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=2,
            hidden_size=48,
            use_sliding_window=True,
            sliding_window=6,
            max_window_layers=1,
        ),
        seed=202,
        gain=1.2,
        shard_size="100KB",
        old_config=True,
    ),
    "qwen3-tied": Variant(
        qwen3(
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=16,
            rms_norm_eps=1e-3,
            tie_word_embeddings=True,
        ),
        seed=201,
        gain=1.5,
    ),
    "qwen3-layer-types": Variant(
        qwen3(
            num_hidden_layers=3,
            num_key_value_heads=4,
            head_dim=24,
            attention_bias=True,
            use_sliding_window=True,
            sliding_window=5,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        seed=208,
        gain=1.2,
    ),
    "mistral-sliding": Variant(
        mistral(num_attention_heads=6, num_key_value_heads=2, head_dim=16, sliding_window=7),
        seed=203,
        gain=1.5,
        eos_token_id=[2, 3],
    ),
    "mistral-full": Variant(
        mistral(num_key_value_heads=2, sliding_window=None, tie_word_embeddings=True),
        seed=201,
        gain=1.5,
    ),
}


def randomize(model: torch.nn.Module, gain: float, generator: torch.Generator) -> None:
    """Draws all parameters so that every one of them matters to the logits."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 2 and "embed" in name:
            parameter.data = noise * 0.5
        elif parameter.ndim == 2:
            width = parameter.shape[1]
            parameter.data = noise * (3.0 if name == "lm_head.weight" else gain) / width**0.5
        else:
            is_norm_weight = "norm" in name and name.endswith("weight")
            parameter.data = float(is_norm_weight) + 0.3 * noise


def rewrite_as_old(file: Path) -> None:
    """Gives a config.json the fields of transformers 4."""
    config = json.loads(file.read_text())
    config["rope_scaling"] = config.pop("rope_parameters")
    config["rope_theta"] = config["rope_scaling"].pop("rope_theta")
    config["torch_dtype"] = config.pop("dtype")
    config.pop("layer_types", None)
    file.write_text(json.dumps(config, indent=2) + "\n")


def make(folder: Path, variant: Variant) -> None:
    generator = torch.Generator().manual_seed(variant.seed)
    model = transformers.AutoModelForCausalLM.from_config(variant.config, dtype=torch.float32)
    randomize(model, variant.gain, generator)
    model.tie_weights()
    model.eval()
    vocab_size = variant.config.vocab_size
    prompts = [
        torch.randint(4, vocab_size, (length,), generator=generator).numpy().astype(np.int32)
        for length in PROMPT_LENGTHS
    ]
    recorded = recorder.record(
        model, prompts, num_with_logits=NUM_WITH_LOGITS, num_greedy=NUM_GREEDY
    )
    if hasattr(model.model, "rotary_emb"):
        recorded["inv_freq"] = model.model.rotary_emb.inv_freq.numpy()

    shutil.rmtree(folder, ignore_errors=True)
    model.generation_config.eos_token_id = variant.eos_token_id
    model.save_pretrained(folder, max_shard_size=variant.shard_size or "1GB")
    if variant.old_config:
        rewrite_as_old(folder / "config.json")
    np.savez(folder / "reference.npz", **recorded)

    size_kb = sum(file.stat().st_size for file in folder.iterdir()) / 1024
    distinct = np.mean([len(set(tokens.tolist())) for tokens in recorded["greedy"]])
    ambiguous = int((recorded["margins"].min(axis=1) < MIN_MARGIN).sum())
    print(
        f"{folder.name:24} {size_kb:6.0f} KB  distinct tokens of {NUM_GREEDY}: {distinct:4.1f}  "
        f"|logits| {np.abs(recorded['logits']).mean():.2f}  median margin "
        f"{np.median(recorded['margins']):.3f}  prompts with a margin below {MIN_MARGIN}: "
        f"{ambiguous}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data")
    parser.add_argument("--only", choices=VARIANTS, help="one variant instead of all")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name, variant in VARIANTS.items():
        if args.only in (None, name):
            make(args.out / name, variant)


if __name__ == "__main__":
    main()
