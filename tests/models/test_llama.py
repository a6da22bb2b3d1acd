import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_paged.models.attend import dense_attend, dense_metadata
from pallas_paged.models.decoder import Decoder
from pallas_paged.models.llama import LlamaConfig

SMALL = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=1,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)


def test_training_lowers_the_loss():
    model = Decoder(SMALL, dtype=jnp.float32, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    tokens = jnp.tile(jnp.arange(17, dtype=jnp.int32), (3, 1))

    @jax.jit
    def step(state):
        def loss(state):
            model = nnx.merge(graph, state)
            ids, targets = tokens[:, :-1].reshape(-1), tokens[:, 1:].reshape(-1)
            caches = (None,) * SMALL.num_layers
            hidden, _ = model(ids, dense_metadata(3, 16), caches, attend=dense_attend)
            log_probs = jax.nn.log_softmax(model.compute_logits(hidden))
            return -jnp.take_along_axis(log_probs, targets[:, None], axis=1).mean()

        value, grads = jax.value_and_grad(loss)(state)
        return value, jax.tree.map(lambda p, g: p - 0.5 * g, state, grads)

    losses = []
    for _ in range(30):
        value, state = step(state)
        losses.append(float(value))
    assert np.isclose(losses[0], np.log(SMALL.vocab_size), atol=0.05)
    assert losses[-1] < 0.5 * losses[0]
