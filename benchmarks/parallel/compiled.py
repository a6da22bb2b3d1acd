"""Decode steps and plans of memory, compiled for GPUs that are not here, each GPU in its process.

JAX assembles all Mosaic GPU kernels of a process for the architecture of the first one, so that
each kind of GPU has a process of its own.
"""

import concurrent.futures
import dataclasses
import multiprocessing
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_paged.deviceless import target_devices, target_memory_bytes
from pallas_paged.engine.compiling import NOT_OURS_BYTES, prepare
from pallas_paged.engine.config import EngineConfig
from pallas_paged.engine.core.buckets import Bucket
from pallas_paged.engine.device.exchanges import Exchanges, by_kind, least
from pallas_paged.engine.device.placement import Placement, share_shapes
from pallas_paged.engine.device.pool_size import PoolPlan, num_bytes
from pallas_paged.engine.device.step_report import SHAPES, compile_step
from pallas_paged.engine.kv.sharing import blocks_for
from pallas_paged.models import ModelConfig, abstract_model

DTYPE = "bfloat16"
BLOCK_SIZE = 16


class Case(NamedTuple):
    """A model on GPUs.

    Attributes:
      model: one of `step_report.SHAPES`.
      target: which GPU, one of `deviceless.TARGETS`.
      num_devices: how many share the model.
      num_layers: of the model's; None for all.
    """

    model: str
    target: str
    num_devices: int
    num_layers: int | None = None

    @property
    def shape(self) -> ModelConfig:
        """The model's."""
        shape = SHAPES[self.model]
        return shape if self.num_layers is None else shape.first_layers(self.num_layers)


@dataclasses.dataclass(frozen=True)
class Step:
    """A compiled decode step; bytes are those of one device.

    Attributes:
      case: of what.
      num_seqs: B.
      context: tokens of each, whose blocks the caches have.
      exchanges: by kind.
      least_exchanges: see `exchanges.least`.
      weight_bytes, cache_bytes: of the arguments.
      temporary_bytes, peak_bytes: see `StepReport`.
      num_launches: see `Launches.total`.
      num_buffers: command buffers.
      num_moves: weights and caches that are made anew.
      compile_s: from the first trace on.
    """

    case: Case
    num_seqs: int
    context: int
    exchanges: tuple[Exchanges, ...]
    least_exchanges: tuple[Exchanges, ...]
    weight_bytes: int
    cache_bytes: int
    temporary_bytes: int
    peak_bytes: int
    num_launches: int
    num_buffers: int
    num_moves: int
    compile_s: float


@dataclasses.dataclass(frozen=True)
class Memory:
    """Where the bytes of one device go in an engine.

    Attributes:
      case: of what.
      card_bytes: of the GPU's memory.
      plan: of the engine; its largest step is compiled.
      compile_s: from the first trace on.
    """

    case: Case
    card_bytes: int
    plan: PoolPlan
    compile_s: float


def needed_bytes(case: Case, num_seqs: int, context: int) -> int:
    """Returns the bytes of weights, keys and values of one device, which compile nothing."""
    shape = case.shape.for_devices(case.num_devices)
    state = nnx.state(abstract_model(shape, DTYPE))
    placement = Placement.on(*target_devices(case.target, case.num_devices))
    shares = share_shapes(
        jax.tree.leaves(state), placement.parameter_specs(state), case.num_devices
    )
    specs = shape.cache_specs(BLOCK_SIZE, jnp.dtype(DTYPE))
    blocks = _num_blocks(num_seqs, context) * sum(spec.block_bytes for spec in specs)
    return num_bytes(shares) + blocks // case.num_devices


def decode_step(case: Case, num_seqs: int, context: int) -> Step:
    """Compiles a decode step without top-k and top-p, over caches that hold its sequences."""
    begin = time.perf_counter()
    width = blocks_for(case.shape.max_model_len, BLOCK_SIZE)
    bucket = Bucket(num_seqs, num_seqs, width, is_decode=True, filters=False)
    config = EngineConfig(
        case.model,
        dtype=DTYPE,
        block_size=BLOCK_SIZE,
        max_num_seqs=num_seqs,
        tensor_parallel_size=case.num_devices,
    )
    report = compile_step(
        case.shape, config, bucket, case.target, num_blocks=_num_blocks(num_seqs, context)
    )
    assert report.launches is not None
    assert report.schedule is not None
    return Step(
        case,
        num_seqs,
        context,
        by_kind(report.collectives),
        least(case.shape, DTYPE, bucket, case.num_devices),
        report.weight_bytes,
        report.cache_bytes,
        report.temporary_bytes,
        report.peak_bytes,
        report.launches.total,
        len(report.schedule.command_buffers),
        len(report.moves),
        time.perf_counter() - begin,
    )


def memory(case: Case, max_num_seqs: int, max_num_batched_tokens: int) -> Memory:
    """Plans an engine's memory, for which its largest step is compiled."""
    begin = time.perf_counter()
    config = EngineConfig(
        case.model,
        dtype=DTYPE,
        block_size=BLOCK_SIZE,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        tensor_parallel_size=case.num_devices,
    )
    plan = prepare(case.shape, config, case.target).plan
    return Memory(case, target_memory_bytes(case.target), plan, time.perf_counter() - begin)


def room_bytes(card_bytes: int, share: float) -> int:
    """Returns what an engine may fill of a card of which it uses that share."""
    return int(card_bytes * share) - NOT_OURS_BYTES


class Processes:
    """Calls functions of a `Case` and more, each kind of GPU in a process of its own."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._pools: dict[str, concurrent.futures.ProcessPoolExecutor] = {}

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *error: object) -> None:
        for pool in self._pools.values():
            pool.shutdown(cancel_futures=True)

    def map[R](self, function: Callable[..., R], cases: Sequence[Case], *arguments: Any) -> list[R]:
        """Returns `function(case, *arguments)` of each case, in their order."""
        found = []
        for case in cases:
            if case.target not in self._pools:
                pool = concurrent.futures.ProcessPoolExecutor(1, mp_context=self._context)
                self._pools[case.target] = pool
            found.append(self._pools[case.target].submit(function, case, *arguments))
        return [future.result() for future in found]


def _num_blocks(num_seqs: int, context: int) -> int:
    return 1 + num_seqs * blocks_for(context, BLOCK_SIZE)
