"""Engines of checkpoints with static scales for the KV cache."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_paged.engine import LLM, SamplingParams
from pallas_paged.engine.config import EngineConfig
from pallas_paged.engine.device.implementations import resolve_kv_cache_dtype
from pallas_paged.models import load_config
from tests.models.test_kv_scales import LOGITS, RECORDED, checkpoint, scales_of

OPTIONS = {
    "num_blocks": 40,
    "compilation_cache_dir": None,
    "background_compilation": False,
}
PROMPT = {"prompt_token_ids": LOGITS["prompt"].tolist()}
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def tokens(llm: LLM) -> list[int]:
    (output,) = llm.generate([PROMPT], GREEDY, use_tqdm=False)
    return output.outputs[0].token_ids


def caches(llm: LLM):
    return llm.engine.core.executor.kv_caches


@pytest.mark.parametrize("case", ["int tensor", "int attn_head"])
def test_auto_is_a_cache_with_the_checkpoints_scales(tmp_path, case, caplog):
    caplog.set_level("INFO")
    folder = checkpoint(tmp_path / "model", case)
    llm = LLM(folder, **OPTIONS)
    assert "the checkpoint's scales for a KV cache of int8 are used" in caplog.text
    first = tokens(llm)
    assert first[0] == LOGITS[case][-1].argmax()
    for layer, cache in enumerate(caches(llm)):
        assert cache.k.dtype == jnp.int8
        given = scales_of(case)[f"model.layers.{layer}.self_attn.k_scale"]
        found = np.asarray(cache.k_scale)[1:].transpose(0, 2, 1).reshape(-1, 2)
        found = found[found.any(1)]
        assert len(found) >= 40 + 11
        np.testing.assert_array_equal(found, np.broadcast_to(given.reshape(-1), found.shape))


def test_a_cache_of_another_dtype_says_that_it_does_not_use_them(tmp_path, caplog):
    caplog.set_level("INFO")
    folder = checkpoint(tmp_path / "model", "int tensor")
    llm = LLM(folder, kv_cache_dtype="float32", **OPTIONS)
    assert "scales for a KV cache of int8 are not used in a cache of float32" in caplog.text
    assert tokens(llm)[0] == LOGITS["exact"][-1].argmax()


def test_dummy_weights_have_scales_that_fit(tmp_path):
    folder = checkpoint(tmp_path / "model", "int tensor")
    (folder / "model.safetensors").unlink()
    llm = LLM(folder, load_format="dummy", seed=1, **OPTIONS)
    assert tokens(llm)
    for cache in caches(llm):
        for stored, scales in ((cache.k, cache.k_scale), (cache.v, cache.v_scale)):
            written = np.asarray(stored)[np.asarray(scales) > 0]
            assert 1 < np.abs(written.astype(int)).max() < 127
            assert np.count_nonzero(written) > 0.5 * written.size


@pytest.mark.parametrize(
    ("case", "platform", "asked", "expected"),
    [
        ("float tensor", "gpu", "auto", "float8_e4m3fn"),
        ("float tensor", "cpu", "auto", "bfloat16"),
        ("float tensor", "cpu", "fp8", "float8_e4m3fn"),
        ("int tensor", "cpu", "auto", "int8"),
        ("int tensor", "gpu", "auto", "int8"),
        ("int tensor", "gpu", "bfloat16", "bfloat16"),
        (None, "gpu", "auto", "bfloat16"),
    ],
)
def test_which_dtype_a_cache_has(tmp_path: Path, case, platform, asked, expected):
    folder = checkpoint(tmp_path / "model", case or "int tensor")
    if case is None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    shape, bfloat16 = load_config(folder), jnp.dtype("bfloat16")
    config = EngineConfig("m", kv_cache_dtype=asked)
    assert resolve_kv_cache_dtype(config, bfloat16, shape, platform) == expected


def test_the_cases_are_all_recorded():
    assert set(RECORDED) == {f"{t} {s}" for t in ("float", "int") for s in ("tensor", "attn_head")}
