"""Weights read straight into their shards: the slices of the whole, and no more of the files."""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from pallas_paged.models import chunks, init_model, load_config, load_model, loader
from pallas_paged.models.checkpoint import HFCheckpoint, Tensor
from pallas_paged.models.chunks import Checksums
from pallas_paged.models.loader import open_checkpoint
from pallas_paged.models.ported import PortedCheckpoint
from pallas_paged.models.porting import port
from pallas_paged.models.sharded import ShardingOf
from tests.models.references import REFERENCES, load_reference
from tests.models.test_kv_scales import checkpoint as with_scales
from tests.models.test_loader import edit_config, edit_tensors

NUM_DEVICES = 6
COUNTS = {4: (2, 4), 5: (5,), 6: (2, 3, 6)}
"""Of devices, by the number of query heads."""
TIED = "llama-mha-tied"
Q_PROJ, DOWN = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"


def over(num_devices: int) -> ShardingOf:
    """Returns what lays the axes that can be split over so many devices."""
    devices = np.array(jax.devices()[:num_devices])
    mesh = jax.sharding.Mesh(devices, ("model",))

    def sharding(axes: tuple[str, ...], shape: tuple[int, ...]) -> jax.sharding.Sharding:
        split = ("vocab", "heads", "kv_heads", "mlp")
        spec = (
            "model" if axis in split and length % num_devices == 0 else None
            for axis, length in zip(axes, shape, strict=True)
        )
        return jax.sharding.NamedSharding(mesh, jax.P(*spec))

    return sharding


def copied(folder: Path) -> Any:
    """Returns a configuration with as many KV heads, copies included, as query heads."""
    config = load_config(folder)
    num_heads = config.num_q_heads
    copies = num_heads // config.num_kv_heads
    return dataclasses.replace(config, num_kv_heads=num_heads, kv_head_copies=copies)


def assert_shards_are_slices(split: Any, whole: Any, num_local: int) -> None:
    flat = dict(nnx.to_flat_state(nnx.state(whole)))
    num_split = 0
    for path, param in nnx.to_flat_state(nnx.state(split)):
        expected = np.asarray(flat[path][...])
        shards = param[...].addressable_shards
        assert len(shards) == num_local
        for shard in shards:
            value, wanted = np.asarray(shard.data), expected[shard.index]
            assert (value.dtype, value.tobytes()) == (wanted.dtype, wanted.tobytes()), path
        num_split += not param[...].is_fully_replicated
    assert num_split >= 2 * split.config.num_layers


def check_family(name: str) -> None:
    """Both forms of a checkpoint, with copies of KV heads."""
    folder = load_reference(name).path
    config = copied(folder)
    whole = load_model(folder, config=config)
    with tempfile.TemporaryDirectory() as temporary:
        port(folder, Path(temporary, "ported"))
        for num_devices in COUNTS[config.num_q_heads]:
            for source in (folder, Path(temporary, "ported")):
                split = load_model(source, sharding=over(num_devices), config=config)
                assert_shards_are_slices(split, whole, num_devices)


def check_dtypes_and_scales() -> None:
    """Values are cast and scales repeated as where nothing is split."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = with_scales(Path(temporary, "scales"), "float attn_head")
        config = copied(folder)
        whole = load_model(folder, "bfloat16", config=config)
        split = load_model(folder, "bfloat16", sharding=over(3), config=config)
        assert_shards_are_slices(split, whole, 3)
        edit_tensors(folder, lambda t: t.update({Q_PROJ: np.full((96, 48), 1e5, np.float32)}))
        with pytest.raises(ValueError, match=r"q_proj.weight has values beyond 6.55e\+04"):
            load_model(folder, "float16", sharding=over(2))
        name = "model.layers.1.self_attn.k_scale"
        edit_tensors(folder, lambda t: t.update({name: np.array([1.0, -1.0], np.float32)}))
        with pytest.raises(ValueError, match=r"k_scale=\[ 1. -1.\]: scales must be positive"):
            load_model(folder, sharding=over(2))


def check_misfits_are_listed_before_anything_is_read() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(shutil.copytree(load_reference(TIED).path, Path(temporary, "model")))

        def edit(tensors: dict[str, np.ndarray]) -> None:
            del tensors["model.norm.weight"]
            tensors[Q_PROJ] = tensors[Q_PROJ][:, :-1].copy()
            tensors["surplus"] = np.zeros(3, np.float32)

        edit_tensors(folder, edit)
        with (
            mock.patch.object(HFCheckpoint, "read_slices", side_effect=AssertionError),
            pytest.raises(ValueError, match=r"(?s)missing: model.norm.*misshapen: .*unused: sur"),
        ):
            load_model(folder, sharding=over(2))


def check_only_what_is_needed_is_read(kind: str) -> None:
    """One of four devices of this process: its quarter, and nothing of the others'."""
    folder = load_reference(TIED).path
    with tempfile.TemporaryDirectory() as temporary:
        if kind == "ported":
            with mock.patch.object(chunks, "CHUNK_BYTES", 2048):
                port(folder, Path(temporary, "ported"))
            folder = Path(temporary, "ported")
        cls = PortedCheckpoint if kind == "ported" else HFCheckpoint
        read_slices, read = cls.read_slices, dict[str, int]()

        def counted(self: Any, name: str, slices: Any) -> list[np.ndarray]:
            values = read_slices(self, name, slices)
            assert name not in read, "a tensor is asked for once"
            read[name] = sum(value.size for value in values)
            return values

        quarter = _Quarter(over(4))
        with (
            mock.patch.object(cls, "read_slices", counted),
            mock.patch.object(cls, "read", side_effect=AssertionError),
            mock.patch.object(jax, "make_array_from_callback", quarter.make),
        ):
            load_model(folder, sharding=quarter.sharding)
        tensors = open_checkpoint(folder).tensors
        assert read.keys() == tensors.keys()
        for name, tensor in tensors.items():
            size = int(np.prod(tensor.shape))
            assert read[name] == (size if "norm" in name else size // 4), name


class _Quarter:
    """Shardings of which this process has the second of four devices alone."""

    def __init__(self, inner: ShardingOf):
        self._inner = inner

    def sharding(self, axes: tuple[str, ...], shape: tuple[int, ...]) -> Any:
        full = self._inner(axes, shape)
        device, index = list(full.addressable_devices_indices_map(shape).items())[1]
        return mock.Mock(
            device_set=full.device_set,
            is_fully_addressable=False,
            addressable_devices_indices_map=lambda _: {device: index},
            index=index,
        )

    def make(self, shape: Any, sharding: Any, callback: Any, dtype: Any) -> jax.Array:
        return jnp.asarray(callback(sharding.index))


def check_damage_is_noticed() -> None:
    """Of chunks that a device needs; of folders that have no checksums of chunks, too."""
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary, "ported")
        with mock.patch.object(chunks, "CHUNK_BYTES", 2048):
            port(load_reference(TIED).path, out)
        value = load_file(load_reference(TIED).path / "model.safetensors")[DOWN]
        (file,) = (
            file
            for file in (out / "params").rglob("*")
            if file.is_file() and value[:1, :8].tobytes() in file.read_bytes()
        )
        data = bytearray(file.read_bytes())
        data[data.index(value[:1, :8].tobytes()) + 5] ^= 0x10
        file.write_bytes(data)
        manifest = json.loads((out / "port.json").read_text())
        message = r"down_proj.weight cannot be read \(a chunk of .*down_proj.weight has not the ch"
        with pytest.raises(ValueError, match=message):
            load_model(out, sharding=over(2))
        reader = open_checkpoint(out)
        right = (slice(0, 32), slice(32, 64))
        np.testing.assert_array_equal(reader.read_slices(DOWN, [right])[0], value[right])
        for entry in manifest["tensors"].values():
            del entry["chunks"]
        (out / "port.json").write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match=r"down_proj.weight has not the checksum it was porte"):
            load_model(out, sharding=over(2))


def check_drawn_weights(num_devices: int) -> None:
    folder = load_reference("llama-yarn").path
    config = copied(folder)
    whole = init_model(folder, "bfloat16", seed=3, config=config)
    with mock.patch.object(loader, "_DRAWN_BYTES", 20_000):
        split = init_model(folder, "bfloat16", 3, config, over(num_devices))
    assert_shards_are_slices(split, whole, num_devices)


def flags_for(num_devices: int) -> str:
    """Returns XLA's flags for a process with so many devices; the last of a kind counts."""
    return f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={num_devices}"


def check_process(number: int, coordinator: str, ported: Path) -> None:
    """One of two processes with two devices each: its two of four slices, from either form."""
    jax.distributed.initialize(coordinator, 2, number)
    assert (jax.device_count(), jax.local_device_count()) == (4, 2)
    folder = load_reference(TIED).path
    whole = load_model(folder)
    for source in (folder, ported):
        split = load_model(source, sharding=over(4))
        assert_shards_are_slices(split, whole, num_local=2)
    drawn = init_model(folder, seed=3, sharding=over(4))
    assert_shards_are_slices(drawn, init_model(folder, seed=3), num_local=2)


def test_two_processes_have_their_slices(tmp_path):
    port(load_reference(TIED).path, tmp_path / "ported")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    spawn = multiprocessing.get_context("spawn")
    with (
        mock.patch.dict(os.environ, {"XLA_FLAGS": flags_for(2)}),
        concurrent.futures.ProcessPoolExecutor(2, mp_context=spawn) as pool,
    ):
        arguments = coordinator, tmp_path / "ported"
        processes = [pool.submit(check_process, number, *arguments) for number in range(2)]
        for process in processes:
            process.result(timeout=120)


@pytest.fixture(scope="module")
def in_child() -> Iterator[Callable[..., None]]:
    """Calls a function in a process that has `NUM_DEVICES` devices; it and the rest pickle."""
    spawn = multiprocessing.get_context("spawn")
    with (
        mock.patch.dict(os.environ, {"XLA_FLAGS": flags_for(NUM_DEVICES)}),
        concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool,
    ):
        assert pool.submit(jax.device_count).result() == NUM_DEVICES
        yield lambda function, *args: pool.submit(function, *args).result()


@pytest.mark.parametrize("name", REFERENCES)
def test_every_shard_is_the_slice_of_the_whole(name, in_child):
    in_child(check_family, name)


def test_dtypes_and_scales(in_child):
    in_child(check_dtypes_and_scales)


def test_misfits_are_listed_before_anything_is_read(in_child):
    in_child(check_misfits_are_listed_before_anything_is_read)


@pytest.mark.parametrize("kind", ["hf", "ported"])
def test_only_what_is_needed_is_read(kind, in_child):
    in_child(check_only_what_is_needed_is_read, kind)


def test_damage_is_noticed(in_child):
    in_child(check_damage_is_noticed)


@pytest.mark.parametrize("num_devices", [2, 4])
def test_drawn_weights_are_the_slices_of_the_whole(num_devices, in_child):
    in_child(check_drawn_weights, num_devices)


# --- slices of a tensor ---------------------------------------------------------------------------

SHAPE = (60, 36)
SLICES = [
    (slice(0, 60), slice(0, 36)),
    (slice(7, 23), slice(0, 36)),
    (slice(0, 60), slice(5, 13)),
    (slice(59, 60), slice(35, 36)),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Returns a tensor, and the two forms of a checkpoint with it, in many small chunks."""
    value = np.arange(60 * 36, dtype=np.float32).reshape(SHAPE)
    hf, ported = (tmp_path_factory.mktemp(kind) for kind in ("hf", "ported"))
    shutil.copytree(load_reference(TIED).path, hf, dirs_exist_ok=True)
    tensors = load_file(hf / "model.safetensors") | {"x.rotary_emb.inv_freq": value}
    save_file(tensors, hf / "model.safetensors")
    with mock.patch.object(chunks, "CHUNK_BYTES", 512):
        port(hf, ported / "model")
    return value, hf, ported / "model"


@pytest.mark.parametrize("kind", ["hf", "hf in blocks", "ported", "ported before"])
def test_slices_are_those_of_the_tensor(kind, folders, monkeypatch, tmp_path):
    value, hf, ported = folders
    if kind == "hf in blocks":
        monkeypatch.setattr("pallas_paged.models.checkpoint._MAPPED_BYTES", 5 * 36 * 4)
    if kind == "ported before":
        ported = Path(shutil.copytree(ported, tmp_path / "before"))
        manifest = json.loads((ported / "port.json").read_text())
        for entry in manifest["tensors"].values():
            del entry["chunks"]
        (ported / "port.json").write_text(json.dumps(manifest))
    checkpoint = open_checkpoint(hf if kind.startswith("hf") else ported)
    found = checkpoint.read_slices("x.rotary_emb.inv_freq", SLICES)
    for index, part in zip(SLICES, found, strict=True):
        np.testing.assert_array_equal(part, value[index])


def test_chunks_that_nobody_needs_are_not_read(folders):
    value, _, ported = folders
    name = "x.rotary_emb.inv_freq"
    entry = json.loads((ported / "port.json").read_text())["tensors"][name]
    sums = Checksums.from_json(entry, SHAPE)
    assert sums.shape == (10, 12)
    tensor = Tensor(name, SHAPE, "float32")
    reader = chunks.ChunkReader(ported / "params")
    assert reader._open(tensor).chunk_layout.read_chunk.shape == sums.shape
    index = (slice(10, 20), slice(12, 36))
    all_chunks = chunks.chunks_of(SHAPE, (10, 12))
    needed = [chunk[0] == index[0] and chunk[1].start >= 12 for chunk in all_chunks]
    assert sum(needed) == 2
    wrong = tuple(crc ^ (not used) for crc, used in zip(sums.chunks, needed, strict=True))
    (part,) = reader.read(tensor, sums._replace(chunks=wrong), [index])
    np.testing.assert_array_equal(part, value[index])
    wrong = tuple(crc ^ used for crc, used in zip(sums.chunks, needed, strict=True))
    with pytest.raises(ValueError, match=r"a chunk of x.rotary_emb.inv_freq has not the chec"):
        reader.read(tensor, sums._replace(chunks=wrong), [index])


@pytest.mark.parametrize(
    ("shape", "itemsize", "chunk"),
    [
        ((), 4, ()),
        ((1024, 1024), 4, (1024, 1024)),
        ((14336, 4096), 2, (1792, 1024)),
        ((128256, 4096), 2, (2004, 1024)),
        ((32003, 4096), 2, (32003, 4096)),  # a prime, and rows alone would be crumbs
    ],
)
def test_chunks_of_large_tensors(shape, itemsize, chunk):
    assert chunks.chunk_shape(shape, itemsize) == chunk


@pytest.mark.parametrize(
    "damage", [{"shape": [10, 10]}, {"crc32": [1]}, {"shape": 3}, {"shape": None}]
)
def test_a_manifest_with_other_chunks_is_refused(folders, tmp_path, damage):
    copy = Path(shutil.copytree(folders[2], tmp_path / "copy"))
    manifest = json.loads((copy / "port.json").read_text())
    manifest["tensors"]["x.rotary_emb.inv_freq"]["chunks"] |= damage
    (copy / "port.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"port.json is damaged"):
        open_checkpoint(copy)


def test_a_tied_head_is_compared_in_blocks(tmp_path, monkeypatch):
    folder = Path(shutil.copytree(load_reference(TIED).path, tmp_path / "model"))
    monkeypatch.setattr("pallas_paged.models.matching._COMPARED_BYTES", 1000)
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    edit_tensors(folder, lambda t: t.update({head: t[embedding]}))
    port(folder, tmp_path / "ported")
    for source in (folder, tmp_path / "ported"):
        load_model(source)
    last = load_file(folder / "model.safetensors")[embedding]
    last[-1, -1] += 1
    edit_tensors(folder, lambda t: t.update({head: last}))
    with pytest.raises(ValueError, match=r"lm_head.weight differs from model.embed_tokens.we"):
        load_model(folder)
    edit_config(folder, tie_word_embeddings=False)
    load_model(folder)
