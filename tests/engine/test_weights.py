"""Other weights in the place of an engine's: taken as they are, checked, seen by every token."""

import gc
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_paged.engine import LLM, RequestOutputKind, SamplingParams
from pallas_paged.models import CausalLM, load_config, load_model
from pallas_paged.models.demo import DEMO_MODEL
from pallas_paged.models.llama import LlamaConfig
from pallas_paged.models.tensors import tensors_of

PROMPTS = [
    "def main():\n",
    "class Tree:\n    def __init__(self" * 4,
    "import os, sys\n\n",
    "x = [1, 2",
]
"""The second one fills blocks, which are cached."""
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
OPTIONS: dict[str, Any] = {"max_num_seqs": 4, "num_blocks": 65, "background_compilation": False}


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return load_model(DEMO_MODEL, "float32")


@pytest.fixture(scope="module")
def other() -> nnx.State:
    """Weights of the same shape that give other tokens."""
    state = nnx.state(load_model(DEMO_MODEL, "float32"))
    keys = iter(jax.random.split(jax.random.key(1), 1000))
    return jax.tree.map(lambda x: x + 0.02 * jax.random.normal(next(keys), x.shape, x.dtype), state)


@pytest.fixture(scope="module")
def llm(model: CausalLM) -> LLM:
    return LLM.from_model(model, DEMO_MODEL, **OPTIONS)


@pytest.fixture(scope="module")
def expected(model: CausalLM, other: nnx.State) -> dict[str, list[tuple[int, ...]]]:
    """Greedy tokens of both, each by an engine that has had no other weights."""
    graph = nnx.graphdef(model)
    return {
        "model": tokens(LLM.from_model(model, DEMO_MODEL, **OPTIONS)),
        "other": tokens(LLM.from_model(nnx.merge(graph, other), DEMO_MODEL, **OPTIONS)),
    }


def tokens(llm: LLM, params: SamplingParams = GREEDY) -> list[tuple[int, ...]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params, use_tqdm=False)]


def pointers(state: Any) -> list[int]:
    return sorted(leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state))


def num_traces(llm: LLM) -> int:
    return sum(llm.runner.programs.num_traces.values())


def live_bytes() -> int:
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


# --- a model in memory ----------------------------------------------------------------------------


def test_a_module_serves_as_its_folder_does(llm: LLM, model: CausalLM) -> None:
    llm.update_weights(model)
    of_folder = LLM(DEMO_MODEL, dtype="float32", **OPTIONS)
    assert tokens(llm) == tokens(of_folder)
    assert llm.get_tokenizer().get_vocab() == of_folder.get_tokenizer().get_vocab()
    assert pointers(llm.runner.programs.params) == pointers(nnx.state(model))


@pytest.mark.parametrize("nested", [False, True])
def test_a_configuration_and_named_tensors_serve_alike(
    model: CausalLM, expected: dict[str, Any], nested: bool
) -> None:
    config = load_config(DEMO_MODEL)
    assert isinstance(config, LlamaConfig)
    state: dict[str, Any] = tensors_of(nnx.state(model))
    if nested:
        tree: dict[str, Any] = {}
        for name, value in state.items():
            *parents, leaf = name.split(".")
            at = tree
            for parent in parents:
                at = at.setdefault(parent, {})
            at[leaf] = np.asarray(value)
        state = tree
    llm = LLM.from_model(config, DEMO_MODEL, state=state, **OPTIONS)
    assert tokens(llm) == expected["model"]


def test_without_a_tokenizer_tokens_come_out(model: CausalLM) -> None:
    llm = LLM.from_model(model, eos_token_ids=[1], **OPTIONS)
    (output,) = llm.generate({"prompt_token_ids": [5, 6, 7]}, GREEDY, use_tqdm=False)
    assert output.outputs[0].text is None
    assert len(output.outputs[0].token_ids) == GREEDY.max_tokens
    with pytest.raises(ValueError, match="no tokenizer"):
        llm.generate("text", GREEDY, use_tqdm=False)
    assert llm.get_default_sampling_params() == SamplingParams()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("models/demo",), "LLM\\(folder\\) loads a folder"),
        ((load_config(DEMO_MODEL),), "and the weights as state"),
        ((nnx.Linear(2, 2, rngs=nnx.Rngs(0)),), "must be a module of pallas_paged.models"),
    ],
)
def test_what_is_no_model_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLM.from_model(*arguments)


def test_a_model_in_memory_is_refused_with_what_it_cannot_do(model: CausalLM) -> None:
    with pytest.raises(ValueError, match="load_format='dummy'"):
        LLM.from_model(model, load_format="dummy", **OPTIONS)
    with pytest.raises(ValueError, match=r"tokenizer=.* must be a tokenizer of transformers"):
        LLM.from_model(model, object(), **OPTIONS)


def test_another_dtype_is_made(model: CausalLM) -> None:
    llm = LLM.from_model(model, DEMO_MODEL, dtype="bfloat16", **OPTIONS)
    of_folder = LLM(DEMO_MODEL, dtype="bfloat16", **OPTIONS)
    assert tokens(llm) == tokens(of_folder)
    update = llm.update_weights(model)
    assert len(update.cast) == len(jax.tree.leaves(nnx.state(model)))
    assert tokens(llm) == tokens(of_folder)


# --- other weights --------------------------------------------------------------------------------


def test_new_weights_take_the_place_of_the_old_ones(
    llm: LLM, model: CausalLM, other: nnx.State, expected: dict[str, Any]
) -> None:
    llm.update_weights(model)
    assert tokens(llm) == expected["model"]
    version = llm.weights_version
    update = llm.update_weights(other)
    assert (update.version, llm.weights_version) == (version + 1, version + 1)
    assert update.num_taken == len(jax.tree.leaves(other))
    assert (update.cast, update.made, update.moved) == ((), (), ())
    assert pointers(llm.runner.programs.params) == pointers(other)
    assert tokens(llm) == expected["other"]  # so the prompts' blocks were not found again
    assert expected["other"] != expected["model"]
    llm.engine.check_idle()


def test_tensors_are_joined_in_the_memory_of_those_that_they_replace(
    llm: LLM, other: nnx.State, model: CausalLM, expected: dict[str, Any]
) -> None:
    state = tensors_of(other)
    for _ in range(2):  # then the merged parameters are the engine's own
        update = llm.update_weights(state)
    assert len(update.made) == 2 * load_config(DEMO_MODEL).num_layers
    assert all("qkv_proj" in name or "gate_up_proj" in name for name in update.made)
    before, made = set(pointers(llm.runner.programs.params)), live_bytes()
    llm.update_weights(state)
    assert set(pointers(llm.runner.programs.params)) == before
    assert live_bytes() == made
    assert tokens(llm) == expected["other"]
    llm.update_weights(nnx.state(model))
    assert {x.is_deleted() for x in jax.tree.leaves(other)} == {False}


def test_a_mapping_renames_and_transforms(
    llm: LLM, other: nnx.State, model: CausalLM, expected: dict[str, Any]
) -> None:
    def flipped(x: jax.Array) -> jax.Array:
        return x.T

    theirs: dict[str, Any] = {}
    for name, value in tensors_of(other).items():
        if name.startswith("model.layers.") and value.ndim == 2:
            *_, layer, part, module, _ = name.split(".")
            theirs[f"blocks.{layer}.{part}.{module}.kernel"] = value.T
        else:
            theirs[name] = value
    mapping = {"blocks.*.*.*.kernel": ("model.layers.*.*.*.weight", flipped)}
    llm.update_weights(theirs, mapping)
    assert tokens(llm) == expected["other"]
    theirs["blocks.0.mlp.up_proj.kernel"] = theirs["blocks.0.mlp.up_proj.kernel"].T
    with pytest.raises(ValueError, match=r"misshapen: .*\(here blocks.0.mlp.up_proj.kernel\)"):
        llm.update_weights(theirs, mapping)
    with pytest.raises(ValueError, match="as many \\*"):
        llm.update_weights(theirs, {"blocks.*.x": "y"})
    llm.update_weights(model)


def test_a_wrong_state_is_refused_by_name_and_the_old_one_stays(
    llm: LLM, model: CausalLM, other: nnx.State, expected: dict[str, Any]
) -> None:
    llm.update_weights(model)
    version = llm.weights_version
    state = tensors_of(other)
    down, up, norm = (
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.2.mlp.up_proj.weight",
        "model.norm.weight",
    )
    deleted = jnp.array(state[norm])
    deleted.delete()
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({norm: None}, [f"missing: {norm}, (192,)"]),
        ({"extra": state[norm]}, ["unused: extra, (192,)"]),
        ({down: state[down].T}, [f"misshapen: {down} is (512, 192), in the model (192, 512)"]),
        ({up: state[up].astype(jnp.int8)}, [f"of dtype int8: {up}"]),
        ({up: np.asarray(state[up], np.float64)}, [f"of dtype float64: {up}"]),
        ({norm: deleted}, [f"{norm} has been deleted"]),
        ({norm: 3.0}, [f"{norm} is of type float"]),
        ({norm: None, down: state[down].T, "extra": state[norm]}, [norm, down, "extra"]),
    ]
    for changes, messages in cases:
        wrong = {name: value for name, value in (state | changes).items() if value is not None}
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            llm.update_weights(wrong)
        for message in messages:
            assert message in str(caught.value)
    with pytest.raises(ValueError, match="mode='now' must be one of"):
        llm.update_weights(other, mode="now")
    assert llm.weights_version == version
    assert tokens(llm) == expected["model"]


def test_values_too_large_for_float16_are_refused_before_anything_changes(
    model: CausalLM,
) -> None:
    llm = LLM.from_model(model, DEMO_MODEL, dtype="float16", **OPTIONS)
    before = tokens(llm)
    large = jax.tree.map(lambda x: x, nnx.state(model))
    large["model"]["norm"]["weight"] = large["model"]["norm"]["weight"].replace(
        large["model"]["norm"]["weight"][...].at[3].set(1e6)
    )
    with pytest.raises(ValueError, match=r"beyond 6.55e\+04.*model.norm.weight"):
        llm.update_weights(large)
    assert tokens(llm) == before


@pytest.mark.parametrize("kind", ["own", "tensors"])
def test_a_thousand_updates_compile_nothing_and_leak_nothing(
    llm: LLM, model: CausalLM, other: nnx.State, kind: str, expected: dict[str, Any]
) -> None:
    make = (lambda x: x) if kind == "own" else tensors_of
    states = [make(nnx.state(model)), make(other)]
    for state in [*states, *states]:
        llm.update_weights(state)
        tokens(llm)
    live, traces = live_bytes(), num_traces(llm)
    with jax.log_compiles(False), _no_compilation():
        for number in range(1000):
            llm.update_weights(states[number % 2])
            if number % 100 < 2:
                assert tokens(llm) == expected["other" if number % 2 else "model"]
    assert num_traces(llm) == traces
    assert live_bytes() == live
    llm.engine.check_idle()


class _no_compilation:  # noqa: N801
    """Fails where anything is compiled inside."""

    def __enter__(self) -> None:
        self._events: list[str] = []
        jax.monitoring.register_event_duration_secs_listener(self._take)

    def _take(self, event: str, duration: float, **_: object) -> None:
        if "backend_compile" in event:
            self._events.append(event)

    def __exit__(self, *error: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._take)
        assert error[0] is not None or not self._events


def test_donated_weights_are_named_as_such(model: CausalLM) -> None:
    mine = jax.tree.map(jnp.copy, nnx.state(model))
    llm = LLM.from_model(nnx.merge(nnx.graphdef(model), mine), DEMO_MODEL, **OPTIONS)
    tokens(llm)
    stepped = jax.jit(lambda state: jax.tree.map(lambda x: x * 1.0, state), donate_argnums=0)(mine)
    with pytest.raises(RuntimeError, match=r"donated to another program.*update_weights"):
        llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)
    llm.update_weights(stepped)
    assert tokens(llm) == tokens(LLM.from_model(model, DEMO_MODEL, **OPTIONS))


# --- requests that run meanwhile ------------------------------------------------------------------


@pytest.fixture
def streaming(llm: LLM, model: CausalLM) -> Any:
    """Requests of which each has had some tokens, and what they get from there on."""
    llm.update_weights(model)
    return llm.stream(PROMPTS, [GREEDY] * len(PROMPTS))


def _advance(streaming: Any, num_tokens: int) -> dict[str, Any]:
    """Reads until every request has so many tokens."""
    last: dict[str, Any] = {}
    while len(last) < len(PROMPTS) or any(
        len(output.outputs[0].token_ids) < num_tokens for output in last.values()
    ):
        output = next(streaming)
        last[output.request_id] = output
        (completion,) = output.outputs
        assert len(completion.weights_versions) == len(completion.token_ids)
    return last


def test_waiting_lets_requests_end_with_the_old_weights(
    llm: LLM, other: nnx.State, streaming: Any, expected: dict[str, Any]
) -> None:
    last = _advance(streaming, 4)
    version = llm.weights_version
    llm.update_weights(other, mode="wait")
    last |= {output.request_id: output for output in streaming}
    outputs = [last[name].outputs[0] for name in sorted(last, key=lambda n: int(n[8:]))]
    assert [output.token_ids for output in outputs] == expected["model"]
    assert {output.weights_versions for output in outputs} == {(version,) * 20}
    assert tokens(llm) == expected["other"]


def test_aborting_ends_requests_as_they_are(
    llm: LLM, other: nnx.State, streaming: Any, expected: dict[str, Any]
) -> None:
    _advance(streaming, 4)
    llm.update_weights(other, mode="abort")
    outputs = list(streaming)
    assert {output.outputs[0].finish_reason for output in outputs} == {"abort"}
    assert len(outputs) == len(PROMPTS)
    assert all(4 <= len(output.outputs[0].token_ids) < 20 for output in outputs)
    assert tokens(llm) == expected["other"]


def test_keeping_lets_requests_go_on_with_new_weights_alone(
    llm: LLM, other: nnx.State, streaming: Any, expected: dict[str, Any]
) -> None:
    last = _advance(streaming, 4)
    version = llm.weights_version
    llm.update_weights(other, mode="keep")
    last |= {output.request_id: output for output in streaming}
    names = sorted(last, key=lambda name: int(name[8:]))
    for prompt, name, old in zip(PROMPTS, names, expected["model"], strict=True):
        (output,) = last[name].outputs
        versions = output.weights_versions
        num_old = versions.count(version)
        assert versions == (version,) * num_old + (version + 1,) * (20 - num_old)
        assert 4 <= num_old < 20
        assert output.token_ids[:num_old] == old[:num_old]
        # What follows is what an engine of the new weights alone makes of the same tokens.
        ids = (*last[name].prompt_token_ids, *old[:num_old])
        rest = SamplingParams(temperature=0, max_tokens=20 - num_old, ignore_eos=True)
        (again,) = llm.generate({"prompt_token_ids": ids}, rest, use_tqdm=False)
        assert again.outputs[0].token_ids == output.token_ids[num_old:], prompt


def test_every_token_of_held_requests_has_its_version(
    llm: LLM, model: CausalLM, other: nnx.State
) -> None:
    """Updates from another thread fall between the steps of `generate`, which gives all at once."""
    llm.update_weights(model)
    params = SamplingParams(temperature=1, n=2, seed=3, max_tokens=200, ignore_eos=True)
    found: list[Any] = []
    thread = threading.Thread(
        target=lambda: found.extend(llm.generate(PROMPTS[:2], params, use_tqdm=False))
    )
    first = llm.weights_version
    thread.start()
    states = [other, nnx.state(model)]
    while thread.is_alive():
        llm.update_weights(states[llm.weights_version % 2], mode="keep")
        time.sleep(0.05)
    thread.join()
    completions = [completion for output in found for completion in output.outputs]
    assert len(completions) == 4
    for completion in completions:
        versions = completion.weights_versions
        assert len(versions) == len(completion.token_ids) == 200
        assert list(versions) == sorted(versions)
        assert versions[0] >= first
    assert len({version for c in completions for version in c.weights_versions}) > 1


def test_deltas_have_versions_too(llm: LLM, model: CausalLM, other: nnx.State) -> None:
    llm.update_weights(model)
    version = llm.weights_version
    params = SamplingParams(
        temperature=0, max_tokens=12, ignore_eos=True, output_kind=RequestOutputKind.DELTA
    )
    stream, versions = llm.stream(PROMPTS[:1], params), list[int]()
    for number, output in enumerate(stream):
        (completion,) = output.outputs
        assert len(completion.weights_versions) == len(completion.token_ids)
        versions += completion.weights_versions
        if number == 3:
            llm.update_weights(other, mode="keep")
    assert len(versions) == 12
    assert versions == sorted(versions)
    assert set(versions) == {version, version + 1}


@pytest.mark.parametrize("swap_space", [0, 0.01])
def test_preempted_and_swapped_requests_go_on_too(
    model: CausalLM, other: nnx.State, swap_space: float
) -> None:
    options = OPTIONS | {"num_blocks": 9, "swap_space": swap_space}
    if swap_space:
        options["preemption_mode"] = "swap"
    llm = LLM.from_model(model, DEMO_MODEL, **options)
    stream = llm.stream(PROMPTS, SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))
    last: dict[str, Any] = {}
    for output in stream:
        last[output.request_id] = output
        if llm.engine.core.scheduler.num_preemptions > 2 and not llm.weights_version:
            assert llm.engine.core.scheduler.num_waiting
            llm.update_weights(other, mode="keep")
            llm.engine.core.scheduler.check_invariants()
    assert llm.weights_version == 1
    assert all(len(output.outputs[0].token_ids) == 60 for output in last.values())
    llm.engine.check_idle()


def test_pinned_prefixes_are_computed_again(
    llm: LLM, model: CausalLM, other: nnx.State, expected: dict[str, Any]
) -> None:
    llm.update_weights(model)
    prefix = "class Tree:\n    def __init__(self" * 3
    assert llm.pin_prefix(prefix) >= 16
    llm.update_weights(other)
    (output,) = llm.generate(prefix, GREEDY, use_tqdm=False)
    assert output.num_cached_tokens >= 16
    fresh = SamplingParams(
        temperature=0, max_tokens=20, ignore_eos=True, skip_reading_prefix_cache=True
    )
    (alone,) = llm.generate(prefix, fresh, use_tqdm=False)
    assert output.outputs[0].token_ids == alone.outputs[0].token_ids
    llm.unpin_prefix(prefix)
    llm.engine.check_idle()


# --- projections apart ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def apart(model: CausalLM) -> LLM:
    """An engine that keeps them apart, of a module that merges them."""
    return LLM.from_model(model, DEMO_MODEL, merge_projections=False, **OPTIONS)


def test_projections_apart_give_the_same_tokens_and_take_tensors_as_they_are(
    apart: LLM, model: CausalLM, other: nnx.State, expected: dict[str, Any]
) -> None:
    apart.update_weights(model)
    assert tokens(apart) == expected["model"]
    state = tensors_of(other)
    update = apart.update_weights(state)
    assert (update.made, update.cast, update.moved) == ((), (), ())
    assert pointers(apart.runner.programs.params) == pointers(state)
    assert tokens(apart) == expected["other"]
    update = apart.update_weights(other)  # a merged one is cut
    assert len(update.made) == 5 * load_config(DEMO_MODEL).num_layers
    assert tokens(apart) == expected["other"]


def test_a_folder_serves_with_projections_apart(expected: dict[str, Any]) -> None:
    llm = LLM(DEMO_MODEL, dtype="float32", merge_projections=False, **OPTIONS)
    assert tokens(llm) == expected["model"]


# --- several devices ------------------------------------------------------------------------------


@pytest.mark.parametrize("num_devices", [2, 4])
def test_weights_are_divided_among_devices(
    model: CausalLM, other: nnx.State, expected: dict[str, Any], num_devices: int
) -> None:
    """With four devices each of the two KV heads is there twice."""
    llm = LLM.from_model(model, DEMO_MODEL, tensor_parallel_size=num_devices, **OPTIONS)
    assert tokens(llm) == expected["model"]
    for state in (other, tensors_of(other)):
        update = llm.update_weights(model)
        update = llm.update_weights(state)
        assert len(update.moved) == len(llm._weights._paths)
        assert tokens(llm) == expected["other"]
    # What lies there as the engine divides it is taken as it is.
    mine = llm.runner.programs.params
    update = llm.update_weights(mine) if num_devices == 2 else None
    if update is not None:
        assert update.moved == update.made == ()
        assert tokens(llm) == expected["other"]


def test_projections_apart_need_a_kv_head_for_each_device(model: CausalLM) -> None:
    options = OPTIONS | {"merge_projections": False}
    llm = LLM.from_model(model, DEMO_MODEL, tensor_parallel_size=2, **options)
    assert len(tokens(llm)) == len(PROMPTS)
    with pytest.raises(ValueError, match="kv_head_copies=2 needs merges_projections=True"):
        LLM.from_model(model, DEMO_MODEL, tensor_parallel_size=4, **options)
