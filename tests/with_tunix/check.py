"""Tunix trains, and this engine samples for it; `make tunix-check` runs it.

Tunix's GRPO learner takes some steps with the demo model. Before the first and after each, log-
probabilities and greedy tokens of the engine are those of Tunix's own model and sampler. It prints
what it has compared, and the versions.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import logging
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import transformers
from flax import nnx
from tunix.models.llama3 import model as llama3
from tunix.models.llama3 import params as llama3_params
from tunix.models.qwen2 import model as qwen2
from tunix.models.qwen3 import model as qwen3
from tunix.rl import common, rl_cluster
from tunix.rl import utils as rl_utils
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout, vanilla_rollout

from pallas_paged.engine import LLM, SamplingParams
from pallas_paged.engine.tunix import PallasPagedRollout
from pallas_paged.models import load_model
from pallas_paged.models.demo import DEMO_MODEL

TOLERANCE = 1e-4
NUM_GENERATIONS, NUM_STEPS = 4, 3
PROMPTS = ["def main():\n    ", "class Stack:\n    ", "import os\n", "for i in range("]
ROLLOUT = base_rollout.RolloutConfig(
    max_tokens_to_generate=24,
    max_prompt_length=16,
    kv_cache_size=64,
    temperature=1.0,
    top_p=1.0,
    return_logprobs=True,
)
ENGINE: dict[str, Any] = {
    "max_num_seqs": 16,
    "max_num_batched_tokens": 64,
    "num_blocks": 200,
    "background_compilation": False,  # or it is counted where it is not asked for
}
DEMO = llama3.ModelConfig(
    num_layers=4,
    vocab_size=2048,
    embed_dim=192,
    hidden_dim=512,
    num_heads=4,
    head_dim=64,
    num_kv_heads=2,
    rope_theta=10000,
    norm_eps=1e-5,
    weight_tying=True,
)
SMALL: dict[str, Any] = {
    "num_layers": 2,
    "vocab_size": 2048,
    "embed_dim": 48,
    "hidden_dim": 80,
    "num_heads": 6,
    "head_dim": 16,
    "num_kv_heads": 2,
    "rope_theta": 3000,
    "norm_eps": 1e-6,
}


def make_tokenizer() -> Any:
    """Returns the demo model's tokenizer: it has no pad token, so that Tunix pads with EOS."""
    return transformers.AutoTokenizer.from_pretrained(DEMO_MODEL)


def make_mesh() -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))


def load_demo(mesh: jax.sharding.Mesh) -> llama3.Llama3:
    return llama3_params.create_model_from_safe_tensors(
        str(DEMO_MODEL), DEMO, mesh, dtype=jnp.float32
    )


def small_models() -> Iterator[tuple[str, nnx.Module]]:
    """Yields a model of each family, with biases and norms that are none of them 0 or 1."""
    for name, kind, config, fields in (
        ("llama3", llama3.Llama3, llama3.ModelConfig, {"weight_tying": False}),
        ("qwen2, tied", qwen2.Qwen2, qwen2.ModelConfig, {"use_tied_embedding": True}),
        ("qwen3", qwen3.Qwen3, qwen3.ModelConfig, {"use_tied_embedding": False}),
    ):
        model = kind(config(**SMALL, **fields), rngs=nnx.Rngs(0))
        rng = np.random.default_rng(0)

        def draw(x: jax.Array, rng: np.random.Generator = rng) -> jax.Array:
            centre, scale = (1.0, 0.3) if x.ndim == 1 else (0.0, min(x.shape) ** -0.5)
            return jnp.asarray(rng.normal(centre, scale, x.shape), x.dtype)

        nnx.update(model, jax.tree.map(draw, nnx.state(model, nnx.Param)))
        yield name, model


def vanilla(model: nnx.Module, tokenizer: Any) -> vanilla_rollout.VanillaRollout:
    config = model.config
    cache = base_rollout.CacheConfig(
        ROLLOUT.kv_cache_size, config.num_layers, config.num_kv_heads, config.head_dim
    )
    return vanilla_rollout.VanillaRollout(model, tokenizer, cache)


def padded(tokens: list[np.ndarray], length: int, pad_id: int) -> np.ndarray:
    rows = np.full((len(tokens), length), pad_id, np.int32)
    for row, mine in zip(rows, tokens, strict=True):
        row[: len(mine)] = mine
    return rows


def expected_logps(
    graphdef: Any, state: Any, prompts: np.ndarray, completions: np.ndarray, pad_id: int
) -> np.ndarray:
    """Returns what Tunix's model computes for the rows of a batch."""
    found = common.compute_per_token_logps(
        graphdef,
        state,
        prompt_tokens=jnp.asarray(prompts),
        completion_tokens=jnp.asarray(completions),
        pad_id=pad_id,
        eos_id=pad_id,
    )
    return np.asarray(found)


def compare(
    rollout: PallasPagedRollout, graphdef: Any, state: Any, output: base_rollout.RolloutOutput
) -> float:
    """Returns how far log-probabilities are from those of Tunix's model, at most; asserts it.

    They are the ones scored afterwards, and, if there are any, those of the samples themselves.
    """
    pad_id, length = rollout.pad_id(), ROLLOUT.max_tokens_to_generate
    completions = padded(output.tokens, length, pad_id)
    prompts = output.left_padded_prompt_tokens
    expected = expected_logps(graphdef, state, prompts, completions, pad_id)
    scored = np.asarray(rollout.get_per_token_logps(jnp.asarray(prompts), jnp.asarray(completions)))
    assert scored.shape == completions.shape
    assert scored.dtype == np.float32
    assert expected.std() > 0.5, "the model is indifferent, and nothing would be compared"
    differences = []
    for row, tokens in enumerate(output.tokens):
        mine = slice(0, len(tokens))
        differences.append(np.abs(scored[row, mine] - expected[row, mine]).max())
        if output.logprobs is not None:
            differences.append(np.abs(output.logprobs[row] - expected[row, mine]).max())
        behind = min(len(tokens) + 1, length)  # with EOS as padding, one more is scored
        assert not scored[row, behind:].any()
    assert max(differences) < TOLERANCE, max(differences)
    return float(max(differences))


def compare_greedy(
    rollout: PallasPagedRollout,
    own: vanilla_rollout.VanillaRollout,
    eos_tokens: list[int] | None = None,
    prompts: list[str] | None = None,
) -> int:
    """Returns how many greedy tokens are those of Tunix's sampler; asserts that all are.

    Then it takes a token that came for one that ends outputs.
    """
    prompts = prompts or [*PROMPTS, PROMPTS[0], " ".join("abcdefghijk")]
    config = dataclasses.replace(ROLLOUT, temperature=0.0, top_p=None, eos_tokens=eos_tokens)
    mine, theirs = rollout.generate(prompts, config), own.generate(prompts, config)
    np.testing.assert_array_equal(mine.left_padded_prompt_tokens, theirs.left_padded_prompt_tokens)
    for tokens, text, other, other_text in zip(
        mine.tokens, mine.text, theirs.tokens, theirs.text, strict=True
    ):
        ends = tokens[-1] in (eos_tokens or [rollout.eos_id()])  # Tunix's sampler leaves it out
        assert tokens.dtype == np.int32
        assert tokens[: len(tokens) - ends].tolist() == other.tolist()
        assert text == other_text
        assert ends or len(tokens) == config.max_tokens_to_generate
    num_tokens = sum(map(len, mine.tokens))
    if eos_tokens is None:
        some = [int(tokens[len(tokens) // 2]) for tokens in mine.tokens]
        fewer = compare_greedy(rollout, own, some, prompts)
        assert fewer < num_tokens
        num_tokens += fewer
    return num_tokens


@contextlib.contextmanager
def compilations() -> Iterator[list[float]]:
    """Gives a list to which every compilation inside is added, by its seconds."""
    seconds: list[float] = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


class Watched(PallasPagedRollout):
    """Compares itself with the trainer's model when it has got new weights."""

    def __init__(self, rollout_actor: Any, *args: Any, **kwargs: Any):
        self.differences: list[float] = []
        self.compiled: list[list[float]] = []
        self.versions: list[int] = []
        self.graphdef, self.state = nnx.split(rollout_actor)
        self.is_new = True
        super().__init__(rollout_actor, *args, **kwargs)

    def update_params(self, params: Any, filter_types: tuple[Any, ...] | None = None) -> None:
        with compilations() as compiled:
            super().update_params(params, filter_types)
        self.compiled.append(compiled)
        self.versions.append(self.llm.weights_version)
        self.state, self.is_new = params, True

    def generate(
        self, prompts: list[str], rollout_config: base_rollout.RolloutConfig, **kwargs: Any
    ) -> base_rollout.RolloutOutput:
        output = super().generate(prompts, rollout_config, **kwargs)
        if self.is_new:
            self.is_new = False
            self.differences.append(compare(self, self.graphdef, self.state, output))
        return output


def make_learner(
    engine: Any, reward: Any, rollout_config: base_rollout.RolloutConfig = ROLLOUT
) -> grpo_learner.GRPOLearner:
    mesh = make_mesh()
    roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)
    cluster = rl_cluster.RLCluster(
        actor=load_demo(mesh),
        reference=load_demo(mesh),
        tokenizer=make_tokenizer(),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, mesh),
            rollout_engine=engine,
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.adamw(1e-3),
                eval_every_n_steps=1000,
                max_steps=2 * NUM_STEPS,
                mini_batch_size=2,
                train_micro_batch_size=2,
            ),
            rollout_config=rollout_config,
        ),
    )
    config = grpo_learner.GRPOConfig(num_generations=NUM_GENERATIONS, num_iterations=2, beta=0.04)
    return grpo_learner.GRPOLearner(cluster, config, reward)


def check_grpo() -> None:
    """Lets Tunix's learner train; asserts that the engine always serves the trainer's weights."""
    seen: list[list[str]] = []

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        seen.append(list(completions))
        return [completion.count("e") / 10 for completion in completions]

    learner = make_learner(functools.partial(Watched, **ENGINE), reward)
    assert learner.should_sync_weights
    rollout = learner.rl_cluster.rollout
    before = rollout.generate(PROMPTS, dataclasses.replace(ROLLOUT, temperature=0.0))
    begin = time.monotonic()
    data = [{"prompts": np.array(PROMPTS[step % 2 :][:2])} for step in range(NUM_STEPS)]
    learner.train(data)
    seconds = time.monotonic() - begin
    after = rollout.generate(PROMPTS, dataclasses.replace(ROLLOUT, temperature=0.0))
    differences = ", ".join(f"{each:.1e}" for each in rollout.differences)
    print(f"GRPO: {NUM_STEPS} steps of {2 * NUM_GENERATIONS} samples in {seconds:.1f} s")
    print(f"  log-probabilities before and after each update differ by at most {differences}")
    print(f"  weights of versions {rollout.versions}; compiled {list(map(len, rollout.compiled))}")
    assert len(rollout.differences) == NUM_STEPS + 1
    assert rollout.versions == sorted(set(rollout.versions))
    assert len(rollout.compiled) == NUM_STEPS
    assert not any(rollout.compiled[1:]), "an update after the first compiled"
    assert [len(each) for each in seen] == [2 * NUM_GENERATIONS] * NUM_STEPS
    assert all(len(set(each)) > NUM_GENERATIONS for each in seen), "samples of a prompt are equal"
    assert any(x.tolist() != y.tolist() for x, y in zip(before.tokens, after.tokens, strict=True))
    trained = nnx.state(learner.rl_cluster.actor_trainer.model, nnx.Param)
    model = nnx.merge(rollout.graphdef, trained)
    tokens = compare_greedy(rollout, vanilla(model, make_tokenizer()))
    print(f"  {tokens} greedy tokens after it are those of Tunix's sampler")
    check_refusals(rollout, trained)


def check_refusals(rollout: PallasPagedRollout, state: nnx.State) -> None:
    """Asserts that weights which are not the model's are refused by name, and change nothing."""
    prompts, version = PROMPTS[:1], rollout.llm.weights_version
    greedy = dataclasses.replace(ROLLOUT, temperature=0.0)
    before = rollout.generate(prompts, greedy).tokens[0].tolist()
    flat = dict(nnx.to_flat_state(state))
    path = ("layers", 2, "attn", "k_proj", "w")
    missing = nnx.from_flat_state({key: value for key, value in flat.items() if key != path})
    name = "model.layers.2.self_attn.k_proj.weight"
    with pytest.raises(ValueError, match=rf"missing: {name}"):
        rollout.update_params(missing)
    wrong = nnx.from_flat_state({**flat, path: nnx.Param(flat[path][...][:, :1])})
    with pytest.raises(ValueError, match=rf"misshapen: {name}"):
        rollout.update_params(wrong)
    more = nnx.from_flat_state({**flat, ("head", "w"): nnx.Param(jnp.zeros(3))})
    with pytest.raises(ValueError, match=r"unused: head\.w"):
        rollout.update_params(more)
    lora = nnx.from_flat_state({("layers", 0, "w_lora_a"): nnx.LoRAParam(jnp.zeros(3))})
    with pytest.raises(NotImplementedError, match=r"layers\.0\.w_lora_a.*merge"):
        rollout.update_params(lora)
    with pytest.raises(NotImplementedError, match="LoRA"):
        rollout.update_params(state, (nnx.LoRAParam,))
    assert rollout.llm.weights_version == version
    assert rollout.generate(prompts, greedy).tokens[0].tolist() == before
    print("  weights of another model, and LoRA's, are refused by name")


def check_groups(mesh: jax.sharding.Mesh) -> None:
    """Asserts that equal prompts are one request, and its samples all different, by their seed."""
    tokenizer = make_tokenizer()
    rollout = PallasPagedRollout(load_demo(mesh), tokenizer, mesh, ROLLOUT, **ENGINE)
    calls: list[list[Any]] = []
    generate = rollout.llm.generate

    def watched(requests: Any, params: Any, **kwargs: Any) -> Any:
        calls.append(
            [
                (len(request["prompt_token_ids"]), each.n)
                for request, each in zip(requests, params, strict=True)
            ]
        )
        return generate(requests, params, **kwargs)

    rollout.llm.generate = watched  # type: ignore[method-assign]
    prompts = [PROMPTS[0]] * 6 + [PROMPTS[1]] * 20 + [PROMPTS[0]] * 2
    seeded = dataclasses.replace(ROLLOUT, seed=jax.random.PRNGKey(3))
    first, second = rollout.generate(prompts, seeded), rollout.generate(prompts, seeded)
    assert [n for _, n in calls[0]] == [8, 16, 4], calls[0]
    texts = [tokens.tolist() for tokens in first.tokens]
    assert texts == [tokens.tolist() for tokens in second.tokens]
    for group in (texts[:6] + texts[26:], texts[6:26]):
        assert len(set(map(tuple, group))) == len(group)
    assert texts != [tokens.tolist() for tokens in rollout.generate(prompts, ROLLOUT).tokens]
    ended = [tokens for tokens in first.tokens if len(tokens) < ROLLOUT.max_tokens_to_generate]
    assert all(tokens[-1] == rollout.eos_id() for tokens in ended)
    with pytest.raises(ValueError, match="max_tokens=60"):
        rollout.generate(prompts, dataclasses.replace(ROLLOUT, max_tokens_to_generate=60))
    with pytest.raises(ValueError, match="generate does not take images"):
        rollout.generate(prompts, ROLLOUT, images=[])
    print(f"groups: {len(prompts)} prompts were {len(calls[0])} requests")


def check_padding(mesh: jax.sharding.Mesh) -> None:
    """Asserts that outputs end, and prompts lose tokens, as for Tunix where EOS is padding too."""
    model, tokenizer = load_demo(mesh), make_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = ","
    comma = tokenizer.convert_tokens_to_ids(",")
    rollout = PallasPagedRollout(model, tokenizer, mesh, ROLLOUT, **ENGINE)
    assert rollout.pad_id() == rollout.eos_id() == comma
    with pytest.raises(ValueError, match=f"last token, {comma}, is the tokenizer's pad token"):
        rollout.generate(["def f(a,"], ROLLOUT)
    prompts = ["def f(a, b, c):\n    ", "import os, re\n", "class Stack:\n    ", ", x = 1\n"]
    assert tokenizer.encode(prompts[0]).count(comma) == 2
    output = rollout.generate(prompts * 4, ROLLOUT)
    num_ended = sum(tokens[-1] == comma for tokens in output.tokens)
    assert 0 < num_ended < len(output.tokens)
    difference = compare(rollout, *nnx.split(model), output)
    tokens = compare_greedy(rollout, vanilla(model, tokenizer), prompts=prompts)
    print(f"EOS as padding: {difference:.1e}, {num_ended} ended, {tokens} greedy tokens")


def check_own_model(mesh: jax.sharding.Mesh) -> None:
    """Asserts that a model of this project's is served as it is."""
    model = load_model(str(DEMO_MODEL), "float32")
    rollout = PallasPagedRollout(model, make_tokenizer(), mesh, ROLLOUT, **ENGINE)
    greedy = dataclasses.replace(ROLLOUT, temperature=0.0)
    first = rollout.generate(PROMPTS, greedy).text
    state = nnx.state(model)
    rollout.update_params(jax.tree.map(lambda x: x * 0.9, state), (nnx.Param,))
    second = rollout.generate(PROMPTS, greedy).text
    rollout.update_params(state, (nnx.Param,))
    assert rollout.generate(PROMPTS, greedy).text == first != second
    llm = LLM(str(DEMO_MODEL), dtype="float32", max_model_len=64, **ENGINE)
    params = SamplingParams(temperature=0, max_tokens=ROLLOUT.max_tokens_to_generate)
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    assert first == [output.outputs[0].text for output in outputs]
    print("a model of this project is served too")


def check_other_shape(mesh: jax.sharding.Mesh) -> None:
    """Asserts that an engine which computes something else than the trainer's model is refused."""
    model = load_demo(mesh)
    rollout = PallasPagedRollout(model, make_tokenizer(), mesh, ROLLOUT, **ENGINE)
    shape = rollout.llm.model_config
    wrong = dataclasses.replace(shape, rope=dataclasses.replace(shape.rope, rope_theta=10000.0))
    with pytest.raises(ValueError, match=r"differ by .* pass config="):
        PallasPagedRollout(model, make_tokenizer(), mesh, ROLLOUT, config=wrong, **ENGINE)
    devices = dataclasses.replace(ROLLOUT, data_parallel_size=2)
    with pytest.raises(NotImplementedError, match="data_parallel_size=2"):
        PallasPagedRollout(model, make_tokenizer(), mesh, devices, **ENGINE)
    away = model_on_host(model)
    with pytest.raises(NotImplementedError, match="use offload_to_cpu=False"):
        PallasPagedRollout(away, make_tokenizer(), mesh, ROLLOUT, **ENGINE)
    print("another shape than that of the trainer's model is refused")


def model_on_host(model: nnx.Module) -> nnx.Module:
    """Returns a model as `ClusterConfig(offload_to_cpu=True)` leaves it."""
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, rl_utils.put_params_on_memory_kind(state, "pinned_host"))


def check_families(mesh: jax.sharding.Mesh) -> None:
    """Asserts that models of all families are served as Tunix computes them."""
    tokenizer = make_tokenizer()
    for name, model in small_models():
        rollout = PallasPagedRollout(model, tokenizer, mesh, ROLLOUT, **ENGINE)
        output = rollout.generate([*PROMPTS, PROMPTS[0]], ROLLOUT)
        difference = compare(rollout, *nnx.split(model), output)
        tokens = compare_greedy(rollout, vanilla(model, tokenizer))
        state = jax.tree.map(lambda x: x[::-1], nnx.state(model, nnx.Param))
        nnx.update(model, state)
        rollout.update_params(state, (nnx.Param,))
        updated = compare(rollout, *nnx.split(model), rollout.generate(PROMPTS, ROLLOUT))
        print(f"{name}: {difference:.1e}, {tokens} greedy tokens, {updated:.1e} after an update")


def main() -> None:
    logging.getLogger("pallas_paged").setLevel(logging.ERROR)  # warnings that it provokes
    names = ("google-tunix", "jax", "flax", "safetensors", "transformers")
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in names))
    begin = time.monotonic()
    mesh = make_mesh()
    check_groups(mesh)
    check_padding(mesh)
    check_own_model(mesh)
    check_other_shape(mesh)
    check_families(mesh)
    check_grpo()
    print(f"tunix-check: all is well, after {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
