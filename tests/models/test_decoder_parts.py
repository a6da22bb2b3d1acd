"""A decoder takes its MLP from its family, and what a step brings reaches every layer."""

import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_paged.models.attend import dense_attend, dense_metadata
from pallas_paged.models.decoder import MLP, Decoder, DecoderConfig
from pallas_paged.models.interface import Wanted
from pallas_paged.models.llama import LlamaConfig
from pallas_paged.models.opt import OPT, OPTConfig

SIZES: Any = {
    "vocab_size": 16,
    "hidden_size": 8,
    "num_layers": 3,
    "num_q_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 32,
}
CONFIG = LlamaConfig(**SIZES, intermediate_size=12)
IDS = jnp.arange(5, dtype=jnp.int32)
CACHES = (None,) * CONFIG.num_layers


class Scaled(nnx.Module):
    """A made-up MLP: the context's number for each token times a parameter of the layer."""

    def __init__(self, config: DecoderConfig, layer: int, *, dtype: Any, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.full(config.hidden_size, 2.0**layer, dtype))

    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        return context[:, None] * self.scale[...][None]


def nothing(q: jax.Array, *args: Any, **options: Any) -> tuple[jax.Array, None]:
    return jnp.zeros_like(q), None


def test_the_family_makes_the_mlp_of_each_layer() -> None:
    """Without attention, each layer adds its scale times the context to the embedding."""
    build = functools.partial(Decoder, make_mlp=Scaled)
    model = build(CONFIG, dtype=jnp.float32, rngs=nnx.Rngs(0))
    context = jnp.arange(5, dtype=jnp.float32)
    metadata = dense_metadata(1, 5)
    hidden, _ = model(IDS, metadata, CACHES, attend=nothing, context=context)
    x = model.model.embed_tokens(IDS) + context[:, None] * (1 + 2 + 4)
    np.testing.assert_allclose(hidden, model.model.norm(x), rtol=1e-6)
    paths = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))}
    assert "model.layers.2.mlp.scale" in paths
    assert not any("gate_up" in path for path in paths)


def test_the_usual_mlp_ignores_the_context() -> None:
    mlp = MLP(CONFIG, 0, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = jnp.ones((5, 8))
    np.testing.assert_array_equal(mlp(x), mlp(x, context={"adapters": IDS}))


@pytest.mark.parametrize("model_class", [Decoder, OPT])
def test_the_context_reaches_the_attention_of_every_layer(model_class: Any) -> None:
    config = (
        CONFIG if model_class is Decoder else OPTConfig(**SIZES, ffn_dim=12, word_embed_proj_dim=8)
    )
    model = model_class(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    metadata, adapters = dense_metadata(1, 5), {"adapters": IDS}
    seen = []

    def attend(*args: Any, **options: Any) -> Any:
        seen.append(options.pop("context", None))
        return dense_attend(*args, **options)

    hidden, _ = model(IDS, metadata, CACHES, attend=attend, context=adapters)
    assert len(seen) == 3
    assert all(context is adapters for context in seen)
    without, _ = model(IDS, metadata, CACHES, attend=attend)
    assert seen[3:] == [None] * 3
    np.testing.assert_array_equal(hidden, without)


class Counted(MLP):
    """The usual MLP, which notes how many tokens each layer gives it."""

    seen: ClassVar[list[int]] = []

    def __call__(self, x: jax.Array, context: Any = None) -> jax.Array:
        self.seen.append(x.shape[0])
        return super().__call__(x, context)


@pytest.mark.parametrize("family", ["decoder", "opt", "opt, norms behind"])
def test_the_last_layer_leaves_out_tokens_that_nobody_wants(family: str) -> None:
    rngs: Any = {"dtype": jnp.float32, "rngs": nnx.Rngs(0)}
    if family == "decoder":
        Counted.seen.clear()
        model: Any = Decoder(CONFIG, make_mlp=Counted, **rngs)
    else:
        fields = SIZES | {"do_layer_norm_before": family == "opt"}
        model = OPT(OPTConfig(**fields, ffn_dim=12, word_embed_proj_dim=8), **rngs)
    metadata, wanted = dense_metadata(1, 5), Wanted(jnp.array([4, 1]))
    every, _ = model(IDS, metadata, CACHES, attend=dense_attend)
    hidden, _ = model(IDS, metadata, CACHES, attend=dense_attend, wanted=wanted)
    np.testing.assert_allclose(hidden, every[wanted.places], rtol=1e-5, atol=1e-6)
    if family == "decoder":
        assert Counted.seen == [5, 5, 5, 5, 5, 2]
    with pytest.raises(ValueError, match="pass a context or wanted tokens"):
        model(IDS, metadata, CACHES, attend=dense_attend, wanted=wanted, context=IDS)
