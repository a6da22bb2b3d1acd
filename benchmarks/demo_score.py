"""How well a model predicts the demo model's held-out text: for training and for evaluation."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.demo_corpus import TokenizedDocument
from pallas_paged.models import CausalLM
from pallas_paged.models.attend import dense_attend, dense_metadata

_WINDOWS_PER_CALL = 16


def token_losses(model: CausalLM, rows: jax.Array) -> jax.Array:
    """Returns f32[rows, length - 1], the nats by which `model` misses each token but the first.

    Attention is dense, over each of the rows i32[rows, length]; differentiable.
    """
    inputs, targets = rows[:, :-1], rows[:, 1:]
    hidden, _ = model(
        inputs.reshape(-1),
        dense_metadata(*inputs.shape),
        (None,) * model.config.num_layers,
        attend=dense_attend,
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(
        model.compute_logits(hidden), targets.reshape(-1)
    )
    return losses.reshape(targets.shape)


def bits_per_byte(model: CausalLM, documents: Sequence[TokenizedDocument], bos: int) -> float:
    """Returns the bits that `model` needs per byte of the documents, their ends included.

    Each document is cut into windows as long as the model's context, none of which sees the one
    before it; a document's first token is predicted from `bos`.
    """
    length = model.config.max_model_len
    windows = [
        tokens[start : start + length + 1]
        for document in documents
        for tokens in [np.concatenate([[bos], document.tokens])]
        for start in range(0, len(tokens) - 1, length)
    ]
    losses = nnx.jit(token_losses)
    nats = 0.0
    for at in range(0, len(windows), _WINDOWS_PER_CALL):
        rows = np.zeros((_WINDOWS_PER_CALL, length + 1), np.int32)
        counted = np.zeros((_WINDOWS_PER_CALL, length), bool)
        for i, window in enumerate(windows[at : at + _WINDOWS_PER_CALL]):
            rows[i, : len(window)] = window
            counted[i, : len(window) - 1] = True
        values = np.asarray(losses(model, jnp.asarray(rows)), np.float64)
        nats += values[counted].sum()
    return float(nats / np.log(2) / sum(d.num_bytes for d in documents))
