"""A whole decode step of a Llama with 8 billion random parameters, beside its floor."""

import functools
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import random_models
from benchmarks.gpu_suite import timing
from benchmarks.gpu_suite.stage import Case, Context, Row, Stage
from pallas_paged import AttentionMetadata, KVCache
from pallas_paged.models import CausalLM, ModelConfig
from pallas_paged.models.attend import paged_attend
from pallas_paged.models.registry import FAMILIES, config_from_hf


class Step(NamedTuple):
    """A decode step of `batch` sequences, the new token their `context`th."""

    batch: int
    context: int
    block_size: int = 16

    @property
    def name(self) -> str:
        """How results call it."""
        return f"{self.batch} x {self.context}, block {self.block_size}"


def make_model(config: ModelConfig) -> tuple[nnx.GraphDef, Any]:
    """Returns a model's graph and parameters, drawn on the device one after the other."""
    build = functools.partial(FAMILIES[config.architecture].model, config, dtype=jnp.bfloat16)
    graph, abstract = nnx.split(nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0))))
    leaves, tree = jax.tree.flatten(abstract)
    drawn = [
        0.02 * timing.random(i, leaf.shape, leaf.dtype)
        if len(leaf.shape) > 1
        else jnp.ones(leaf.shape, leaf.dtype)
        for i, leaf in enumerate(leaves)
    ]
    return graph, jax.tree.unflatten(tree, drawn)


def floor_bytes(config: ModelConfig, params: Any, step: Step) -> int:
    """Returns the bytes that a step must read: all weights but the embedding table, all KV."""
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    if not config.tie_word_embeddings:
        weights -= config.vocab_size * config.hidden_size * 2
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 2
    return weights + step.batch * step.context * per_token


def run(step: Step, context: Context) -> Row:
    """Times the step with its caches donated, many calls in a row."""
    config = config_from_hf(random_models.CONFIGS["8b" if context.on_gpu else "tiny"])
    graph, params = make_model(config)
    M = -(-step.context // step.block_size)
    num_blocks = 1 + step.batch * M
    pool = num_blocks, config.num_kv_heads, step.block_size, config.head_dim
    caches = tuple(
        KVCache(timing.random(2 * i, pool), timing.random(2 * i + 1, pool))
        for i in range(config.num_layers)
    )
    rng = np.random.default_rng(0)
    tables = 1 + rng.permutation(num_blocks - 1).astype(np.int32).reshape(step.batch, M)
    last = step.context - 1
    fields = {
        "positions": jnp.full(step.batch, last, jnp.int32),
        "slot_mapping": jnp.asarray(
            tables[:, last // step.block_size] * step.block_size + last % step.block_size
        ),
        "block_tables": jnp.asarray(tables),
        "seq_lens": jnp.full(step.batch, step.context, jnp.int32),
        "query_start_loc": jnp.arange(step.batch + 1, dtype=jnp.int32),
    }
    ours = "mosaic_gpu" if context.on_gpu else "xla"
    attend = functools.partial(paged_attend, implementation=ours)

    def decode(params: Any, caches: Any, tokens: jax.Array, fields: dict[str, jax.Array]) -> Any:
        metadata = AttentionMetadata(**fields, max_query_len=1)
        model: CausalLM = nnx.merge(graph, params)
        hidden, caches = model(tokens, metadata, caches, attend=attend)
        return caches, jnp.argmax(model.compute_logits(hidden), axis=-1).astype(jnp.int32)

    tokens = jnp.asarray(rng.integers(0, config.vocab_size, step.batch), jnp.int32)
    compiled = jax.jit(decode, donate_argnums=1).lower(params, caches, tokens, fields).compile()
    caches, tokens = compiled(params, caches, tokens, fields)
    calls, repeats = (20, 5) if context.on_gpu else (2, 1)
    seconds = []
    for _ in range(repeats):
        jax.block_until_ready(tokens)
        begin = time.perf_counter()
        for _ in range(calls):
            caches, tokens = compiled(params, caches, tokens, fields)
        jax.block_until_ready(tokens)
        seconds.append((time.perf_counter() - begin) / calls)
    us = 1e6 * statistics.median(seconds)
    analysis = compiled.memory_analysis()
    row: Row = {
        "us": us,
        "implementation": ours,
        "tokens_per_s": step.batch / (us / 1e6),
        "temporary_bytes": analysis.temp_size_in_bytes if analysis else None,
    }
    if context.on_gpu and (bandwidth := context.ceiling("copy bandwidth")):
        floor_us = 1e6 * floor_bytes(config, params, step) / bandwidth
        row |= {"floor_us": floor_us, "us/floor": us / floor_us}
    return row


def _cases(context: Context) -> list[Case]:
    steps = [Step(64, 2048), Step(1, 2048), Step(8, 2048), Step(256, 512), Step(64, 2048, 64)]
    if not context.on_gpu:
        steps = [Step(2, 40)]
    return [Case(step.name, functools.partial(run, step)) for step in steps]


STAGE = Stage("model", 90, 60, _cases, ("us", "floor_us", "us/floor", "tokens_per_s"))
