"""Checkpoints with static scales for the KV cache: as compressed-tensors computes with them."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pallas_paged.models import load_config, load_model
from pallas_paged.models.attend import dense_attend, dense_metadata
from pallas_paged.models.porting import export, port
from tests.models.paged_run import PagedRun
from tests.models.references import DATA

NAME = "llama-gqa-llama3"
RECORDED = json.loads((DATA / "kv_scales.json").read_text())
LOGITS = np.load(DATA / "kv_scales.npz")
CASES = pytest.mark.parametrize("case", RECORDED)
STORED = {"float": jnp.float8_e4m3fn, "int": jnp.int8}
PROJECTIONS = {"k_scale": "k_proj.k_scale", "v_scale": "v_proj.v_scale"}  # ModelOpt's
OUTPUTS = {"k_scale": "k_proj.output_scale", "v_scale": "v_proj.output_scale"}  # older ones'
TENSOR = "float tensor"
LAYER = "model.layers.1.self_attn"


def write(
    folder: Path, tensors: dict[str, np.ndarray], quantization_config: Any, name: str = NAME
) -> Path:
    """Writes a recorded checkpoint with other tensors besides; returns its folder."""
    folder.mkdir()
    config = json.loads((DATA / name / "config.json").read_text())
    config |= {"quantization_config": quantization_config}
    (folder / "config.json").write_text(json.dumps(config))
    for file in (DATA / name).glob("*.safetensors"):
        tensors = tensors | load_file(file)
    save_file(tensors, folder / "model.safetensors")
    return folder


def scales_of(case: str, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    return {name: np.array(x, dtype) for name, x in RECORDED[case]["tensors"].items()}


def checkpoint(folder: Path, case: str) -> Path:
    return write(folder, scales_of(case), RECORDED[case]["quantization_config"])


def run(folder: Path, cache_dtype: Any) -> tuple[np.ndarray, PagedRun]:
    """Returns the logits of the prompt, in two steps, and the caches."""
    paged, prompt = PagedRun(load_model(folder), 1, cache_dtype), LOGITS["prompt"]
    steps = [paged([part], 30)[0] for part in (prompt[:30], prompt[30:])]
    return np.concatenate(steps), paged


@CASES
def test_logits_are_those_of_compressed_tensors(tmp_path, case):
    logits, paged = run(checkpoint(tmp_path / "model", case), STORED[case.split()[0]])
    error = np.abs(logits - LOGITS[case])
    # Where a number lies between two stored ones, a last bit decides, and more follows from it.
    assert np.median(error) < 1e-3
    assert error.max() < 0.25
    assert np.abs(LOGITS[case] - LOGITS["exact"]).max() > 10
    for cache, layer in zip(paged.kv_caches, range(3), strict=True):
        for scales, name in ((cache.k_scale, "k"), (cache.v_scale, "v")):
            given = scales_of(case)[f"model.layers.{layer}.self_attn.{name}_scale"]
            written = np.asarray(scales).transpose(0, 2, 1).reshape(-1, 2)
            written = written[np.isfinite(written).all(1)]
            assert len(written) >= 40
            np.testing.assert_array_equal(
                written, np.broadcast_to(given.reshape(-1), written.shape)
            )


@CASES
def test_a_cache_of_another_dtype_has_nothing_of_them(tmp_path, case):
    folder = checkpoint(tmp_path / "model", case)
    plain, _ = run(DATA / NAME, jnp.float32)
    np.testing.assert_array_equal(run(folder, jnp.float32)[0], plain)
    (other,) = {"int", "float"} - {case.split()[0]}
    np.testing.assert_array_equal(run(folder, STORED[other])[0], run(DATA / NAME, STORED[other])[0])
    assert np.abs(plain - LOGITS["exact"]).max() < 1e-3


def test_training_has_no_cache_and_no_scales(tmp_path):
    model = load_model(checkpoint(tmp_path / "model", TENSOR))
    prompt = jnp.asarray(LOGITS["prompt"])
    caches = (None,) * model.config.num_layers
    hidden, _ = model(prompt, dense_metadata(1, len(prompt)), caches, attend=dense_attend)
    np.testing.assert_allclose(model.compute_logits(hidden), LOGITS["exact"], atol=1e-3)


@pytest.mark.parametrize("names", [PROJECTIONS, OUTPUTS], ids=["ModelOpt", "older"])
def test_other_names_and_shapes_of_the_same(tmp_path, names):
    expected = load_model(checkpoint(tmp_path / "model", TENSOR))
    tensors = {
        f"{prefix}.{names[suffix]}": value.reshape(()).astype(np.float32)
        for name, value in scales_of(TENSOR).items()
        for prefix, _, suffix in [name.rpartition(".")]
    }
    config = {"quant_method": "modelopt", "quant_algo": None, "kv_cache_quant_algo": "FP8"}
    model = load_model(write(tmp_path / "other", tensors, config), jnp.bfloat16)
    assert model.config.kv_cache_dtype == "float8_e4m3fn"
    for layer, other in zip(model.model.layers, expected.model.layers, strict=True):
        for name in ("k_scale", "v_scale"):
            scale = getattr(layer.self_attn, name)[...]
            assert (scale.shape, scale.dtype) == ((2,), jnp.float32)
            np.testing.assert_array_equal(scale, getattr(other.self_attn, name)[...])
    assert model.model.norm.weight[...].dtype == jnp.bfloat16


def test_an_opt_has_them_too(tmp_path):
    given = {(layer, kind): 0.01 + layer + (kind == "v") / 2 for layer in range(2) for kind in "kv"}
    scales = {
        f"model.decoder.layers.{layer}.self_attn.{kind}_scale": np.array([scale], np.float32)
        for (layer, kind), scale in given.items()
    }
    config = RECORDED["int tensor"]["quantization_config"]
    model = load_model(write(tmp_path / "opt", scales, config, "opt-prenorm"))
    paged = PagedRun(model, 1, jnp.int8)
    paged([np.arange(5, 10)], 5)
    for layer, cache in enumerate(paged.kv_caches):
        for kind, found in (("k", cache.k_scale), ("v", cache.v_scale)):
            written = np.asarray(found)[np.isfinite(found)]
            assert len(written) >= 5 * model.config.num_kv_heads
            np.testing.assert_array_equal(written, np.float32(given[layer, kind]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_port_to_another_dtype_keeps_them(tmp_path, dtype):
    folder = checkpoint(tmp_path / "model", "float attn_head")
    port(folder, tmp_path / "ported", dtype)
    expected, ported = load_model(folder, dtype), load_model(tmp_path / "ported")
    assert ported.model.norm.weight[...].dtype == dtype
    for one, other in zip(expected.model.layers, ported.model.layers, strict=True):
        for name in ("k_scale", "v_scale"):
            scales = (getattr(layer.self_attn, name)[...] for layer in (one, other))
            np.testing.assert_array_equal(*scales)


def test_they_are_ported_and_exported(tmp_path):
    folder = checkpoint(tmp_path / "model", "float attn_head")
    port(folder, tmp_path / "ported")
    export(tmp_path / "ported", tmp_path / "exported", max_shard_bytes=1 << 20)
    expected, _ = run(folder, jnp.float8_e4m3fn)
    for other in ("ported", "exported"):
        np.testing.assert_array_equal(run(tmp_path / other, jnp.float8_e4m3fn)[0], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {f"{LAYER}.k_scale": np.array([0.0])},
            r"self_attn.k_scale=\[0. 0.\]: scales must be posi",
        ),
        ({f"{LAYER}.k_scale": np.array([np.nan])}, "scales must be positive and finite"),
        ({f"{LAYER}.v_scale": np.array([1.0, -1.0])}, r"=\[ 1. -1.\]: scales must be positive"),
        (
            {f"{LAYER}.v_scale": np.ones(3)},
            r"misshapen: .*v_scale is \(3,\), by config.json \(2,\)",
        ),
        ({f"{LAYER}.v_scale": np.ones((2, 16))}, r"misshapen: .*v_scale is \(2, 16\)"),
        ({f"{LAYER}.q_scale": np.ones(1)}, r"unused: .*q_scale"),
        ({f"{LAYER}.k_proj.k_scale": np.ones(1)}, r"k_scale and .*k_scale are the same parameter"),
        ({f"{LAYER}.k_scale": None}, r"missing: .*1.self_attn.k_scale, \(2,\)"),
        ({f"{LAYER}.k_scale": None}, "quantization_config in config.json promises these scales"),
    ],
    ids=str,
)
def test_scales_that_are_wrong_are_refused(tmp_path, change, message):
    tensors = scales_of(TENSOR) | {
        name: None if x is None else x.astype(np.float32) for name, x in change.items()
    }
    tensors = {name: x for name, x in tensors.items() if x is not None}
    folder = write(tmp_path / "model", tensors, RECORDED[TENSOR]["quantization_config"])
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_scales_that_the_config_does_not_have_are_refused(tmp_path):
    folder = write(tmp_path / "model", scales_of(TENSOR), None)
    with pytest.raises(ValueError, match=r"unused: model.layers.0.self_attn.k_scale, \(1,\)"):
        load_model(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"quant_method": "awq"},
        {"quant_method": None},
        {"config_groups": {"group_0": {"weights": {"num_bits": 8}}}},
        {"quant_algo": "FP8"},
        {"kv_cache_scheme": {"num_bits": 4, "type": "float"}},
        {"kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "channel"}},
        {"kv_cache_scheme": {"num_bits": 8, "type": "int", "symmetric": False}},
        {"kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": True}},
        {"kv_cache_scheme": "static"},
        {"kv_cache_scheme": {"num_bits": 8, "type": ["float"]}},
        {"kv_cache_scheme": None, "kv_cache_quant_algo": "NVFP4"},
        {"kv_cache_scheme": None, "kv_cache_quant_algo": ["FP8"]},
        {"sparsity_config": {"format": "sparse-24-bitmask"}},
        {"transform_config": {"config_groups": {"R1": {}}}},
    ],
    ids=str,
)
def test_what_else_may_be_quantised_is_refused(tmp_path, change):
    config = RECORDED[TENSOR]["quantization_config"] | change
    folder = write(tmp_path / "model", scales_of(TENSOR), config)
    with pytest.raises(ValueError, match=r"quantization_config=.* is not supported, only static"):
        load_config(folder)


def test_what_is_said_to_be_dense_is_not_sparse(tmp_path):
    dense = {"sparsity_config": {"format": "dense", "global_sparsity": 0.1}}
    config = RECORDED[TENSOR]["quantization_config"] | dense
    folder = write(tmp_path / "model", scales_of(TENSOR), config)
    assert load_config(folder).kv_cache_dtype == "float8_e4m3fn"


def test_modelopts_own_form_is_read(tmp_path):
    inner = {"quant_algo": None, "kv_cache_quant_algo": "FP8"}
    config = {"quant_method": "modelopt", "quantization": inner}
    folder = write(tmp_path / "model", scales_of(TENSOR), config)
    assert load_config(folder).kv_cache_dtype == "float8_e4m3fn"
    with pytest.raises(ValueError, match="is not supported, only static"):
        load_config(
            write(tmp_path / "fp8", {}, config | {"quantization": inner | {"quant_algo": "FP8"}})
        )


def test_a_config_without_a_scheme_quantises_nothing(tmp_path):
    config = RECORDED[TENSOR]["quantization_config"] | {"kv_cache_scheme": None}
    folder = write(tmp_path / "model", {}, config)
    assert load_model(folder).config == load_config(DATA / NAME)
