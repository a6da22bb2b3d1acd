"""The engine's decode step of a Llama with 8 billion random parameters, beside its floor."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import random_models
from benchmarks.decode_inputs import decode_inputs, shuffled_tables
from benchmarks.gpu_suite import programs, timing
from benchmarks.gpu_suite.stage import Case, Context, Program, Row, Stage
from pallas_paged import KVCache
from pallas_paged.engine.core.buckets import Bucket
from pallas_paged.engine.device.pool_size import num_bytes
from pallas_paged.engine.device.programs import StepPrograms
from pallas_paged.engine.kv.sharing import blocks_for
from pallas_paged.models import ModelConfig
from pallas_paged.models.registry import FAMILIES, config_from_hf


class Step(NamedTuple):
    """A decode step of `batch` sequences, the new token their `context`th.

    Attributes:
      batch: sequences.
      context: tokens of each, the new one included.
      block_size: tokens per block.
      filters: whether the sequences sample by top-p, else without; see `Bucket.filters`.
      cublas: whether all matrix products are cuBLAS's, as in bundles that are made without the GPU;
        else XLA times its own beside them, if it compiles on the GPU.
      num_shared: blocks with which all sequences begin, and which are read for several at a time;
        see `Bucket.shares_prefix`.
      model: of `random_models.CONFIGS`.
    """

    batch: int
    context: int
    block_size: int = 16
    filters: bool = False
    cublas: bool = False
    num_shared: int = 0
    model: str = "8b"

    @property
    def name(self) -> str:
        """How results call it."""
        top_p = ", top-p" if self.filters else ""
        cublas = ", cuBLAS" if self.cublas else ""
        shared = f", {self.num_shared} blocks shared" if self.num_shared else ""
        return f"{self.batch} x {self.context}, block {self.block_size}{top_p}{cublas}{shared}"

    @property
    def config(self) -> ModelConfig:
        """The model's."""
        return config_from_hf(random_models.CONFIGS[self.model])

    @property
    def bucket(self) -> Bucket:
        """The shape that the engine compiles."""
        return Bucket(
            self.batch,
            self.batch,
            self.blocks_per_seq,
            is_decode=True,
            filters=self.filters,
            shares_prefix=self.num_shared > 0,
        )

    @property
    def blocks_per_seq(self) -> int:
        """M."""
        return blocks_for(self.context, self.block_size)

    @property
    def implementation(self) -> str:
        """Of attention and of the writes to the cache."""
        return "xla" if self.model == "tiny" else "mosaic_gpu"

    def program(self) -> Program:
        """Returns the step: of parameters, caches, rows and the packed inputs."""
        name = f"{self.model} decode step {self.name}, {self.implementation}"
        return Program(
            name,
            lambda *arguments: _compiled(self)[0](*arguments),
            lambda: _compiled(self)[1],
            donate=(1, 2),
            options=(("xla_gpu_enable_triton_gemm", "False"),) if self.cublas else (),
        )


@functools.cache
def _model(name: str) -> tuple[nnx.GraphDef, Any]:
    """Returns the graph of a model of `random_models.CONFIGS`, and its abstract parameters."""
    config = config_from_hf(random_models.CONFIGS[name])
    build = functools.partial(FAMILIES[config.architecture].model, config, dtype=jnp.bfloat16)
    return nnx.split(nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0))))


@functools.cache
def _compiled(step: Step) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Returns the function that the engine compiles for a step, and its abstract arguments."""
    engine = StepPrograms(
        nnx.merge(*_model(step.model)),
        timing.abstract(described_caches(step)),
        max_num_seqs=step.batch,
        max_blocks_per_seq=step.blocks_per_seq,
        logprobs_width=1,
        implementation=step.implementation,
        cache_implementation=step.implementation,
    )
    function, arguments, donated = engine.function(step.bucket)
    assert donated == (1, 2), "the program says what is donated before it is traced"
    return function, arguments


def described_caches(step: Step) -> tuple[KVCache, ...]:
    """Returns each layer's cache, as `timing.make` takes it."""
    config = step.config
    num_blocks = 1 + step.batch * step.blocks_per_seq
    specs = config.cache_specs(step.block_size, jnp.bfloat16)
    pools = [spec.shapes(num_blocks).k.shape for spec in specs]
    return tuple(timing.normal_cache(2 * i, pool) for i, pool in enumerate(pools))


def described_parameters(step: Step) -> Any:
    """Returns the model's parameters, as `timing.make` takes them: matrices, and ones."""
    leaves, tree = jax.tree.flatten(_model(step.model)[1])
    described = [
        timing.Normal(i, leaf.shape, 0.02, leaf.dtype.name)
        if len(leaf.shape) > 1
        else timing.Host(functools.partial(np.ones, leaf.shape), leaf.shape, leaf.dtype.name)
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, described)


def floor_bytes(step: Step) -> int:
    """Returns the bytes that a step must read: all weights but the embedding table, all KV once."""
    config = step.config
    weights = num_bytes(_model(step.model)[1])
    if not config.tie_word_embeddings:
        weights -= config.vocab_size * config.hidden_size * 2
    block_bytes = sum(s.block_bytes for s in config.cache_specs(step.block_size, jnp.bfloat16))
    shared = step.num_shared * step.block_size
    num_tokens = shared + step.batch * (step.context - shared)
    return weights + num_tokens * block_bytes // step.block_size


def run(step: Step, context: Context) -> Row:
    """Times the engine's compiled step, its state donated and its tokens fed back on the device.

    Many calls in a row; all rows draw their tokens.
    """
    begin = time.perf_counter()
    config = step.config
    program = programs.load(step.program(), context)
    loaded = time.perf_counter()
    params = jax.tree.leaves(timing.make(described_parameters(step), context))
    caches = jax.tree.leaves(timing.make(described_caches(step), context))
    jax.block_until_ready((params, caches))
    row: Row = {
        "implementation": step.implementation,
        "temporary_bytes": program.temporary_bytes(),
        "load_s": loaded - begin,
        "draw_s": time.perf_counter() - loaded,
    }
    tables = shuffled_tables(step.batch, step.blocks_per_seq)
    tables[:, : step.num_shared] = tables[0, : step.num_shared]
    null_row = np.zeros((1, step.blocks_per_seq), np.int32)
    tables_there = jax.device_put(np.concatenate([tables, null_row]))
    rng = np.random.default_rng(0)
    tokens = jax.device_put(rng.integers(0, config.vocab_size, step.batch + 1, np.int32))
    calls, repeats = (20, 5) if context.on_gpu else (2, 2)
    packed = jax.device_put(
        decode_inputs(
            step.bucket,
            tables,
            context=step.context,
            block_size=step.block_size,
            padding_place=tables.size,
            temperature=0.8,
            num_shared_blocks=step.num_shared,
        )
    )
    seconds = []
    for _ in range(1 + repeats):
        jax.block_until_ready(tokens)
        begin = time.perf_counter()
        for _ in range(calls):
            *caches, tokens, tables_there, sampled = program(
                params, caches, [tokens, tables_there], packed
            )
        jax.block_until_ready(tokens)
        seconds.append((time.perf_counter() - begin) / calls)
    if np.any(np.asarray(sampled) >= config.vocab_size):
        raise ValueError("the model's logits are not finite")
    row |= timing.figures(seconds[1:])
    row["tokens_per_s"] = step.batch / (row["us"] / 1e6)
    if context.on_gpu and (bandwidth := context.ceiling("copy bandwidth")):
        floor_us = 1e6 * floor_bytes(step) / bandwidth
        row |= {"floor_us": floor_us, "us/floor": row["us"] / floor_us}
    return row


def all_programs(step: Step) -> tuple[Program, ...]:
    """Returns what a case loads."""
    described = described_parameters(step), described_caches(step)
    return timing.unique([step.program(), *timing.drawn_by(described)])


def _cases(context: Context) -> list[Case]:
    steps = [
        Step(64, 2048),
        Step(64, 2048, filters=True),
        Step(64, 2048, cublas=True),
        Step(64, 2048, filters=True, num_shared=64),
        Step(1, 2048),
        Step(8, 2048),
        Step(256, 512),
        Step(64, 2048, 64),
    ]
    if not context.on_gpu:
        steps = [Step(2, 40, model="tiny"), Step(9, 40, filters=True, num_shared=2, model="tiny")]
    return [
        Case(
            step.name,
            functools.partial(run, step),
            programs=functools.partial(all_programs, step),
            limit_s=60.0 if i else 150.0,
            run_s=8.0,
        )
        for i, step in enumerate(steps)
    ]


STAGE = Stage(
    "model",
    80,
    _cases,
    ("us", "noise", "floor_us", "us/floor", "tokens_per_s", "temporary_bytes", "ahead_s"),
    aims=2,
)
