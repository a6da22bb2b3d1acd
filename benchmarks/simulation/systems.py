"""The systems that the figures compare: ours with today's features or without, and the baselines.

`paper` is the paper's own system as far as its figures depend on it: whole prompts in programs of
their own, no prefix cache, a host that prepares a step while the device waits. What its host and
kernels cost is not in the paper. `PAPER_HOST` and `PAPER_SHARE_OF_BANDWIDTH` are chosen so that two
figures come out, vLLM's mean batches in Fig. 13 (30.42 and 132.44 requests); all systems of the
paper, the baselines too, have the same. The lengths of drawn outputs (`workloads.LENGTHS`) and how
drawn beams die (`jobs.BEAM_TEMPERATURE`) are chosen by figures of the paper's, too. Rows of the
summary by which something was chosen say so, and count as no confirmation.
"""

import dataclasses
from typing import NamedTuple

from benchmarks.contiguous import ContiguousMemory, Reserve
from benchmarks.simulation.cost_model import Costs, costs_on
from benchmarks.simulation.device import Candidates, SimulatedDevice, Way
from benchmarks.simulation.hardware import hardware
from benchmarks.simulation.shapes import Shape
from pallas_paged.deviceless import target_bandwidth
from pallas_paged.engine.core.buckets import Buckets
from pallas_paged.engine.core.engine_core import EngineCore
from pallas_paged.engine.core.planner import Planner
from pallas_paged.engine.core.policies import always_recompute, always_swap
from pallas_paged.engine.core.scheduler import Scheduler
from pallas_paged.engine.kv.block_memory import BlockTableMemory
from pallas_paged.engine.kv.host_pool import HostPool
from pallas_paged.engine.kv.sharing import blocks_for

MAX_MODEL_LEN = 2048
MAX_NUM_SEQS = 1024
"""More than memory holds in any figure: the paper does not say what its systems allow."""
VOCAB_SIZE = 32_000
STEP_COST = 256
"""Tokens that a GPU computes as long as it reads weights, see `Buckets`."""
BEAM_LOGPROBS = 16
"""The most candidates of a beam: twice the widest beam, and some."""
PAPER_HOST = (6e-3, 0.12e-3)
"""Seconds of a step, and of each sequence in it, in which the device waits for the host."""
PAPER_SHARE_OF_BANDWIDTH = 0.75
OUR_HOST = (1.0e-3, 4e-6)
"""Of `benchmarks.host_cost`: 0.8 to 0.9 ms and less for 256 sequences, on a machine like ours."""


@dataclasses.dataclass(frozen=True)
class System:
    """How requests are served.

    Attributes:
      name: in tables and pictures.
      reserve: None pages memory; else how much of contiguous memory is reserved for a sequence.
      is_static: whether a batch starts when the one before has ended.
      block_size: S.
      caches_prefixes: whether blocks of earlier requests are found.
      mixes: whether prompts and decoding are one program, and prompts are cut where that is better;
        else prompts are whole as far as they fit into a step, and programs of their own.
      overlaps: whether the host prepares a step while the one before runs.
      cascades: whether a shared prefix is read for several sequences at once.
      is_of_paper: whether host and kernels cost what the paper's did; else ours, whose shapes are
        padded.
      kv_itemsize: bytes of an element of the cache; 1 doubles the pool.
      waits: whether a request waits for a step that computes a prefix of its own.
      swaps: whether what loses its memory is swapped out, and not computed again.
      shares: whether samples and beams of a request share blocks; else each is a request.
    """

    name: str
    reserve: Reserve | None = None
    is_static: bool = False
    block_size: int = 16
    caches_prefixes: bool = False
    mixes: bool = False
    overlaps: bool = False
    cascades: bool = False
    is_of_paper: bool = True
    kv_itemsize: int = 2
    waits: bool = False
    swaps: bool = False
    shares: bool = True


PAPER = System("paged")
ORCA_ORACLE = System("orca-oracle", reserve="oracle", shares=False)
ORCA_POW2 = System("orca-pow2", reserve="pow2", shares=False)
ORCA_MAX = System("orca-max", reserve="max", shares=False)
STATIC = System("static", reserve="max", is_static=True, shares=False)
OF_PAPER = (PAPER, ORCA_ORACLE, ORCA_POW2, ORCA_MAX)
"""Which Figs. 12 and 13 compare, beside `STATIC`."""
PAPER_SHARING = dataclasses.replace(PAPER, caches_prefixes=True)
"""Of Fig. 16: a prefix that is known stays in memory."""
_OVERLAPS = dataclasses.replace(
    PAPER, name="our host and kernels, overlapped", overlaps=True, is_of_paper=False
)
_MIXES = dataclasses.replace(_OVERLAPS, name="+ chunked prefill", mixes=True)
TODAY = (_OVERLAPS, _MIXES, dataclasses.replace(_MIXES, name="+ fp8 KV cache", kv_itemsize=1))
"""This project's host and kernels, and what they do today, each with all before it.

What converting an 8-bit cache costs a GPU without such units, as an A100, is left out.
"""
CACHES = dataclasses.replace(_MIXES, name="+ prefix cache", caches_prefixes=True)
WAITS = dataclasses.replace(CACHES, name="+ waiting for a prefix", waits=True)
TODAY_SHARING = (CACHES, dataclasses.replace(WAITS, name="+ cascade", cascades=True))
"""Likewise for requests with a common prefix."""


class Simulated(NamedTuple):
    """An engine on a simulated device.

    Attributes:
      core: the real one.
      memory: its blocks.
      device: with the clock.
    """

    core: EngineCore
    memory: BlockTableMemory
    device: SimulatedDevice


def build(
    system: System,
    shape: Shape,
    *,
    seed: int,
    max_num_seqs: int = MAX_NUM_SEQS,
    max_model_len: int = MAX_MODEL_LEN,
    beam_temperature: float | None = None,
) -> Simulated:
    """Returns an engine of a system that serves a model.

    Args:
      system: how it serves.
      shape: the model and its devices.
      seed: of the tokens that it makes up.
      max_num_seqs: most sequences at once.
      max_model_len: most tokens of one.
      beam_temperature: of `Candidates`, for beam searches; None for samples.
    """
    S = system.block_size
    shape = dataclasses.replace(shape, kv_itemsize=system.kv_itemsize)
    num_blocks = 1 + shape.num_slots * 2 // system.kv_itemsize // S
    sizes = {
        "num_blocks": num_blocks,
        "block_size": S,
        "max_num_seqs": max_num_seqs,
        "max_model_len": max_model_len,
    }
    memory: BlockTableMemory
    if system.reserve is None:
        memory = BlockTableMemory(**sizes, enable_prefix_caching=system.caches_prefixes)
    else:
        memory = ContiguousMemory(**sizes, reserve=system.reserve)
    max_num_batched_tokens = max_model_len + max_num_seqs
    buckets = Buckets.for_limits(
        max_num_seqs,
        max_num_batched_tokens,
        blocks_for(max_model_len, S),
        step_cost=STEP_COST if system.mixes else 0,
        shares_prefix=system.cascades,
    )
    scheduler = Scheduler(
        memory,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        watermark_blocks=0 if system.reserve is not None else None,
        choose_recovery=always_swap if system.swaps else always_recompute,
        host_pool=HostPool(num_blocks if system.swaps else 0, memory.num_usable_blocks),
        worth_while=buckets.worth_while if system.mixes else whole_prompts,
        step_cost=STEP_COST if system.waits else 0,
    )
    candidates = None
    if beam_temperature is not None:
        candidates = Candidates(beam_temperature, VOCAB_SIZE, seed)
    device = SimulatedDevice(
        costs_of(system, shape),
        way_of(system, shape),
        vocab_size=VOCAB_SIZE,
        seed=seed,
        logprobs_width=BEAM_LOGPROBS,
        candidates=candidates,
    )
    core = EngineCore(
        scheduler,
        Planner(memory, buckets, device.choose),
        device,
        vocab_size=VOCAB_SIZE,
        async_scheduling=system.overlaps,
    )
    return Simulated(core, memory, device)


def whole_prompts(num_tokens: int, num_fixed: int) -> int:
    """Returns that a step with prompts computes all of them."""
    return num_tokens


def costs_of(system: System, shape: Shape) -> Costs:
    """Returns what steps cost in a system."""
    device = hardware(shape.gpu, shape.num_gpus)
    if system.is_of_paper:
        bytes_per_s = PAPER_SHARE_OF_BANDWIDTH * target_bandwidth(shape.gpu)
        device = dataclasses.replace(device, bytes_per_s=bytes_per_s)
    return costs_on(shape, device, system.block_size)


def way_of(system: System, shape: Shape) -> Way:
    """Returns how steps run in a system."""
    host_s, host_s_per_seq = PAPER_HOST if system.is_of_paper else OUR_HOST
    return Way(
        mixes=system.mixes,
        pads=not system.is_of_paper,
        host_s=host_s,
        host_s_per_seq=host_s_per_seq,
        group=shape.num_heads // shape.num_kv_heads,
        block_size=system.block_size,
    )
