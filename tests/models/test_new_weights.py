"""A caller's arrays become the parameters that loading their checkpoint gives, in every family."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_paged.models import load_config, load_model
from pallas_paged.models.given import GivenArrays
from pallas_paged.models.loader import open_checkpoint
from pallas_paged.models.matching import abstract_parameters
from pallas_paged.models.new_weights import make, merged_parameters, sources
from tests.models.references import REFERENCES, load_reference


def _made(config: Any, state: Any, dtype: str = "float32") -> dict[tuple[Any, ...], Any]:
    _, params = abstract_parameters(config, dtype)
    found = sources(config, params, GivenArrays(state), merged_parameters(config))
    return {
        path: source.given[0].array
        if source.recipe is None
        else make(source.recipe, [given.array for given in source.given])
        for path, source in found.items()
    }


def _loaded(name: str, config: Any) -> nnx.State:
    return nnx.state(load_model(load_reference(name).path, "float32", config=config))


def _assert_same(made: dict[tuple[Any, ...], Any], state: nnx.State) -> None:
    expected = nnx.to_flat_state(state)
    assert {path for path, _ in expected} == made.keys()
    for path, param in expected:
        np.testing.assert_array_equal(made[path], param[...], err_msg=str(path))


@pytest.mark.parametrize("merges", [True, False])
@pytest.mark.parametrize("name", REFERENCES)
def test_the_tensors_of_a_checkpoint(name: str, merges: bool) -> None:
    """By the names in the file, prefixes and tied embeddings included."""
    path = load_reference(name).path
    config = dataclasses.replace(load_config(path), merges_projections=merges)
    tensors: dict[str, Any] = {}
    checkpoint = open_checkpoint(path)
    checkpoint.read(list(checkpoint.tensors), tensors.__setitem__)
    _assert_same(_made(config, tensors), _loaded(name, config))


@pytest.mark.parametrize(
    ("name", "merges", "devices"),
    [
        *[(name, True, n) for name in ("llama-gqa-llama3", "opt-prenorm") for n in (1, 2)],
        *[(name, False, n) for name in ("llama-gqa-llama3", "opt-prenorm") for n in (1, 2)],
        *[("llama-mqa-linear", merges, 1) for merges in (True, False)],
        ("llama-mqa-linear", True, 2),
        ("llama-yarn", True, 4),  # two KV heads, each of them twice
    ],
)
def test_a_module_of_one_device(name: str, merges: bool, devices: int) -> None:
    """Its merged parameters are cut, and KV heads repeated, where the engine's are otherwise."""
    config = load_config(load_reference(name).path)
    shape = dataclasses.replace(config, merges_projections=merges).for_devices(devices)
    made = _made(shape, nnx.state(load_model(load_reference(name).path, "float32")))
    _assert_same(made, _loaded(name, shape))


def test_both_a_merged_parameter_and_its_parts_are_too_many() -> None:
    config = load_config(load_reference("qwen2-tied").path)
    state = nnx.state(load_model(load_reference("qwen2-tied").path, "float32"))
    arrays = {".".join(map(str, path)): param[...] for path, param in nnx.to_flat_state(state)}
    arrays["model.layers.0.self_attn.q_proj.weight"] = jnp.zeros((2, 2))
    with pytest.raises(ValueError, match=r"unused: model.layers.0.self_attn.q_proj.weight"):
        _made(config, arrays)


def test_a_tied_output_embedding_may_come_too_if_it_is_the_same() -> None:
    config = load_config(load_reference("llama-mha-tied").path)
    state = _loaded("llama-mha-tied", config)
    flat = {".".join(map(str, path)): param[...] for path, param in nnx.to_flat_state(state)}
    embedding = flat["model.embed_tokens.weight"]
    _assert_same(_made(config, flat | {"lm_head.weight": embedding}), state)
    _assert_same(_made(config, flat | {"lm_head.weight": jnp.array(embedding)}), state)
    with pytest.raises(ValueError, match=r"lm_head.weight differs from model.embed_tokens"):
        _made(config, flat | {"lm_head.weight": embedding + 1})


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": {"b": 1.0}}, "a.b is of type float"),
        ({"a": {"b": jnp.zeros(1)}, "a.b": jnp.zeros(1)}, "two arrays of the state have the name"),
        (3, "state is of type int"),
    ],
)
def test_what_is_no_state(state: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GivenArrays(state)


def test_names_come_from_wherever_an_array_stands() -> None:
    tree = {"a": [jnp.zeros(1), {"b": nnx.Param(jnp.ones(2))}], "c": (np.zeros(3),)}
    given = GivenArrays(tree, {"a.*.b": "x.*.y"}).given
    assert {name: each.shape for name, each in given.items()} == {
        "a.0": (1,),
        "x.1.y": (2,),
        "c.0": (3,),
    }
    assert given["x.1.y"].name == "a.1.b"
    with pytest.raises(ValueError, match=r"c.0 and d are both x"):
        GivenArrays({**tree, "d": jnp.zeros(1)}, {"c.0": "x", "d": "x"})


def test_a_transform_that_fails_is_named() -> None:
    with pytest.raises(ValueError, match=r"the transform of a, \(3,\), failed"):
        GivenArrays({"a": jnp.zeros(3)}, {"a": ("b", lambda x: jax.numpy.reshape(x, (2, 2)))})
