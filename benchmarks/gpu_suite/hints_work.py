"""What the stage "hints" runs under NVIDIA's tools: programs, and inputs made on the host.

Compiling under those tools would take minutes, so all of it is compiled ahead.
"""

import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import random_models
from benchmarks.gpu_suite.shapes import HEAD_DIM, Shape
from benchmarks.gpu_suite.stage import Context, Program
from pallas_paged import (
    AttentionMetadata,
    KVCache,
    copy_blocks,
    deviceless,
    gather_blocks,
    paged_attention,
    rotate_and_write,
    scatter_blocks,
    write_kv,
)
from pallas_paged.engine.core.buckets import Bucket
from pallas_paged.engine.device.programs import StepPrograms
from pallas_paged.engine.kv.sharing import blocks_for
from pallas_paged.models.registry import FAMILIES, config_from_hf

DECODE = Shape(64, 4096, "32/8", 64)
PREFILL = Shape(1, 8192, "32/8", 64, queries=8192)
THUNK_LAYERS = 2
"""Layers of the model whose thunks are dumped; every further layer repeats the second."""
THUNK_STEP = {"batch": 64, "context": 2048, "block_size": 16}
_TOY_STEP = {"batch": 2, "context": 40, "block_size": 16}
_TOY_TARGET = "h100"
_NUMBERS = 1 << 20
"""Random numbers that large inputs repeat: drawing a GiB of them would take many seconds."""
_NO_COMMAND_BUFFERS = (("xla_gpu_enable_command_buffer", ""),)
"""Kernels are launched one by one, so that a profiler can skip and count launches."""


class Sizes(NamedTuple):
    """Sizes of the cache, and the lengths of the sequences and of what is new of them."""

    seq_lens: tuple[int, ...]
    query_lens: tuple[int, ...]
    num_q_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16

    @property
    def num_blocks(self) -> int:
        """All sequences' blocks, and the null block."""
        return 1 + sum(-(-length // self.block_size) for length in self.seq_lens)


def programs(job: str, context: Context) -> tuple[Program, ...]:
    """Returns the programs of a job: "smallest", "decode" or "prefill"."""
    implementation = "mosaic_gpu" if context.on_gpu else "xla"
    if job == "smallest":
        decode = Sizes((17, 1, 40), (1, 1, 1))
        mixed = Sizes((17, 20, 40), (1, 20, 3))
        return (
            _attention("decode", decode, implementation),
            _attention("mixed", mixed, implementation),
            *_moves(implementation),
        )
    shape = DECODE if job == "decode" else PREFILL
    if not context.on_gpu:
        shape = Shape(2, 40, "4/2", 16, queries=1 if job == "decode" else 40)
    sizes = Sizes(
        (shape.context,) * shape.batch,
        (shape.queries,) * shape.batch,
        shape.num_q_heads,
        shape.num_kv_heads,
        HEAD_DIM,
        shape.block_size,
    )
    return (_attention(shape.name, sizes, implementation),)


def inputs(program: Program) -> tuple[Any, ...]:
    """Returns the program's arguments: random numbers, and the indices that it was given."""
    numbers = np.random.default_rng(0).standard_normal(_NUMBERS, np.float32)

    def filled(leaf: Any) -> np.ndarray:
        if isinstance(leaf, np.ndarray):
            return leaf
        return np.resize(numbers.astype(leaf.dtype), leaf.shape)

    return jax.tree.map(filled, program.arguments())


def _attention(name: str, sizes: Sizes, implementation: str) -> Program:
    """Returns a call of `paged_attention` with the log-sum-exp; its arguments are no pytrees."""
    max_query_len = max(sizes.query_lens)

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, tables: jax.Array, lens: jax.Array, starts: Any
    ) -> Any:
        unread = jnp.zeros(q.shape[0], jnp.int32)
        metadata = AttentionMetadata(unread, unread, tables, lens, starts, max_query_len)
        return paged_attention(q, k, v, metadata, return_lse=True, implementation=implementation)

    def arguments() -> tuple[Any, ...]:
        ids = 1 + np.random.default_rng(0).permutation(sizes.num_blocks - 1).astype(np.int32)
        counts = [-(-length // sizes.block_size) for length in sizes.seq_lens]
        tables = np.zeros((len(counts), max(counts)), np.int32)
        for row, end in enumerate(np.cumsum(counts)):
            tables[row, : counts[row]] = ids[end - counts[row] : end]
        pool = sizes.num_blocks, sizes.num_kv_heads, sizes.block_size, sizes.head_dim
        return (
            _bfloat16(sum(sizes.query_lens), sizes.num_q_heads, sizes.head_dim),
            _bfloat16(*pool),
            _bfloat16(*pool),
            tables,
            np.array(sizes.seq_lens, np.int32),
            np.cumsum((0, *sizes.query_lens), dtype=np.int32),
        )

    return Program(f"hints {implementation}: {name}", attend, arguments, (), _NO_COMMAND_BUFFERS)


def _moves(implementation: str) -> tuple[Program, ...]:
    """Returns the operations on a cache of 8 blocks of 16 tokens, 2 heads of 64 numbers."""
    pool = 8, 2, 16, 64

    def cache(num_blocks: int = pool[0]) -> KVCache:
        array = _bfloat16(num_blocks, *pool[1:])
        return KVCache(array, array)

    def ids(*values: int) -> np.ndarray:
        return np.array(values, np.int32)

    rows, queries = _bfloat16(3, 2, 64), _bfloat16(3, 8, 64)
    angles = np.ones((3, 32), np.float32)
    calls: dict[str, tuple[Callable[..., Any], Callable[[], tuple[Any, ...]], tuple[int, ...]]] = {
        # A new token in two blocks' first and last slot, and padding.
        "write_kv": (write_kv, lambda: (rows, rows, cache(), ids(16, 127, 0)), (2,)),
        "rotate_and_write": (
            rotate_and_write,
            lambda: (queries, rows, rows, angles, angles, cache(), ids(16, 127, 0)),
            (5,),
        ),
        "copy_blocks": (copy_blocks, lambda: (cache(), ids(7, 2, 0), ids(1, 5, 0)), (0,)),
        "gather_blocks": (gather_blocks, lambda: (cache(), ids(7, 1, 4)), ()),
        "scatter_blocks": (scatter_blocks, lambda: (cache(), ids(7, 1, 0), cache(3)), (0,)),
    }
    return tuple(
        Program(
            f"hints {implementation}: {name}",
            functools.partial(function, implementation=implementation),
            arguments,
            donate,
            _NO_COMMAND_BUFFERS,
        )
        for name, (function, arguments, donate) in calls.items()
    )


def _bfloat16(*shape: int) -> Any:
    """Returns what takes an array's place; `inputs` fills it."""
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def compile_step(context: Context) -> None:
    """Compiles the engine's decode step of a Llama, for XLA to dump it.

    On a GPU for that GPU, or for the context's target, with the sizes of Llama 3 8B and
    `THUNK_LAYERS` layers. Without one, a toy with XLA's attention, for an H100.

    Raises:
      RuntimeError: there is no GPU, and what compiles without one is not installed.
    """
    sizes = THUNK_STEP if context.on_gpu else _TOY_STEP
    name, implementation = ("8b", "mosaic_gpu") if context.on_gpu else ("tiny", "xla")
    fields = random_models.CONFIGS[name] | {"num_hidden_layers": THUNK_LAYERS}
    config = config_from_hf(fields)
    target = context.target or (None if context.on_gpu else _TOY_TARGET)
    device = jax.devices()[0] if target is None else deviceless.target_device(target)
    build = functools.partial(FAMILIES[config.architecture].model, config, dtype=jnp.bfloat16)
    max_blocks = blocks_for(sizes["context"], sizes["block_size"])
    specs = config.cache_specs(sizes["block_size"], jnp.bfloat16)
    # What comes from the cache is not compiled, and not dumped.
    with deviceless.without_compilation_cache(), jax.default_device(device):
        programs = StepPrograms(
            nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0))),
            tuple(spec.shapes(1 + sizes["batch"] * max_blocks) for spec in specs),
            max_num_seqs=sizes["batch"],
            max_blocks_per_seq=max_blocks,
            logprobs_width=1,
            implementation=implementation,
            cache_implementation=implementation,
        )
        batch = sizes["batch"]
        programs.compile([Bucket(batch, batch, max_blocks, is_decode=True, filters=False)])


def dumped_sequence(folder: pathlib.Path) -> str:
    """Returns the thunks in a folder that XLA dumped to, after the passes over them if any ran.

    Raises:
      FileNotFoundError: XLA dumped none of the step.
    """
    for suffix in ("thunk_sequence_after_thunk_passes", "thunk_sequence"):
        found = sorted(folder.glob(f"*jit_step.*{suffix}.txt"))
        if found:
            return found[-1].read_text()
    there = ", ".join(sorted(path.name for path in folder.glob("*"))[:20])
    raise FileNotFoundError(f"no thunks of jit_step among: {there}")
