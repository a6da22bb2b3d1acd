"""From a Hugging Face folder to a ported one and back, bit for bit, whole or not at all."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from pallas_paged.models import load_config, load_model
from pallas_paged.models.demo import DEMO_MODEL
from pallas_paged.models.new_folder import new_folder
from pallas_paged.models.other_files import copy_files, other_files
from pallas_paged.models.porting import export, port
from tests.models.references import load_reference
from tests.models.test_loader import assert_same, edit_config, edit_tensors, params_of

TIED, SHARDED, QWEN = "llama-mha-tied", "llama-gqa-llama3", "qwen3-layer-types"
Q_PROJ, HEAD = "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"
GIB = 1 << 30


def path_of(name: str) -> Path:
    return DEMO_MODEL if name == "demo" else load_reference(name).path


def tensors_in(folder: Path) -> dict[str, np.ndarray]:
    files = [load_file(file) for file in folder.glob("*.safetensors")]
    return {name: value for file in files for name, value in file.items()}


def assert_bitwise(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert (value.dtype, value.shape) == (theirs[name].dtype, theirs[name].shape), name
        assert value.tobytes() == theirs[name].tobytes(), name


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(path_of(name), tmp_path / name))


@pytest.fixture(scope="module")
def ported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A port that no test may change."""
    out = tmp_path_factory.mktemp("ported") / "model"
    port(path_of(TIED), out)
    return out


@pytest.fixture
def ported_copy(ported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(ported, tmp_path / "copy"))


class TestRoundTrip:
    @pytest.mark.parametrize("name", [SHARDED, "opt-postnorm-projected", QWEN, "demo"])
    def test_bitwise(self, name, tmp_path):
        source = path_of(name)
        report = port(source, tmp_path / "ported")
        assert_same(params_of(load_model(tmp_path / "ported")), params_of(load_model(source)))
        assert load_config(tmp_path / "ported") == load_config(source)

        export(tmp_path / "ported", tmp_path / "hf", max_shard_bytes=100_000)
        assert_bitwise(tensors_in(tmp_path / "hf"), tensors_in(source))
        assert_same(params_of(load_model(tmp_path / "hf")), params_of(load_model(source)))
        others = {"config.json", "generation_config.json"}
        if name == "demo":
            others |= {"tokenizer.json", "tokenizer_config.json", "NOTICE", "__init__.py"}
            assert "left where they are" not in report
        else:
            assert "left where they are: reference.npz\nno tokenizer files" in report
        for file in others:
            assert (tmp_path / "hf" / file).read_bytes() == (source / file).read_bytes()
        files = {
            path.name for path in (tmp_path / "hf").iterdir() if "safetensors" not in path.name
        }
        assert files == others

    def test_any_orbax_program_reads_it(self, ported):
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.restore(ported / "params")
        flat = jax.tree_util.tree_leaves_with_path(tree)
        values = {".".join(key.key for key in path): value for path, value in flat}
        assert_bitwise(values, tensors_in(path_of(TIED)))

    def test_tensors_beside_the_parameters_come_along(self, copy_of, tmp_path):
        folder = copy_of(TIED)
        angles = "model.layers.0.self_attn.rotary_emb.inv_freq"

        def edit(tensors):
            tensors[HEAD] = tensors["model.embed_tokens.weight"]
            tensors[angles] = np.ones(4, np.float32)

        edit_tensors(folder, edit)
        port(folder, tmp_path / "ported")
        assert_same(params_of(load_model(tmp_path / "ported")), params_of(load_model(folder)))
        export(tmp_path / "ported", tmp_path / "hf", max_shard_bytes=GIB)
        assert_bitwise(tensors_in(tmp_path / "hf"), tensors_in(folder))

    def test_shards(self, ported, tmp_path):
        export(ported, tmp_path / "one", max_shard_bytes=GIB)
        export(ported, tmp_path / "many", max_shard_bytes=20_000)
        (single,) = (tmp_path / "one").glob("*.safetensors*")
        assert single.stat().st_mode == (tmp_path / "one" / "config.json").stat().st_mode
        assert single.name == "model.safetensors"
        with safe_open(single, framework="np") as tensors:
            assert tensors.metadata() == {"format": "pt"}
        shards = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
        assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
        index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
        assert sorted(set(index["weight_map"].values())) == shards
        assert index["metadata"]["total_size"] == sum(
            value.nbytes for value in tensors_in(tmp_path / "one").values()
        )
        with pytest.raises(ValueError, match=r"one exists: remove it"):
            export(ported, tmp_path / "one", max_shard_bytes=GIB)
        with pytest.raises(ValueError, match=r"is no ported folder: it has no port.json"):
            export(tmp_path / "one", tmp_path / "again", max_shard_bytes=GIB)


class TestOtherFiles:
    ALONG = (
        "LICENSE",
        "README.md",
        "USE_POLICY.md",
        "additional_chat_templates/rag.jinja",
        "additional_chat_templates/tool_use.jinja",
        "assets/deep/plot.svg",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "modeling_x.py",
        "original/params.json",
        "tokenizer.json",
        "tokenizer.model.v3",
    )
    LEFT = (
        "Model.Q4_K_M.GGUF",
        "adapter/adapter_model.safetensors",
        "flax_model.msgpack",
        "onnx/model.onnx_data",
        "original/consolidated.00.pth",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "reference.npz",
        "tf_model.h5",
        "training_args.bin",
    )
    NEITHER = (".git/config", ".gitattributes", ".cache/x.json", "assets/.DS_Store")
    NEITHER += ("__pycache__/modeling_x.cpython-312.pyc", "consolidated.safetensors")

    def fill(self, folder: Path, names: tuple[str, ...]) -> None:
        for name in names:
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            if not file.exists():
                file.write_text(name)

    def files_in(self, folder: Path) -> set[str]:
        files = (path for path in folder.rglob("*") if path.is_file() or path.is_symlink())
        return {str(path.relative_to(folder)) for path in files}

    def test_all_but_weights_go_both_ways(self, copy_of, tmp_path):
        folder, out, back = copy_of(TIED), tmp_path / "ported", tmp_path / "hf"
        whole = self.files_in(folder)
        self.fill(folder, self.ALONG + self.LEFT + self.NEITHER[:-1])
        report = port(folder, out)
        assert f"copied: {', '.join(self.ALONG)}\nleft where they are: " in report
        assert f"left where they are: {', '.join(self.LEFT)}\n" in report
        files = {name for name in self.files_in(out) if not name.startswith("params/")}
        assert files == {*self.ALONG, "port.json"}
        for name in set(self.ALONG) - whole:
            assert (out / name).read_text() == name

        self.fill(out, (*self.LEFT, *self.NEITHER))
        report = export(out, back, max_shard_bytes=GIB)
        assert f"copied: {', '.join(self.ALONG)}\nleft where they are: " in report
        assert self.files_in(back) == {*self.ALONG, "model.safetensors"}
        for name in self.ALONG:
            assert (back / name).read_bytes() == (folder / name).read_bytes()

    def test_links_are_followed_inside_and_into_the_hubs_cache(self, tmp_path):
        folder = tmp_path / "models--a--b" / "snapshots" / "c0ffee"
        self.fill(folder.parent.parent, ("blobs/1234", "blobs/5678", "other/9"))
        self.fill(folder, ("templates/one.jinja",))
        self.fill(tmp_path, ("secret",))
        for name, target in {
            "config.json": "../../blobs/1234",
            "templates/two.jinja": "../../../blobs/5678",
            "one.jinja": "templates/one.jinja",
            "broken": "nowhere",
            "folder": "templates",
            "other.txt": "../../other/9",
            "loop": ".",
            "secret.txt": str(tmp_path / "secret"),
        }.items():
            (folder / name).symlink_to(target)
        found = other_files(folder)
        along = ["config.json", "one.jinja", "templates/one.jinja", "templates/two.jinja"]
        assert found.along == along
        assert found.left == ["broken", "folder", "loop", "other.txt", "secret.txt"]
        copy_files(folder, found.along, tmp_path / "out")
        assert self.files_in(tmp_path / "out") == set(along)
        assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))

    def test_a_config_that_is_elsewhere_is_refused(self, copy_of, tmp_path):
        folder = copy_of(TIED)
        (folder / "config.json").rename(tmp_path / "config.json")
        (folder / "config.json").symlink_to(tmp_path / "config.json")
        with pytest.raises(ValueError, match=r"config.json is a link to .*: put a copy in its pla"):
            port(folder, tmp_path / "ported")
        assert not (tmp_path / "ported").exists()


class TestDtypes:
    def test_another_type_is_rounded_once_and_written_into_the_config(self, tmp_path):
        port(path_of(SHARDED), tmp_path / "ported", "bfloat16")
        source = tensors_in(path_of(SHARDED))
        ours = params_of(load_model(tmp_path / "ported"))
        assert_bitwise(ours, {k: v.astype(jnp.bfloat16) for k, v in source.items()})
        config = json.loads((tmp_path / "ported" / "config.json").read_text())
        assert config["torch_dtype"] == "bfloat16"  # an old config.json, which has the old field
        assert "dtype" not in config

    def test_auto_keeps_types_that_differ(self, copy_of, tmp_path):
        folder = copy_of(TIED)
        edit_tensors(folder, lambda t: t.update({Q_PROJ: t[Q_PROJ].astype(jnp.bfloat16)}))
        port(folder, tmp_path / "ported")
        export(tmp_path / "ported", tmp_path / "hf", max_shard_bytes=GIB)
        assert_bitwise(tensors_in(tmp_path / "hf"), tensors_in(folder))

    @pytest.mark.parametrize("own", [np.float32, jnp.bfloat16])
    def test_a_value_that_overflows_is_refused(self, copy_of, tmp_path, own):
        folder = copy_of(TIED)
        large = np.full((32, 32), 1e5, own)
        edit_tensors(folder, lambda t: t.update({Q_PROJ: large}))
        message = r"q_proj.weight has values beyond 6.55e\+04, the largest of float16"
        with pytest.raises(ValueError, match=message):
            port(folder, tmp_path / "ported", "float16")
        assert sorted(path.name for path in tmp_path.iterdir()) == [TIED]
        with pytest.raises(ValueError, match=message):
            load_model(folder, "float16")

    def test_infinities_stay(self, copy_of):
        folder = copy_of(TIED)
        edit_tensors(folder, lambda t: t.update({Q_PROJ: np.full((32, 32), -np.inf, np.float32)}))
        assert np.isneginf(params_of(load_model(folder, "float16"))[Q_PROJ]).all()


class TestRefused:
    """What does not port leaves nothing behind."""

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_a_folder_of_somebody_else(self, tmp_path, overwrite):
        out = tmp_path / "out"
        out.mkdir()
        (out / "thesis.tex").write_text("years of work")
        with pytest.raises(ValueError, match=r"exists and is not one of ours|exists: give --over"):
            port(path_of(TIED), out, overwrite=overwrite)
        assert [path.name for path in out.iterdir()] == ["thesis.tex"]

    def test_a_port_is_replaced_when_asked(self, ported_copy):
        with pytest.raises(ValueError, match=r"copy exists: give --overwrite to replace it"):
            port(path_of("qwen2-tied"), ported_copy)
        port(path_of("qwen2-tied"), ported_copy, overwrite=True)
        ours = params_of(load_model(ported_copy))
        assert_same(ours, params_of(load_model(path_of("qwen2-tied"))))
        assert [path.name for path in ported_copy.parent.iterdir()] == ["copy"]

    def test_a_ported_source(self, ported, tmp_path):
        with pytest.raises(ValueError, match=r"is a ported folder already; copy it"):
            port(ported, tmp_path / "out")

    def test_an_unknown_architecture(self, copy_of, tmp_path):
        folder = copy_of(TIED)
        edit_config(folder, architectures=["MambaForCausalLM"])
        with pytest.raises(ValueError, match=r"'MambaForCausalLM'.*is not supported, only Llama"):
            port(folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_tensors_that_do_not_fit(self, copy_of, tmp_path):
        folder = copy_of(TIED)

        def edit(tensors):
            del tensors["model.norm.weight"]
            tensors[Q_PROJ] = tensors[Q_PROJ][:, :-1].copy()
            tensors["surplus"] = np.zeros(3, np.float32)

        edit_tensors(folder, edit)
        with pytest.raises(ValueError, match=r"(?s)missing: model.norm.*misshapen: .*unused: sur"):
            port(folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_no_checkpoint(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
            port(tmp_path / "nowhere", tmp_path / "out")
        with pytest.raises(FileNotFoundError, match=r"has no config.json: it has \[\]"):
            port(tmp_path, tmp_path / "out")

    def test_a_second_writer(self, tmp_path):
        with (
            new_folder(tmp_path / "out"),
            pytest.raises(ValueError, match=r"another process is writing .*\.out\.incomplete"),
        ):
            port(path_of(TIED), tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


class TestDamage:
    def test_half_a_port(self, ported_copy):
        (ported_copy / "port.json").unlink()
        with pytest.raises(ValueError, match=r"copy is an incomplete port: it has params and no p"):
            load_model(ported_copy)

    def test_a_missing_and_a_truncated_file(self, ported_copy):
        files = (file for file in ported_copy.rglob("params/**/d/*") if file.stat().st_size > 1)
        first, second = sorted(files)[:2]
        first.unlink()
        second.write_bytes(second.read_bytes()[:-1])
        with pytest.raises(ValueError, match=r"is damaged: ") as caught:
            load_model(ported_copy)
        assert f"{first.relative_to(ported_copy)} is missing" in str(caught.value)
        size = second.stat().st_size
        assert f"{second.name} has {size} bytes instead of {size + 1}" in str(caught.value)

    def test_every_flipped_byte_is_found(self, ported_copy):
        """Or has no effect: files hold a few bytes that nothing reads."""
        expected = params_of(load_model(ported_copy))
        rng = np.random.default_rng(0)
        files = [file for file in (ported_copy / "params").rglob("*") if file.is_file()]
        files = [file for file in files if file.stat().st_size > 0]
        num_refused = 0
        for file in sorted(files, key=lambda file: file.stat().st_size)[-8:]:
            whole = file.read_bytes()
            for at in rng.integers(0, len(whole), 2):
                broken = bytearray(whole)
                broken[at] ^= 0x10
                file.write_bytes(broken)
                try:
                    ours = params_of(load_model(ported_copy))
                except ValueError as error:
                    message = str(error)
                else:
                    message = ""
                    assert_same(ours, expected)
                assert not message or "is damaged: " in message
                num_refused += bool(message)
            file.write_bytes(whole)
        assert num_refused >= 8
        assert_same(params_of(load_model(ported_copy)), expected)

    def test_a_value_that_changed_is_named(self, ported_copy):
        values = json.loads((ported_copy / "port.json").read_text())
        values["tensors"][Q_PROJ]["crc32"] ^= 1
        (ported_copy / "port.json").write_text(json.dumps(values))
        with pytest.raises(ValueError, match=rf"{Q_PROJ} has not the checksum it was ported with"):
            load_model(ported_copy)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "port.json is not valid JSON"),
            ('{"format": 2}', "format=2 is not supported, only 1"),
            ('{"format": 1, "tensors": {"a": {}}, "files": {}}', "port.json is damaged"),
        ],
    )
    def test_a_broken_manifest(self, ported_copy, text, message):
        (ported_copy / "port.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_model(ported_copy)

    def test_a_config_of_another_model(self, ported_copy):
        edit_config(ported_copy, tie_word_embeddings=False, hidden_size=16)
        with pytest.raises(ValueError, match=r"(?s)missing: lm_head.*misshapen: model.embed"):
            load_model(ported_copy)
        edit_config(ported_copy, architectures=["Mamba"])
        with pytest.raises(ValueError, match=r"architectures=\['Mamba'\]"):
            load_model(ported_copy)


def test_parameters_go_where_their_axes_say(ported):
    """Either form, two devices: what the model's own axis names lay over the mesh."""
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    over = {"heads", "kv_heads", "mlp", "vocab"}

    def sharding(axes, shape):
        assert len(axes) == len(shape)
        spec = jax.P(*("tensor" if axis in over else None for axis in axes))
        return jax.sharding.NamedSharding(mesh, spec)

    for folder in (ported, path_of(TIED)):
        model: Any = load_model(folder, sharding=sharding)
        layer = model.model.layers[0]
        for weight, shape in (
            (layer.self_attn.qkv_proj.weight[...], (2, 24, 32)),
            (layer.mlp.gate_up_proj.weight[...], (32, 2, 32)),
            (layer.self_attn.o_proj.weight[...], (32, 16)),
        ):
            assert [shard.data.shape for shard in weight.addressable_shards] == [shape] * 2
        assert len(model.model.norm.weight[...].sharding.device_set) == 2
        assert_same(params_of(model), params_of(load_model(path_of(TIED))))
