"""Trains the demo model from nothing but the running interpreter's standard library.

    python -m benchmarks.train_demo_model --output=/tmp/demo --checkpoint=/tmp/demo.npz --minutes=72

writes a Hugging Face folder (config, tokenizer with a chat template, bfloat16 weights) and prints
bits per byte on files that training never saw; `benchmarks/evaluate_demo_model.py` measures the
folder further. What is trained is the package's own `Llama`, with dense attention in place of the
paged one. The learning rate follows the clock, so that a slow machine trains on less text but ends
with the same decay; a run that was cut off goes on from `--checkpoint`. The weights in
`models/demo` are from a run of 72 minutes on two busy CPU cores: 1137 steps, 4.66M tokens.
"""

import functools
import itertools
import json
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags, logging
from flax import nnx
from safetensors.flax import save_file

from benchmarks import demo_corpus, demo_score
from pallas_paged.models import command_line
from pallas_paged.models.decoder import Decoder
from pallas_paged.models.llama import LlamaConfig
from pallas_paged.models.tensors import tensors_of, with_tensors

_OUTPUT = flags.DEFINE_string("output", None, "Folder to write the model to.", required=True)
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "File that the training state is kept in.", required=True
)
_MINUTES = flags.DEFINE_float("minutes", 72.0, "Wall-clock minutes of training.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the weights and of the order of the text.")
_BATCH = flags.DEFINE_integer("batch", 8, "Rows per step.")
_LENGTH = flags.DEFINE_integer("length", 512, "Tokens per row; even.")
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 3e-3, "Peak learning rate.")
_LIBRARY_REPEATS = flags.DEFINE_integer(
    "library_repeats", 2, "Times an epoch holds each module that is not part of the test suite."
)

CONFIG = LlamaConfig(
    vocab_size=2048,
    hidden_size=192,
    intermediate_size=512,
    num_layers=4,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=64,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
)
WARMUP, DECAY = 0.02, 0.6
"""Shares of the time in which the learning rate rises, and falls to zero."""
HALVED = 0.7
"""Share of the time, the first, in which rows go as two halves: attention costs half as much."""
CHECKPOINT_EVERY_S = 300.0
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}"
    "{{ message.content }}\n{% else %}# {{ message.content.replace('\\n', '\\n# ') }}\n"
    "{% endif %}{% endfor %}"
)
"""The model knows code, not conversation: what it is told are comments, what it answers is code."""

Params = Mapping[str, jax.Array]


class TrainState(NamedTuple):
    """All that a step changes on the device."""

    params: Params
    opt_state: optax.OptState


class Progress(NamedTuple):
    """How far the training is."""

    step: int = 0
    elapsed_s: float = 0.0


def make_optimizer() -> optax.GradientTransformation:
    """Muon (Jordan et al., 2024) on the layers' matrices, AdamW on the embedding and the norms.

    Its updates are for a learning rate of one: the step scales them by the clock's.
    """

    def matrices(params: Params) -> dict[str, Any]:
        dims = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=0)
        return {name: dims if "_proj." in name else None for name in params}

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            1.0,
            weight_decay=0.1,
            consistent_rms=0.2,
            adam_b2=0.95,
            muon_weight_dimension_numbers=matrices,
        ),
    )


def learning_rate(progress: float) -> float:
    """Returns the factor of the peak learning rate at a share `progress` of the time."""
    return min(1.0, progress / WARMUP, max(0.0, 1.0 - progress) / DECAY)


def batches(
    documents: Sequence[demo_corpus.TokenizedDocument], bos: int, skip: int
) -> Iterator[np.ndarray]:
    """Yields i32[batch, length + 1] for ever, the same for the same seed, from batch `skip` on."""

    def rows() -> Iterator[np.ndarray]:
        for epoch in itertools.count():
            rng = np.random.default_rng((_SEED.value, epoch))
            yield from demo_corpus.training_rows(documents, _LENGTH.value, bos, rng)

    batched = itertools.batched(rows(), _BATCH.value)
    return (np.stack(batch) for batch in itertools.islice(batched, skip, None))


def save_checkpoint(path: pathlib.Path, state: TrainState, progress: Progress) -> None:
    """Writes the state so that the file at `path` is a whole one at any moment."""
    partial = path.with_suffix(".partial.npz")
    leaves: dict[str, Any] = {
        str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))
    }
    np.savez(partial, progress=np.array(progress), **leaves)
    partial.rename(path)


def load_checkpoint(path: pathlib.Path, like: TrainState) -> tuple[TrainState, Progress]:
    """Returns what `save_checkpoint` wrote, for a state shaped like `like`."""
    with np.load(path) as arrays:
        leaves = [jnp.asarray(arrays[str(i)]) for i in range(len(jax.tree.leaves(like)))]
        step, elapsed_s = arrays["progress"]
    return jax.tree.unflatten(jax.tree.structure(like), leaves), Progress(int(step), elapsed_s)


def train(model: Decoder, documents: Sequence[demo_corpus.TokenizedDocument], bos: int) -> Decoder:
    """Returns `model` trained for `--minutes`, those before the last checkpoint included."""
    graph, template = nnx.split(model, nnx.Param)
    optimizer = make_optimizer()

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(
        state: TrainState, rows: jax.Array, rate: jax.Array
    ) -> tuple[TrainState, jax.Array]:
        def loss_of(params: Params) -> jax.Array:
            return demo_score.token_losses(
                nnx.merge(graph, with_tensors(template, params)), rows
            ).mean()

        loss, grads = jax.value_and_grad(loss_of)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        updates = jax.tree.map(lambda u: rate * u, updates)
        return TrainState(optax.apply_updates(state.params, updates), opt_state), loss

    params = jax.tree.map(jnp.copy, tensors_of(template))
    state, progress = TrainState(params, optimizer.init(params)), Progress()
    checkpoint, budget_s = pathlib.Path(_CHECKPOINT.value), 60 * _MINUTES.value
    if checkpoint.exists():
        state, progress = load_checkpoint(checkpoint, state)
        logging.info("resumed at step %d, after %.0f s", *progress)
    before_s, begin, saved, losses = progress.elapsed_s, time.monotonic(), time.monotonic(), []
    for rows in batches(documents, bos, skip=progress.step):
        share = progress.elapsed_s / budget_s
        rate = _LEARNING_RATE.value * learning_rate(share)
        if share < HALVED:
            half = _LENGTH.value // 2
            rows = np.concatenate([rows[:, : half + 1], rows[:, half:]])
        state, loss = train_step(state, rows, np.float32(rate))
        losses.append(float(loss))
        progress = Progress(progress.step + 1, before_s + time.monotonic() - begin)
        if progress.step % 20 == 0:
            tokens = progress.step * _BATCH.value * _LENGTH.value
            logging.info(
                "step %d  %.1f min  %.2fM tokens  %.0f tokens/s  rate %.1e  loss %.3f",
                progress.step,
                progress.elapsed_s / 60,
                tokens / 1e6,
                tokens / progress.elapsed_s,
                rate,
                np.mean(losses[-20:]),
            )
        over = progress.elapsed_s >= budget_s
        if over or time.monotonic() - saved > CHECKPOINT_EVERY_S:
            save_checkpoint(checkpoint, state, progress)
            saved = time.monotonic()
        if over:
            break
    return nnx.merge(graph, with_tensors(template, state.params))


def save_model(folder: pathlib.Path, model: Decoder, tokenizer: Any) -> None:
    """Writes the folder that `transformers` and `load_model` read."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config
    bos, eos = map(tokenizer.token_to_id, (demo_corpus.BOS, demo_corpus.EOS))
    documents = {
        "config.json": {
            "architectures": [config.architecture],
            "model_type": "llama",
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_q_heads,
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "max_position_embeddings": config.max_position_embeddings,
            "rope_parameters": {
                "rope_type": config.rope.rope_type,
                "rope_theta": config.rope.rope_theta,
            },
            "rms_norm_eps": config.rms_norm_eps,
            "hidden_act": "silu",
            "tie_word_embeddings": config.tie_word_embeddings,
            "bos_token_id": bos,
            "eos_token_id": eos,
            "dtype": "bfloat16",
        },
        "generation_config.json": {
            "bos_token_id": bos,
            "eos_token_id": eos,
            "do_sample": True,
            "temperature": 0.5,
            "top_p": 0.9,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": demo_corpus.BOS,
            "eos_token": demo_corpus.EOS,
            "model_max_length": config.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    }
    for name, content in documents.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    tensors = tensors_of(nnx.state(model))
    weights = {name: value.astype(jnp.bfloat16) for name, value in tensors.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    """Reads, trains, writes and measures."""
    everything = demo_corpus.read_documents()
    seen = [d for d in everything if not d.held_out]
    tokenizer = demo_corpus.train_tokenizer(seen, CONFIG.vocab_size)
    bos = demo_corpus.special_token_id(tokenizer, demo_corpus.BOS)
    tokenized = [
        tokens
        for d in seen
        for tokens in [demo_corpus.tokenize(d, tokenizer)]
        * (1 if d.is_test else _LIBRARY_REPEATS.value)
    ]
    held_out = [demo_corpus.tokenize(d, tokenizer) for d in everything if d.held_out]
    logging.info(
        "%d files, %.2fM bytes, %.2fM tokens an epoch; held out %d files, %.2fM bytes",
        len(seen),
        sum(len(d.text) for d in seen) / 1e6,
        sum(len(d.tokens) for d in tokenized) / 1e6,
        len(held_out),
        sum(d.num_bytes for d in held_out) / 1e6,
    )
    model = Decoder(CONFIG, dtype=jnp.float32, rngs=nnx.Rngs(_SEED.value))
    logging.info("%.2fM parameters", sum(p.size for p in jax.tree.leaves(nnx.state(model))) / 1e6)
    model = train(model, tokenized, bos)
    save_model(pathlib.Path(_OUTPUT.value), model, tokenizer)
    print(f"held-out bits per byte: {demo_score.bits_per_byte(model, held_out, bos):.3f}")


if __name__ == "__main__":
    command_line.run(main)
