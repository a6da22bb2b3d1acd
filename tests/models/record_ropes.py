"""Records the rotary embeddings that transformers makes of the fields of a `config.json`.

Run once, in an environment with torch and transformers, from the repository's root:

    python tests/models/record_ropes.py

Writes `data/ropes.json`: for each case the fields, and the angles per position and the factor of
cosines and sines that transformers computes for a sequence of `seq_len` tokens.
"""

import json
from pathlib import Path
from typing import Any

import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
}
YARN = {"rope_type": "yarn", "factor": 4.0}
ORIGINAL = "original_max_position_embeddings"
SHORT = [1.0, 1.02, 1.05, 1.1, 1.4, 1.9, 2.5, 3.0]
LONG = [1.0, 1.5, 2.5, 5.0, 11.0, 21.0, 33.0, 47.5]
LONGROPE = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG}

CASES: dict[str, tuple[dict[str, Any], int | None]] = {
    "linear": ({"rope_scaling": {"type": "linear", "factor": 4.0}}, None),
    "dynamic": ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, 16384),
    "dynamic-theta": (
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.5, "rope_theta": 5e5}},
        10240,
    ),
    "dynamic-1": ({"rope_scaling": {"rope_type": "dynamic", "factor": 1.0}}, None),
    "llama3-without-original": (
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            }
        },
        None,
    ),
    "yarn": ({"rope_scaling": YARN | {ORIGINAL: 1024}}, None),
    "yarn-without-original": ({"rope_scaling": YARN}, None),
    "yarn-original-outside": ({"rope_scaling": YARN | {ORIGINAL: 2048}, ORIGINAL: 1024}, None),
    "yarn-without-factor": (
        {"rope_scaling": {"rope_type": "yarn", "factor": None, ORIGINAL: 1024}},
        None,
    ),
    "yarn-attention-factor": ({"rope_scaling": YARN | {"attention_factor": 0.75}}, None),
    "yarn-mscales": ({"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}}, None),
    "yarn-one-mscale": ({"rope_scaling": YARN | {"mscale": 0.7}}, None),
    "yarn-mscale-0": ({"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.0}}, None),
    "yarn-betas": ({"rope_scaling": YARN | {"beta_fast": 8, "beta_slow": 2.0}}, None),
    "yarn-whole": ({"rope_scaling": YARN | {"truncate": False}}, None),
    "yarn-truncate-null": ({"rope_scaling": YARN | {"truncate": None}}, None),
    "yarn-truncate": ({"rope_scaling": YARN | {"truncate": True}}, None),
    "yarn-small-theta": (
        {"rope_scaling": YARN | {"beta_slow": 31.0}, "rope_theta": 2.0},
        None,
    ),
    "longrope": ({"rope_scaling": LONGROPE | {ORIGINAL: 1024}}, 4096),
    "longrope-original-outside": ({"rope_scaling": LONGROPE, ORIGINAL: 512}, 4096),
    "longrope-factor": ({"rope_scaling": LONGROPE | {ORIGINAL: 1024, "factor": 32.0}}, 4096),
    "longrope-attention-factor": (
        {"rope_scaling": LONGROPE | {ORIGINAL: 1024, "attention_factor": 1.5}},
        4096,
    ),
    "longrope-short": ({"rope_scaling": LONGROPE | {"factor": 4.0}}, 4096),
}
"""Fields beside `SIZES`, and the length."""


def main() -> None:
    recorded = {}
    for name, (fields, seq_len) in CASES.items():
        config = transformers.LlamaConfig(**json.loads(json.dumps(SIZES | fields)))
        rope_type = config.rope_parameters["rope_type"]
        inv_freq, factor = ROPE_INIT_FUNCTIONS[rope_type](config, "cpu", seq_len=seq_len)
        recorded[name] = {
            "config": {"architectures": ["LlamaForCausalLM"], **SIZES, **fields},
            "seq_len": seq_len,
            "inv_freq": [float(f"{value:.9g}") for value in inv_freq.tolist()],
            "attention_factor": float(factor),
        }
    lines = [f"{json.dumps(name)}: {json.dumps(case)}" for name, case in recorded.items()]
    file = Path(__file__).parent / "data" / "ropes.json"
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
