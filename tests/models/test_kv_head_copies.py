"""KV heads that are kept several times: the same logits, the same tensors, from any checkpoint."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_paged.models import abstract_model, init_model, load_config, load_model
from pallas_paged.models.llama import LlamaConfig
from pallas_paged.models.porting import port
from pallas_paged.models.tensors import tensors_of, with_tensors
from tests.models.paged_run import PagedRun
from tests.models.references import load_reference
from tests.models.test_kv_scales import LOGITS, STORED, TENSOR, checkpoint
from tests.models.test_loader import assert_same, params_of

COPIED = [
    ("llama-gqa-llama3", 6),  # with biases of queries, keys and values
    ("llama-mqa-linear", 2),
    ("llama-mqa-linear", 4),
    ("mistral-sliding", 6),
    ("qwen2-tied", 5),
    ("qwen3-tied", 6),
]
CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=1,
    num_q_heads=24,
    num_kv_heads=4,
    head_dim=8,
    max_position_embeddings=64,
)


def split_config(name, num_devices):
    """Returns a configuration whose MLP can be split too: 64 is no multiple of 5 and 6."""
    config = load_config(load_reference(name).path)
    copies = num_devices // config.num_kv_heads
    return dataclasses.replace(config, num_kv_heads=num_devices, kv_head_copies=copies)


@pytest.mark.parametrize(("name", "num_devices"), COPIED)
def test_logits_and_tensors_are_the_same(name, num_devices):
    reference = load_reference(name)
    plain = load_model(reference.path)
    copied = load_model(reference.path, config=split_config(name, num_devices))
    k_and_v = [spec.arrays[0].shape[0] for spec in copied.config.cache_specs(4, jnp.float32)]
    assert set(k_and_v) == {num_devices}
    assert_same(params_of(copied), params_of(plain))
    prompts = reference.prompts[: len(reference.logits)]
    runs = [PagedRun(model, len(prompts)).in_chunks(prompts, 16) for model in (plain, copied)]
    for ours, theirs, recorded in zip(*runs, reference.logits, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
        np.testing.assert_allclose(theirs, recorded, atol=1e-3)


def test_every_head_of_the_parameter_has_its_queries_keys_and_values():
    path = load_reference("llama-gqa-llama3").path
    (plain, _), (copied, _) = (
        (model.model.layers[1].self_attn.qkv_proj, model)
        for model in (load_model(path), load_model(path, config=split_config(path.name, 6)))
    )
    for kind in ("weight", "bias"):
        before, after = (np.asarray(getattr(p, kind)[...]) for p in (plain, copied))
        assert before.shape[:2] == (2, 5 * 16)
        assert after.shape[:2] == (6, 3 * 16)
        for head in range(6):
            old, place = divmod(head, 3)
            queries = before[old, place * 16 : (place + 1) * 16]
            expected = np.concatenate([queries, before[old, 3 * 16 :]])
            np.testing.assert_array_equal(after[head], expected)


def test_tensors_go_back_to_every_copy():
    path = load_reference("llama-gqa-llama3").path
    state = nnx.state(load_model(path, config=split_config(path.name, 6)))
    doubled = with_tensors(state, {name: 2 * x for name, x in tensors_of(state).items()})
    for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(doubled), strict=True):
        np.testing.assert_array_equal(2 * before, after)


def test_a_ported_folder_has_no_copies(tmp_path):
    path = load_reference("qwen3-tied").path
    port(path, tmp_path / "ported")
    copied = load_model(tmp_path / "ported", config=split_config(path.name, 6))
    assert_same(params_of(copied), params_of(load_model(path)))


def test_drawn_weights_are_the_same_and_their_copies_equal(tmp_path):
    path = load_reference("llama-gqa-llama3").path
    shutil.copy(path / "config.json", tmp_path)
    copied = init_model(tmp_path, seed=3, config=split_config(path.name, 6))
    assert_same(params_of(copied), params_of(init_model(tmp_path, seed=3)))
    keys = np.asarray(copied.model.layers[0].self_attn.qkv_proj.weight[...])[:, 16:]
    np.testing.assert_array_equal(keys, np.repeat(keys[::3], 3, axis=0))
    assert not np.array_equal(keys[0], keys[3])


@pytest.mark.parametrize("case", [TENSOR, "int attn_head"])
def test_static_scales_are_their_heads(tmp_path, case):
    folder = checkpoint(tmp_path / "model", case)
    plain, config = load_model(folder), load_config(folder)
    copied = load_model(
        folder, config=dataclasses.replace(config, num_kv_heads=6, kv_head_copies=3)
    )
    assert_same(params_of(copied), params_of(plain))
    for ours, theirs in zip(copied.model.layers, plain.model.layers, strict=True):
        for name in ("k_scale", "v_scale"):
            scales = (np.asarray(getattr(layer.self_attn, name)[...]) for layer in (ours, theirs))
            np.testing.assert_array_equal(next(scales), np.repeat(next(scales), 3))
    dtype, prompt = STORED[case.split()[0]], LOGITS["prompt"]
    logits = [PagedRun(model, 1, dtype)([prompt], len(prompt))[0] for model in (plain, copied)]
    np.testing.assert_allclose(*logits, atol=1e-3)


@pytest.mark.parametrize("name", ["llama-gqa-llama3", "opt-prenorm"])
def test_one_device_changes_nothing(name):
    config = load_config(load_reference(name).path)
    assert config.for_devices(1) is config
    assert config.for_devices(2) is config


def test_heads_are_copied_up_to_the_number_of_devices():
    assert CONFIG.for_devices(4) is CONFIG
    eight = dataclasses.replace(CONFIG, num_kv_heads=8, kv_head_copies=2)
    assert CONFIG.for_devices(8) == eight
    assert eight.for_devices(4) is eight
    assert eight.for_devices(24) == CONFIG.for_devices(24)
    assert CONFIG.for_devices(24).kv_head_copies == 6
    weight = abstract_model(eight, "bfloat16").model.layers[0].self_attn.qkv_proj.weight
    assert weight.shape == (8, (3 + 2) * 8, 32)


@pytest.mark.parametrize(
    ("changes", "num_devices", "message"),
    [
        ({}, 5, "num_q_heads=24 cannot be split over 5 devices; .* can be 1, 2, 4, 8, 12, 24$"),
        ({}, 6, "num_kv_heads=4 cannot be split over 6 devices; .* can be 1, 2, 4, 8, 12, 24$"),
        (
            {"intermediate_size": 50},
            4,
            "intermediate_size=50 cannot be split over 4 devices; .* can be 1, 2$",
        ),
        ({}, 0, "num_devices=0 must be positive"),
    ],
)
def test_what_cannot_be_split_is_refused(changes, num_devices, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes).for_devices(num_devices)


def test_an_opt_names_its_own_field():
    config = load_config(load_reference("opt-prenorm").path)
    with pytest.raises(ValueError, match="ffn_dim=66 cannot be split over 4 devices"):
        dataclasses.replace(config, ffn_dim=66).for_devices(4)


def test_copies_that_are_no_divisor_are_refused():
    with pytest.raises(ValueError, match=r"num_kv_heads=4 counts .* kv_head_copies=3"):
        dataclasses.replace(CONFIG, kv_head_copies=3)
    with pytest.raises(ValueError, match=r"kv_head_copies=0 must be positive"):
        dataclasses.replace(CONFIG, kv_head_copies=0)
