"""The programs, as a user runs them: what they print, how they end, how much memory they take."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from pallas_paged.models.porting import port
from tests.models.references import load_reference
from tests.models.test_port import assert_bitwise, tensors_in
from tests.programs import run_program

ROOT = Path(__file__).parents[2]


def run(module: str, *flags: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", f"pallas_paged.models.{module}", *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def many_shards(folder: Path) -> int:
    """Makes a checkpoint of many files and returns the bytes of its tensors."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8}
    config = {"architectures": ["LlamaForCausalLM"], "vocab_size": 4096, "num_hidden_layers": 4}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | sizes | {"tie_word_embeddings": True}))
    rng = np.random.default_rng(0)
    attention = {f"self_attn.{name}_proj": (1024, 1024) for name in "qkvo"}
    mlp = {
        "mlp.gate_proj": (4096, 1024),
        "mlp.up_proj": (4096, 1024),
        "mlp.down_proj": (1024, 4096),
    }
    norms = {"input_layernorm": (1024,), "post_attention_layernorm": (1024,)}
    shapes = [
        {f"model.layers.{i}.{name}.weight": s for name, s in (attention | mlp | norms).items()}
        for i in range(4)
    ]
    shapes.append({"model.embed_tokens.weight": (4096, 1024), "model.norm.weight": (1024,)})
    weight_map = {}
    for index, of_shard in enumerate(shapes):
        tensors = {k: rng.standard_normal(s, np.float32) for k, s in of_shard.items()}
        save_file(tensors, folder / f"{index}.safetensors")
        weight_map |= dict.fromkeys(tensors, f"{index}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(4 * int(np.prod(shape)) for of_shard in shapes for shape in of_shard.values())


@pytest.mark.slow
def test_the_programs(tmp_path):
    """The first two in processes of their own, side by side: mostly they import libraries."""
    source, ported = load_reference("llama-mha-tied").path, tmp_path / "ported"
    port(source, ported)
    total = many_shards(tmp_path / "big")
    reference = source / "reference.npz"
    big = run("port", f"--hf_dir={tmp_path / 'big'}", f"--out={tmp_path / 'out'}")
    compared = run("port", f"--out={ported}", f"--reference={reference}")

    shown, errors = big.communicate()
    assert big.returncode == 0, errors
    peak, before, largest = (
        float(re.search(pattern, shown)[1])
        for pattern in (r"peak memory (\d+) MB", r"(\d+) MB of it before", r"has ([\d.]+) MB")
    )
    assert largest == pytest.approx(16.8, abs=0.1)
    assert peak - before < 0.4 * total / 1e6
    assert "no tokenizer files: the model takes token ids only" in shown
    assert "port: 100%" in errors

    out, errors = compared.communicate()
    assert compared.returncode == 0, errors
    assert "1024 of 1024 agree" in out
    assert "parity: yes" in out
    assert len(errors.splitlines()) < 10, "Orbax's own lines do not belong here"

    models = "pallas_paged.models"
    strict = run_program(
        f"{models}.port", f"--out={ported}", f"--reference={reference}", "--tolerance=1e-9"
    )
    assert strict.returncode == 1, strict.stderr
    assert "parity: NO" in strict.stdout
    exported = run_program(f"{models}.export", f"--checkpoint={ported}", f"--out={tmp_path / 'hf'}")
    assert exported.returncode == 0, exported.stderr
    assert_bitwise(tensors_in(tmp_path / "hf"), tensors_in(source))

    unasked = run_program(f"{models}.port", f"--hf_dir={source}", f"--out={ported}")
    assert (unasked.returncode, "exists: give --overwrite" in unasked.stderr) == (2, True)
    assert "Traceback" not in unasked.stderr
    untorched = run_program(
        f"{models}.record_reference", f"--hf_dir={source}", f"--out={tmp_path / 'r.npz'}"
    )
    assert untorched.returncode == 2
    message = "No module named 'torch': recording runs the checkpoint with transformers"
    assert message in untorched.stderr
