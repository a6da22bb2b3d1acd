"""The layers all families share, with the parameter names and layouts of Hugging Face checkpoints.

Those of `MergedLinear` hold several tensors of a checkpoint; all others are one each. Parameters
carry logical axis names as Flax's `out_sharding` metadata, by which
`pallas_paged.models.sharding` divides them among devices; on one device the names mean nothing, and
no mesh is needed. The precision of float32 products follows `jax.default_matmul_precision`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from pallas_paged.kv_cache import AttentionMetadata, KVCache
from pallas_paged.models.config import ModelConfig
from pallas_paged.models.interface import Attend, Context, Wanted
from pallas_paged.models.sharding import device_index, gathered, is_divided, own_part, summed
from pallas_paged.ops.product.api import product
from pallas_paged.ops.rotary import rotate

INIT_STD = 0.02
"""Standard deviation of freshly initialised weights, before truncation at two of them."""


class Part(NamedTuple):
    """A module of a checkpoint that is a part of a merged one here.

    Attributes:
      module: its name in the checkpoint, where the merged one's is in our path.
      slices: of its features in the first two axes of the merged parameters. A checkpoint's tensor
        has one axis for them, in the order of these two.
      copies: how many times in a row the tensor's features for one index of the first axis are
        there.
    """

    module: str
    slices: tuple[slice, slice]
    copies: int = 1


def parameter(
    value: Array,
    axes: tuple[str, ...],
    parts: tuple[Part, ...] = (),
    *,
    is_static_scale: bool = False,
    copies: int = 1,
) -> nnx.Param:
    """Returns a parameter whose dimensions carry the logical names `axes`.

    With `parts` it holds that many tensors of a checkpoint, see `pallas_paged.models.tensors`.
    `is_static_scale` is for `pallas_paged.models.kv_scales`, as is `copies`: how many times in a
    row each number of a checkpoint is there.
    """
    return nnx.Param(
        value,
        out_sharding=axes,
        eager_sharding=False,
        parts=parts,
        is_static_scale=is_static_scale,
        copies=copies,
    )


def _random(rngs: nnx.Rngs, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> Array:
    return INIT_STD * jax.random.truncated_normal(rngs.params(), -2.0, 2.0, shape, dtype)


class Linear(nnx.Module):
    """`x @ weight.T + bias`, with `weight` `[out_features, in_features]` as checkpoints have it.

    Where devices share the output features, each has its own; where they share the input features,
    all have the sum.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        axes: tuple[str, str],
        bias: bool = False,
        dtype: jax.typing.DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.in_features = in_features
        self.weight = parameter(_random(rngs, (out_features, in_features), dtype), axes)
        self.bias = parameter(jnp.zeros(out_features, dtype), axes[:1]) if bias else None

    def __call__(self, x: Float[Array, "*n in"]) -> Float[Array, "*n out"]:
        """Returns the projection of `x`, in its dtype."""
        y = product(x, self.weight[...])
        if self.weight.shape[1] != self.in_features:
            y = summed(y)
        return y if self.bias is None else y + jnp.broadcast_to(self.bias[...], y.shape)


class MergedLinear(nnx.Module):
    """Several projections of one input as one product: fewer launches than one for each.

    `weight` is `[outer, inner, in_features]`, `bias` `[outer, inner]`, and each projection's
    features are a rectangle of the first two axes. Sharding the outer one leaves every device with
    its share of every projection, also of the product, for which the two axes are one.
    """

    def __init__(
        self,
        weight: Float[Array, "outer inner in"],
        parts: tuple[Part, ...],
        *,
        axes: tuple[str, str, str],
        bias: bool = False,
    ):
        zeros = jnp.zeros(weight.shape[:2], weight.dtype)
        self.weight = parameter(weight, axes, parts)
        self.bias = parameter(zeros, axes[:2], parts) if bias else None

    def __call__(self, x: Float[Array, "*n in"]) -> tuple[Float[Array, "*n _"], ...]:
        """Returns the projections of `x` in the order of the parts, in its dtype."""
        weight = self.weight[...]
        y = product(x, weight.reshape(-1, weight.shape[-1]))
        y = y.reshape(*x.shape[:-1], *weight.shape[:-1])
        if self.bias is not None:
            y = y + jnp.broadcast_to(self.bias[...], y.shape)
        parts = self.weight.parts
        return tuple(y[(..., *part.slices)].reshape(*x.shape[:-1], -1) for part in parts)


def qkv_projection(
    config: ModelConfig, *, bias: bool, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs
) -> MergedLinear:
    """Returns the projections to queries, keys and values: by KV head, each with its queries.

    A KV head that is there several times has a share of its queries each time.
    """
    size, copies = config.head_dim, config.kv_head_copies
    end = config.num_q_heads // config.num_kv_heads * size
    # Drawn without copies, so that a seed gives the same model with them.
    features = (config.num_kv_heads // copies, end * copies + 2 * size)
    weight = _random(rngs, (*features, config.hidden_size), dtype)
    if copies > 1:
        queries = weight[:, : end * copies].reshape(-1, end, config.hidden_size)
        keys_values = jnp.repeat(weight[:, end * copies :], copies, axis=0)
        weight = jnp.concatenate([queries, keys_values], axis=1)
    parts = (
        Part("q_proj", (slice(None), slice(0, end))),
        Part("k_proj", (slice(None), slice(end, end + size)), copies),
        Part("v_proj", (slice(None), slice(end + size, end + 2 * size)), copies),
    )
    return MergedLinear(weight, parts, axes=("kv_heads", "qkv", "embed"), bias=bias)


def separate_qkv(
    config: ModelConfig, *, bias: bool, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs
) -> tuple[Linear, Linear, Linear]:
    """Returns the same projections one by one, with parameters as checkpoints have them."""
    q, k, v = (
        Linear(
            config.hidden_size,
            num_heads * config.head_dim,
            axes=(axis, "embed"),
            bias=bias,
            dtype=dtype,
            rngs=rngs,
        )
        for axis, num_heads in (
            ("heads", config.num_q_heads),
            ("kv_heads", config.num_kv_heads),
            ("kv_heads", config.num_kv_heads),
        )
    )
    return q, k, v


def gate_up_projection(
    hidden_size: int,
    intermediate_size: int,
    *,
    bias: bool,
    dtype: jax.typing.DTypeLike,
    rngs: nnx.Rngs,
) -> MergedLinear:
    """Returns the projections to a gated MLP's gate and to what it lets through."""
    weight = _random(rngs, (intermediate_size, 2, hidden_size), dtype)
    parts = tuple(
        Part(module, (slice(None), slice(inner, inner + 1)))
        for inner, module in enumerate(("gate_proj", "up_proj"))
    )
    return MergedLinear(weight, parts, axes=("mlp", "gate_up", "embed"), bias=bias)


class Embedding(nnx.Module):
    """A table of row vectors, `weight` `[num_embeddings, features]`.

    Where devices share the rows, each looks up its own, and all have the sum.
    """

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        axes: tuple[str, str],
        dtype: jax.typing.DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.num_embeddings = num_embeddings
        self.weight = parameter(_random(rngs, (num_embeddings, features), dtype), axes)

    def __call__(self, ids: Int32[Array, "T"]) -> Float[Array, "T features"]:
        """Returns the rows `ids`; an id outside the table takes the nearest row."""
        weight, num_rows = self.weight[...], self.weight.shape[0]
        if num_rows == self.num_embeddings:
            return jnp.take(weight, ids, axis=0, mode="clip")
        places = jnp.clip(ids, 0, self.num_embeddings - 1) - device_index() * num_rows
        is_here = (places >= 0) & (places < num_rows)
        found = jnp.take(weight, places, axis=0, mode="clip")
        return summed(jnp.where(is_here[:, None], found, jnp.zeros((), found.dtype)))


class RMSNorm(nnx.Module):
    """`weight * x / sqrt(mean(x^2) + eps)` (Zhang & Sennrich, 2019), statistics in float32."""

    def __init__(
        self, features: int, *, eps: float, axis: str = "embed", dtype: jax.typing.DTypeLike
    ):
        self.eps = eps
        self.weight = parameter(jnp.ones(features, dtype), (axis,))

    def __call__(self, x: Float[Array, "*n features"]) -> Float[Array, "*n features"]:
        """Returns `x` normalised over its last dimension, in its dtype."""
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * jnp.broadcast_to(self.weight[...], x.shape)


class LayerNorm(nnx.Module):
    """`weight * (x - mean(x)) / sqrt(var(x) + 1e-5) + bias` (Ba et al., 2016), all in float32.

    Without `affine`, neither weight nor bias.
    """

    eps = 1e-5

    def __init__(self, features: int, *, affine: bool, dtype: jax.typing.DTypeLike):
        self.weight = parameter(jnp.ones(features, dtype), ("embed",)) if affine else None
        self.bias = parameter(jnp.zeros(features, dtype), ("embed",)) if affine else None

    def __call__(self, x: Float[Array, "T features"]) -> Float[Array, "T features"]:
        """Returns `x` normalised over its last dimension, in its dtype."""
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + self.eps)
        if self.weight is not None and self.bias is not None:
            weight, bias = (
                jnp.broadcast_to(p[...].astype(jnp.float32), x.shape)
                for p in (self.weight, self.bias)
            )
            normed = normed * weight + bias
        return normed.astype(x.dtype)


def logits(
    hidden: Float[Array, "*n E"], weight: Float[Array, "W E"], vocab_size: int
) -> Float[Array, "*n V"]:
    """Returns float32 logits of `hidden` under the output embedding `weight`, of all V tokens.

    `weight` has their rows, or where devices share them this device's. Where each device has all,
    each multiplies a part of them all the same: so all have the same numbers, to the last bit, and
    draw the same tokens.
    """
    if not is_divided():
        return product(hidden, weight, jnp.float32)
    if weight.shape[0] < vocab_size:
        return gathered(product(hidden, weight, jnp.float32))
    rows, places = own_part(weight)
    return gathered(product(hidden, rows, jnp.float32))[..., places]


def wanted_by_layer(
    wanted: Wanted | None, num_layers: int, context: Context
) -> list[Wanted | None]:
    """Returns, for each layer, of which tokens it is to return hidden states; None for all.

    All tokens' keys and values depend on what the layers before the last return of them.

    Args:
      wanted: of `CausalLM`.
      num_layers: of the model.
      context: of `CausalLM`.

    Raises:
      ValueError: there are both a context and tokens that are wanted.
    """
    if wanted is not None and context is not None:
        raise ValueError("pass a context or wanted tokens: a context is of all of a step's tokens")
    return [None] * (num_layers - 1) + [wanted]


def chosen(
    x: Float[Array, "T *n"], wanted: Wanted | None
) -> Float[Array, "T *n"] | Float[Array, "L *n"]:
    """Returns the rows of `x` that are wanted, or all for None."""
    return x if wanted is None else x[wanted.places]


def attend_to_wanted(
    attend: Attend,
    wanted: Wanted | None,
    q: Float[Array, "T Hq D"],
    k: Float[Array, "T Hk D"],
    v: Float[Array, "T Hk Dv"],
    kv_cache: KVCache | None,
    metadata: AttentionMetadata,
    **options: Any,
) -> tuple[Float[Array, "T Hq Dv"] | Float[Array, "L Hq Dv"], KVCache | None]:
    """Returns what `attend` does, of the tokens that are wanted."""
    if wanted is not None and wanted.metadata is not None:
        rotary, q = options.pop("rotary", None), chosen(q, wanted)
        if rotary is not None:
            q = rotate(q, *(chosen(angle, wanted) for angle in rotary))
            k = rotate(k, *rotary)
        return attend(q, k, v, kv_cache, metadata, queries=wanted.metadata, **options)
    out, kv_cache = attend(q, k, v, kv_cache, metadata, **options)
    return chosen(out, wanted), kv_cache
