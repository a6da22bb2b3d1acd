"""The engine's decode step of a Llama with 8 billion random parameters, beside its floor."""

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
from pallas_paged import KVCache
from pallas_paged.engine import batch
from pallas_paged.engine.buckets import Bucket
from pallas_paged.engine.step import StepPrograms
from pallas_paged.models import ModelConfig
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


def packed_inputs(step: Step, bucket: Bucket, tables: np.ndarray, temperature: float) -> jax.Array:
    """Returns the step's inputs as the engine packs them; the input tokens are on the device."""
    packed = np.zeros(batch.packed_size(bucket, tables.shape[1]), np.int32)
    x = batch.views(packed, bucket, tables.shape[1])
    rows, last = np.arange(step.batch), step.context - 1
    x.positions[:] = last
    slots = tables[:, last // step.block_size] * step.block_size
    x.slot_mapping[:] = slots + last % step.block_size
    x.block_tables[:] = tables
    x.seq_lens[:] = step.context
    x.query_start_loc[:] = np.arange(step.batch + 1)
    x.rows[:] = x.sample_rows[:] = x.logits_indices[:] = x.seeds[:, 1] = rows
    x.input_on_device[:] = 1
    x.temperature[:] = temperature
    x.top_p[:] = 0.95
    x.sample_positions[:] = step.context
    return jax.device_put(packed)


def run(step: Step, context: Context) -> Row:
    """Times the engine's compiled step, its state donated and its tokens fed back on the device.

    Many calls in a row: all rows sample by top-p, and, as `greedy_us`, none.
    """
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
    tokens = jnp.asarray(rng.integers(0, config.vocab_size, step.batch + 1), jnp.int32)
    ours = "mosaic_gpu" if context.on_gpu else "xla"
    programs = StepPrograms(
        nnx.merge(graph, params),
        caches,
        max_num_seqs=step.batch,
        max_blocks_per_seq=M,
        logprobs_width=1,
        implementation=ours,
        cache_implementation=ours,
    )
    bucket = Bucket(step.batch, step.batch, is_decode=True)
    calls, repeats = (20, 5) if context.on_gpu else (2, 1)
    row: Row = {"implementation": ours, "temporary_bytes": programs.temporary_bytes(bucket)}
    for name, temperature in (("us", 0.8), ("greedy_us", 0.0)):
        packed = packed_inputs(step, bucket, tables, temperature)
        seconds = []
        for _ in range(1 + repeats):
            jax.block_until_ready(tokens)
            begin = time.perf_counter()
            for _ in range(calls):
                result = programs(bucket, caches, tokens, packed)
                caches, tokens = result.kv_caches, result.last_tokens
            jax.block_until_ready(tokens)
            seconds.append((time.perf_counter() - begin) / calls)
        row[name] = 1e6 * statistics.median(seconds[1:])
        if bool(jnp.any(result.tokens >= config.vocab_size)):
            raise ValueError("the model's logits are not finite")
    row["tokens_per_s"] = step.batch / (row["us"] / 1e6)
    if context.on_gpu and (bandwidth := context.ceiling("copy bandwidth")):
        floor_us = 1e6 * floor_bytes(config, params, step) / bandwidth
        row |= {"floor_us": floor_us, "us/floor": row["us"] / floor_us}
    return row


def _cases(context: Context) -> list[Case]:
    steps = [Step(64, 2048), Step(1, 2048), Step(8, 2048), Step(256, 512), Step(64, 2048, 64)]
    if not context.on_gpu:
        steps = [Step(2, 40)]
    return [Case(step.name, functools.partial(run, step)) for step in steps]


STAGE = Stage("model", 90, 60, _cases, ("us", "greedy_us", "floor_us", "us/floor", "tokens_per_s"))
