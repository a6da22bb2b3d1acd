import gc
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from pallas_paged.models import (
    init_model,
    load_config,
    load_eos_token_ids,
    load_model,
    load_sampling_defaults,
)
from pallas_paged.models.tensors import tensors_of
from tests.models.references import REFERENCES, load_reference

TIED, SHARDED = "llama-mha-tied", "llama-gqa-llama3"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[str], Path]:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(load_reference(name).path, tmp_path / name))

    return copy


def edit_config(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def edit_tensors(folder: Path, edit: Callable[[dict[str, np.ndarray]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def params_of(model: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in tensors_of(nnx.state(model)).items()}


def assert_same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name])


@pytest.mark.parametrize("name", REFERENCES)
def test_every_tensor_is_loaded_bit_for_bit(name):
    path = load_reference(name).path
    theirs: dict[str, np.ndarray] = {}
    for file in path.glob("*.safetensors"):
        theirs |= load_file(file)
    ours = params_of(load_model(path))
    assert {x.dtype for x in ours.values()} == {np.dtype(np.float32)}
    assert_same(ours, theirs)


def test_sharded_checkpoints_are_in_the_data():
    assert len(list(load_reference(SHARDED).path.glob("model-*.safetensors"))) == 4


def test_weights_are_held_once(copy_of):
    folder = copy_of(TIED)
    gc.collect()
    before = sum(x.nbytes for x in jax.live_arrays())
    model = load_model(folder)
    after = sum(x.nbytes for x in jax.live_arrays())
    assert after - before == sum(x.nbytes for x in jax.tree.leaves(nnx.state(model)))


class TestDtypes:
    def cast(self, dtype: Any) -> Callable[[dict[str, np.ndarray]], object]:
        return lambda tensors: tensors.update({k: v.astype(dtype) for k, v in tensors.items()})

    def test_bfloat16_keeps_its_bits_and_widens_exactly(self, copy_of):
        folder = copy_of(TIED)
        edit_tensors(folder, self.cast(ml_dtypes.bfloat16))
        edit_config(folder, dtype="bfloat16")
        theirs = load_file(load_reference(TIED).path / "model.safetensors")
        rounded = {k: v.astype(ml_dtypes.bfloat16) for k, v in theirs.items()}
        narrow, wide = params_of(load_model(folder)), params_of(load_model(folder, "float32"))
        assert {x.dtype for x in narrow.values()} == {np.dtype(jnp.bfloat16)}
        assert {x.dtype for x in wide.values()} == {np.dtype(np.float32)}
        assert_same(narrow, rounded)
        assert_same(wide, {k: v.astype(np.float32) for k, v in rounded.items()})

    def test_auto_takes_the_old_field_too(self, copy_of):
        folder = copy_of(SHARDED)
        edit_config(folder, torch_dtype="bfloat16")
        assert load_config(folder).checkpoint_dtype == "bfloat16"
        assert params_of(load_model(folder, "auto"))[Q_PROJ].dtype == jnp.bfloat16

    def test_auto_without_a_field_takes_the_tensors(self, copy_of):
        folder = copy_of(TIED)
        edit_config(folder, dtype=None)
        edit_tensors(folder, self.cast(np.float16))
        assert params_of(load_model(folder))[Q_PROJ].dtype == np.float16
        edit_tensors(folder, lambda t: t.update({Q_PROJ: t[Q_PROJ].astype(np.float32)}))
        with pytest.raises(ValueError, match=r"config.json names no dtype and the tensors are of"):
            load_model(folder)
        assert params_of(load_model(folder, jnp.bfloat16))[Q_PROJ].dtype == jnp.bfloat16

    @pytest.mark.parametrize("dtype", ["int8", "float64", "half", np.int32])
    def test_other_dtypes_are_refused(self, dtype):
        with pytest.raises(ValueError, match=r"dtype=.* must be 'auto' or one of float32, bfloat1"):
            load_model(load_reference(TIED).path, dtype)

    def test_quantised_tensors_are_refused(self, copy_of):
        folder = copy_of(TIED)
        edit_tensors(folder, lambda t: t.update({Q_PROJ: t[Q_PROJ].astype(np.int8)}))
        with pytest.raises(ValueError, match=r"q_proj.weight \(I8\)"):
            load_model(folder)


class TestTensors:
    def test_all_that_do_not_fit_are_listed(self, copy_of):
        folder = copy_of(TIED)

        def edit(tensors):
            del tensors["model.norm.weight"]
            tensors[Q_PROJ] = tensors[Q_PROJ][:, :-1].copy()
            tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((3, 4), np.float32)

        edit_tensors(folder, edit)
        with pytest.raises(ValueError, match=r"not those of its config.json") as caught:
            load_model(folder)
        assert str(caught.value).splitlines()[1:] == [
            "  missing: model.norm.weight, (32,)",
            f"  misshapen: {Q_PROJ} is (32, 31), by config.json (32, 32)",
            "  unused: model.layers.2.mlp.up_proj.weight, (3, 4)",
        ]

    def test_a_transposed_weight_is_misshapen(self, copy_of):
        folder, name = copy_of(TIED), "model.layers.1.mlp.down_proj.weight"
        edit_tensors(folder, lambda t: t.update({name: t[name].T.copy()}))
        with pytest.raises(ValueError, match=r"down_proj.weight is \(64, 32\), by .* \(32, 64\)"):
            load_model(folder)

    def test_biases_that_the_config_denies_are_unused(self, copy_of):
        folder = copy_of(SHARDED)
        edit_config(folder, attention_bias=False)
        with pytest.raises(ValueError, match=r"unused: model.layers.0.self_attn.k_proj.bias"):
            load_model(folder)

    def test_an_untied_model_needs_its_head(self, copy_of):
        folder = copy_of(TIED)
        edit_config(folder, tie_word_embeddings=False)
        with pytest.raises(ValueError, match=r"missing: lm_head.weight, \(128, 32\)"):
            load_model(folder)

    def test_a_tied_head_may_be_there_again(self, copy_of):
        folder = copy_of(TIED)
        edit_tensors(folder, lambda t: t.update({HEAD: t[EMBEDDING]}))
        assert_same(params_of(load_model(folder)), params_of(load_model(load_reference(TIED).path)))
        edit_tensors(folder, lambda t: t.update({HEAD: t[EMBEDDING] + np.float32(1e-3)}))
        with pytest.raises(ValueError, match=r"lm_head.weight differs from model.embed_tokens.we"):
            load_model(folder)

    def test_a_tied_head_may_stand_for_the_embedding(self, copy_of):
        folder = copy_of(TIED)
        edit_tensors(folder, lambda t: t.update({HEAD: t.pop(EMBEDDING)}))
        assert_same(params_of(load_model(folder)), params_of(load_model(load_reference(TIED).path)))

    def test_rotary_angles_in_old_checkpoints_are_left_out(self, copy_of):
        folder = copy_of(TIED)
        name = "model.layers.0.self_attn.rotary_emb.inv_freq"
        edit_tensors(folder, lambda t: t.update({name: np.ones(4, np.float32)}))
        assert name not in params_of(load_model(folder))

    def test_opt_tensors_without_the_outer_name(self, copy_of):
        folder = copy_of("opt-prenorm")

        def strip(tensors):
            for name in list(tensors):
                tensors[name.removeprefix("model.")] = tensors.pop(name)

        edit_tensors(folder, strip)
        expected = params_of(load_model(load_reference("opt-prenorm").path))
        assert_same(params_of(load_model(folder)), expected)
        edit_tensors(
            folder,
            lambda t: t.update(
                {
                    "model.decoder.layers.0.fc1.bias": t.pop("decoder.layers.0.fc1.bias"),
                    "decoder.layers.0.fc1.bias": np.zeros(64, np.float32),
                }
            ),
        )
        with pytest.raises(
            ValueError, match=r"are the same parameter model.decoder.layers.0.fc1.b"
        ):
            load_model(folder)


class TestFiles:
    def test_no_folder(self, tmp_path):
        with pytest.raises(
            FileNotFoundError, match=r"no folder .*org/model: model must be a local folder, nothi"
        ):
            load_model(tmp_path / "org/model")

    @pytest.mark.parametrize(
        ("model", "name"),
        [
            ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
            ("Qwen3", "ORG/NAME"),
            (Path("nowhere/at/all"), "ORG/NAME"),
        ],
    )
    def test_a_name_on_the_hub(self, model, name):
        message = f"nothing is downloaded.* hf download {name} --local-dir FOLDER"
        for load in (load_model, load_config, load_eos_token_ids, load_sampling_defaults):
            with pytest.raises(FileNotFoundError, match=message):
                load(model)

    def test_no_config(self, tmp_path):
        (tmp_path / "weights.bin").touch()
        with pytest.raises(
            FileNotFoundError, match=r"has no config.json: it has \['weights.bin'\]"
        ):
            load_config(tmp_path)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "config.json is not valid JSON"),
            ("[" * 100_000, "config.json is not valid JSON: .*recursion"),
            ("[]", "must hold a JSON object, not list"),
        ],
    )
    def test_malformed_config(self, tmp_path, text, message):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_config(tmp_path)

    def test_unknown_architecture(self, copy_of):
        folder = copy_of(TIED)
        edit_config(folder, architectures=["MambaForCausalLM"], model_type="mamba")
        with pytest.raises(ValueError, match=r"'MambaForCausalLM'.*only LlamaForCausalLM, OPTFor"):
            load_model(folder)

    def test_other_weight_formats(self, copy_of):
        folder = copy_of(TIED)
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        with pytest.raises(
            FileNotFoundError, match=r"neither model.safetensors nor .*index.json: i"
        ):
            load_model(folder)

    @pytest.mark.parametrize("length", [0, 5, 100, 50_000, -1])
    def test_truncated_file(self, copy_of, length):
        file = copy_of(TIED) / "model.safetensors"
        file.write_bytes(file.read_bytes()[:length])
        with pytest.raises(
            ValueError, match=r"model.safetensors is truncated or not a safetensors"
        ):
            load_model(file.parent)

    def test_corrupt_shard(self, copy_of):
        file = copy_of(SHARDED) / "model-00003-of-00004.safetensors"
        file.write_bytes(b"\xff" * 16 + file.read_bytes()[16:])
        with pytest.raises(
            ValueError, match=r"model-00003-of-00004.safetensors is truncated or no"
        ):
            load_model(file.parent)

    def test_missing_shards(self, copy_of):
        folder = copy_of(SHARDED)
        for number in (2, 4):
            (folder / f"model-0000{number}-of-00004.safetensors").unlink()
        with pytest.raises(
            FileNotFoundError,
            match=r"index.json names files that are missing: mode"
            r"l-00002-of-00004.safetensors, model-00004-of-00004.safetensors",
        ):
            load_model(folder)

    def test_index_and_shards_disagree(self, copy_of):
        folder = copy_of(SHARDED)
        index = folder / "model.safetensors.index.json"
        values = json.loads(index.read_text())
        shard = values["weight_map"].pop(Q_PROJ)
        index.write_text(json.dumps(values))
        with pytest.raises(ValueError, match=rf"disagree .*{Q_PROJ}', '{shard}'"):
            load_model(folder)
        index.write_text(json.dumps({"weight_map": [shard]}))
        with pytest.raises(ValueError, match=r"index.json has no object 'weight_map'"):
            load_model(folder)


class TestGenerationDefaults:
    def test_generation_config_comes_first(self):
        assert load_eos_token_ids(load_reference(SHARDED).path) == (2, 3)
        assert load_eos_token_ids(load_reference(TIED).path) == (2,)

    def test_config_comes_second(self, copy_of):
        folder = copy_of(SHARDED)
        (folder / "generation_config.json").write_text("{}")
        assert load_eos_token_ids(folder) == (2,)
        (folder / "generation_config.json").unlink()
        edit_config(folder, eos_token_id=[7, 8])
        assert load_eos_token_ids(folder) == (7, 8)
        edit_config(folder, eos_token_id=None)
        assert load_eos_token_ids(folder) == ()

    @pytest.mark.parametrize(
        ("eos", "kept"),
        [(-1, ()), (128, ()), (127, (127,)), ([-1, 2, 128, 3, 2**40], (2, 3)), ([], ()), (0, (0,))],
    )
    @pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
    def test_ids_that_no_token_has_are_left_out(self, copy_of, caplog, name, eos, kept):
        folder = copy_of(TIED)
        (folder / "generation_config.json").write_text("{}")
        values = json.loads((folder / name).read_text()) | {"eos_token_id": eos}
        (folder / name).write_text(json.dumps(values))
        with caplog.at_level(logging.WARNING):
            assert load_eos_token_ids(folder) == kept
        left = [token for token in np.ravel(eos).tolist() if token not in kept]
        (*messages,) = (record.getMessage() for record in caplog.records)
        if left:
            ids = ", ".join(str(int(token)) for token in left)
            assert f"{name}: no token of the vocabulary of 128 has the eos_token_id {ids}" in str(
                messages
            )
        assert len(messages) == bool(left)

    @pytest.mark.parametrize("eos", ["2", [2, "3"], True, [2, False], 2.0])
    def test_malformed(self, copy_of, eos):
        folder = copy_of(TIED)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
        with pytest.raises(ValueError, match=r"generation_config.json: eos_token_id=.* must be an"):
            load_eos_token_ids(folder)


class TestSamplingDefaults:
    def load(self, folder: Path, values: Any) -> dict[str, Any]:
        (folder / "config.json").write_text("{}")
        (folder / "generation_config.json").write_text(json.dumps(values))
        return load_sampling_defaults(folder)

    def test_the_fields_of_vllm_by_our_names(self, tmp_path):
        values = {"temperature": 1, "top_p": 0.8, "top_k": 20, "min_p": 0.05}
        values |= {"repetition_penalty": 1.05, "max_new_tokens": 2048}
        others = {"do_sample": True, "eos_token_id": 2, "num_beams": 4, "max_length": 20}
        read = self.load(tmp_path, values | others)
        del values["max_new_tokens"]
        assert read == values | {"max_tokens": 2048}
        assert {name: type(value) for name, value in read.items()} == {
            "temperature": float,
            "top_p": float,
            "top_k": int,
            "min_p": float,
            "repetition_penalty": float,
            "max_tokens": int,
        }

    def test_what_is_not_there_is_not_a_default(self, tmp_path):
        assert self.load(tmp_path, {"temperature": None, "top_k": 0}) == {"top_k": 0}
        assert self.load(tmp_path, {"do_sample": False}) == {}
        assert self.load(tmp_path, {"do_sample": False, "temperature": 0.5}) == {"temperature": 0.5}
        (tmp_path / "generation_config.json").unlink()
        assert load_sampling_defaults(tmp_path) == {}

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"temperature": "0.5"}, "temperature='0.5' must be a finite number"),
            ({"temperature": True}, "temperature=True must be a finite number"),
            ({"top_p": float("nan")}, "top_p=nan must be a finite number"),
            ({"min_p": 10**400}, "min_p=10+ must be a finite number"),
            ({"top_k": 10**400}, "top_k=10+ must be an integer"),
            ({"top_k": 20.0}, "top_k=20.0 must be an integer"),
            ({"top_k": False}, "top_k=False must be an integer"),
            ({"max_new_tokens": [1]}, r"max_new_tokens=\[1\] must be an integer"),
            ([], "must hold a JSON object, not list"),
        ],
    )
    def test_malformed(self, tmp_path, values, message):
        with pytest.raises(ValueError, match=f"generation_config.json.* {message}"):
            self.load(tmp_path, values)


class TestInit:
    def test_needs_the_config_only(self, tmp_path):
        source = load_reference(TIED).path
        (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
        drawn = params_of(init_model(tmp_path, "bfloat16", seed=1))
        assert_same(drawn, params_of(init_model(tmp_path, "bfloat16", seed=1)))
        other = params_of(init_model(tmp_path, "bfloat16", seed=2))
        assert not np.array_equal(drawn[Q_PROJ], other[Q_PROJ])
        read = params_of(load_model(source))
        assert {k: v.shape for k, v in drawn.items()} == {k: v.shape for k, v in read.items()}
        assert drawn[Q_PROJ].dtype == jnp.bfloat16

    def test_auto_without_a_field_is_refused(self, copy_of):
        folder = copy_of(TIED)
        edit_config(folder, dtype=None)
        with pytest.raises(ValueError, match=r"config.json names no dtype"):
            init_model(folder)
