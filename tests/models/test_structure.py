"""What the engine relies on: the split state under `jax.jit`, donation, sharding names."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_paged.models import load_model
from pallas_paged.models.tensors import tensors_of, with_tensors
from tests.models.paged_run import BLOCK_SIZE, step
from tests.models.references import REFERENCES, load_reference

AXES = {"vocab", "embed", "heads", "kv_heads", "mlp", "positions", "word_embed", "head_dim"}
AXES |= {"qkv", "gate_up"}


@pytest.mark.parametrize("name", REFERENCES)
def test_every_parameter_has_the_names_of_its_axes(name):
    model = load_model(load_reference(name).path)
    for path, param in nnx.to_flat_state(nnx.state(model)):
        assert len(param.out_sharding) == param[...].ndim, path
        assert set(param.out_sharding) <= AXES, path
    by_name = {".".join(map(str, path)): p for path, p in nnx.to_flat_state(nnx.state(model))}
    for name, param in by_name.items():
        for part, axes in (("qkv_proj.bias", ("kv_heads", "qkv")), ("embed_tokens", ("vocab",))):
            if part in name:
                assert param.out_sharding[: len(axes)] == axes, name


def test_a_device_that_has_a_kv_head_has_all_that_belongs_to_it():
    """The first half of a merged parameter's sharded axis is the first half of each tensor."""
    path = load_reference("llama-gqa-llama3").path
    state = nnx.state(load_model(path))
    tensors = tensors_of(state)
    for name in ("self_attn.qkv_proj.weight", "self_attn.qkv_proj.bias", "mlp.gate_up_proj.weight"):
        merged = state["model"]["layers"][1]
        for key in name.split("."):
            merged = merged[key]
        axis = merged.out_sharding.index("mlp" if "gate" in name else "kv_heads")
        half = jnp.split(merged[...], 2, axis)[0]
        held = np.sort(np.asarray(half).reshape(-1))
        *parents, _, leaf = ("model.layers.1." + name).split(".")
        parts = [
            np.asarray(tensors[".".join((*parents, part.module, leaf))]) for part in merged.parts
        ]
        assert sum(part.size for part in parts) == merged[...].size
        halves = np.concatenate([part[: len(part) // 2].reshape(-1) for part in parts])
        np.testing.assert_array_equal(held, np.sort(halves))


def test_tensors_go_back_to_where_they_were():
    state = nnx.state(load_model(load_reference("opt-prenorm").path))
    tensors = {name: 2 * value for name, value in tensors_of(state).items()}
    doubled = with_tensors(state, tensors)
    assert jax.tree.structure(doubled) == jax.tree.structure(state)
    for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(doubled), strict=True):
        np.testing.assert_array_equal(2 * before, after)


def test_axis_names_become_a_sharding():
    state = nnx.state(load_model(load_reference("llama-gqa-llama3").path))
    rules = (("heads", "tensor"), ("kv_heads", "tensor"), ("mlp", "tensor"), ("vocab", "tensor"))
    rules += (("embed", None), ("qkv", None), ("gate_up", None))
    with nnx.logical_axis_rules(rules):
        spec = nnx.get_partition_spec(state)
    layer = spec["model"]["layers"][0]
    qkv = layer["self_attn"]["qkv_proj"]["weight"]
    assert qkv.get_value() == jax.P("tensor", None, None)
    assert layer["self_attn"]["o_proj"]["weight"].get_value() == jax.P(None, "tensor")
    assert layer["mlp"]["down_proj"]["bias"].get_value() == jax.P(None)


def decode_arguments(name: str, num_blocks: int, num_seqs: int = 4) -> tuple:
    model = load_model(load_reference(name).path)
    config = model.config
    rows = np.arange(num_seqs, dtype=np.int32)
    places = {
        "positions": 0 * rows,
        "slot_mapping": (rows + 1) * BLOCK_SIZE,
        "block_tables": (rows + 1)[:, None],
        "seq_lens": 0 * rows + 1,
        "query_start_loc": np.arange(num_seqs + 1, dtype=np.int32),
    }
    caches = tuple(s.zeros(num_blocks) for s in config.cache_specs(BLOCK_SIZE, jnp.float32))
    graph, state = nnx.split(model)
    return graph, 1, state, rows, places, caches


@pytest.mark.parametrize("name", ["llama-gqa-llama3", "opt-prenorm"])
def test_the_compiled_decode_step_copies_neither_caches_nor_weights(name):
    arguments = decode_arguments(name, num_blocks=5001)
    caches = arguments[-1]
    compiled = step.lower(*arguments).compile()
    text = compiled.as_text()

    aliases = text.partition("input_output_alias={")[2].partition("entry_computation_layout")[0]
    assert aliases.count("-alias)") == 2 * len(caches)

    weights = [x for x in jax.tree.leaves(arguments[2]) if x.ndim > 1]
    shapes = {",".join(map(str, x.shape)) for x in (*weights, *jax.tree.leaves(caches))}
    moved = re.findall(r"f32\[([\d,]*)\]\S* (?:copy|transpose)(?:-start)?\(", text)
    assert moved, "the pattern must find the copies of small arrays that there are"
    assert not shapes & set(moved)
    assert compiled.memory_analysis().temp_size_in_bytes < caches[0].k.nbytes

    _, updated = step(*arguments)
    assert all(x.is_deleted() for x in jax.tree.leaves(caches))
    written = np.asarray(updated[0].k)
    assert np.abs(written[1:5, :, 0]).min() > 0
    assert not written[5:].any()


def test_split_state_round_trips_through_jit():
    model = load_model(load_reference("opt-postnorm-projected").path)
    graph, state = nnx.split(model)

    @jax.jit
    def doubled(state):
        model = nnx.merge(graph, state)
        return nnx.state(jax.tree.map(lambda x: 2 * x, model))

    for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(doubled(state)), strict=True):
        np.testing.assert_array_equal(2 * before, after)


def test_a_second_load_needs_no_second_trace():
    graphs = [nnx.split(load_model(load_reference("opt-prenorm").path))[0] for _ in range(2)]
    assert graphs[0] == graphs[1]
    assert hash(graphs[0]) == hash(graphs[1])
