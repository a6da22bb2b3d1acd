"""What decode steps on several GPUs would take, by their compiled bytes and stated bandwidths.

`benchmarks.simulation.cost_model` with a compiled step's own bytes and launches, and with its own
collectives: in a ring each device sends 2 (n - 1) / n of an all-reduce's bytes and (n - 1) / n of
an all-gather's, and each takes a latency besides. Nothing overlaps: an all-reduce needs the product
before it, and what comes next needs the all-reduce.
"""

from collections.abc import Iterable
from typing import NamedTuple

from benchmarks.parallel.compiled import BLOCK_SIZE, DTYPE, Step
from benchmarks.simulation.cost_model import COLLECTIVE_S, Attention, Costs, Work, ring_share
from benchmarks.simulation.hardware import SHARE_OF_LINKS, Hardware
from pallas_paged.engine.device.exchanges import Exchanges
from pallas_paged.engine.kv.sharing import blocks_for
from pallas_paged.models import ModelConfig

INFINIBAND_BYTES_PER_S = 50e9
"""Of one NDR port, 400 Gb/s, one way."""
_ITEMSIZE = {"bfloat16": 2}[DTYPE]


class Link(NamedTuple):
    """What joins the devices.

    Attributes:
      name: in tables.
      bytes_per_s: of each device, one way, as copies get it.
      latency_s: of each collective besides; an assumption.
    """

    name: str
    bytes_per_s: float
    latency_s: float


class Simulated(NamedTuple):
    """A simulated decode step.

    Attributes:
      step_s: all of it.
      memory_s: reading weights, keys and values.
      collectives_s: of `step_s`, what devices exchange.
      launches_s: likewise, from one kernel to the next.
      tokens_per_s: of all sequences.
    """

    step_s: float
    memory_s: float
    collectives_s: float
    launches_s: float
    tokens_per_s: float


def links_of(device: Hardware) -> tuple[Link, ...]:
    """Returns what may join GPUs: NVLink, PCIe, or an InfiniBand port for each."""
    return (
        Link("NVLink", device.link_bytes_per_s, COLLECTIVE_S),
        Link("PCIe", device.host_bytes_per_s, 25e-6),
        Link("InfiniBand NDR", SHARE_OF_LINKS * INFINIBAND_BYTES_PER_S, 30e-6),
    )


def collectives_s(exchanges: Iterable[Exchanges], num_devices: int, link: Link) -> float:
    """Returns the seconds of a step's collectives, one after the other."""
    return sum(
        one.count * link.latency_s
        + ring_share(one.kind, num_devices) * one.num_bytes / link.bytes_per_s
        for one in exchanges
    )


def simulate(step: Step, device: Hardware, link: Link) -> Simulated:
    """Returns what a decode step would take, all its sequences as long as its `context`."""
    shape, n = step.case.shape, step.case.num_devices
    kv_tokens = step.num_seqs * step.context
    # The caches have a null block, and a last block's tail, which nobody reads.
    slots = BLOCK_SIZE * (1 + step.num_seqs * blocks_for(step.context, BLOCK_SIZE))
    num_parameters = multiplied_bytes(step.weight_bytes, shape, n) // _ITEMSIZE
    launches_s = step.num_launches * device.launch_s
    exchanged_s = collectives_s(step.exchanges, n, link) if n > 1 else 0.0
    costs = Costs(
        weights_s=num_parameters * _ITEMSIZE / device.bytes_per_s,
        token_s=2 * num_parameters / device.flops_per_s,
        kv_token_s=step.cache_bytes / slots / device.bytes_per_s,
        pair_s=4 * shape.num_layers * shape.num_q_heads * shape.head_dim / n / device.flops_per_s,
        step_s=launches_s + exchanged_s,
    )
    seconds = costs.seconds(Work(step.num_seqs, Attention(kv_tokens, kv_tokens)))
    memory_s = costs.weights_s + kv_tokens * costs.kv_token_s
    return Simulated(seconds, memory_s, exchanged_s, launches_s, step.num_seqs / seconds)


def multiplied_bytes(weight_bytes: int, shape: ModelConfig, num_devices: int) -> int:
    """Returns the bytes of the weights that a step reads all of.

    Of an embedding table that is not the output embedding too it reads a row for each token.
    """
    if shape.tie_word_embeddings:
        return weight_bytes
    table = shape.vocab_size * shape.embedding_size * _ITEMSIZE
    is_divided = shape.vocab_size % num_devices == 0
    return weight_bytes - table // (num_devices if is_divided else 1)
