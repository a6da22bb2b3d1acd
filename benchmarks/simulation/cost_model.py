"""What a step costs on a device: a sum of roofline terms of what it reads, computes and launches.

A step reads the weights once and multiplies each token with all of them: the longer of the two.
Attention reads the keys and values of each sequence once, or multiplies each token with all before
it: the longer of the two, for prompts and for sequences that decode apart, because the ones do not
hide the others. Launches, blocks copied, copies to and from the host, and the all-reduces of
several devices come on top. Writing keys and values, norms and sampling are left out.
"""

import dataclasses
from typing import NamedTuple

from benchmarks.simulation.hardware import Hardware
from benchmarks.simulation.shapes import Shape

LAUNCHES_PER_LAYER = 10
"""Of a decode step of this project, as `tests/engine/test_whole_step_deviceless.py` counts them."""
COLLECTIVE_S = 15e-6
"""Of a small collective between the devices of one machine; an assumption."""


class Attention(NamedTuple):
    """What attention does for some sequences of a step.

    Attributes:
      num_kv_tokens: whose keys and values it reads.
      num_pairs: of a query's and a key's token.
    """

    num_kv_tokens: int = 0
    num_pairs: int = 0


class Work(NamedTuple):
    """What a step, or the part of it that is a program of its own, does.

    Attributes:
      num_tokens: whose products are computed, padding included.
      decodes: attention of the sequences with one token.
      prompts: attention of the others.
      num_copied_blocks: inside the pool.
      num_moved_blocks: to and from the host.
      num_moves: copies to and from the host that these are.
    """

    num_tokens: int
    decodes: Attention = Attention()
    prompts: Attention = Attention()
    num_copied_blocks: int = 0
    num_moved_blocks: int = 0
    num_moves: int = 0


@dataclasses.dataclass(frozen=True)
class Costs:
    """The constants of a device and a model; each product of two of them is seconds.

    Attributes:
      weights_s: to read all weights.
      token_s: to multiply one token with all weights.
      kv_token_s: to read one token's keys and values.
      pair_s: to attend from one token to another.
      step_s: of each program: launches, all-reduces.
      copied_block_s: to copy one block inside the pool.
      moved_block_s: to copy one block to or from the host.
      move_s: to start such a copy.
      row_s: of each token, in the all-reduces of several devices.
    """

    weights_s: float
    token_s: float
    kv_token_s: float
    pair_s: float
    step_s: float
    copied_block_s: float = 0.0
    moved_block_s: float = 0.0
    move_s: float = 0.0
    row_s: float = 0.0

    def seconds(self, work: Work) -> float:
        """Returns what a program that does this takes."""
        products = max(self.weights_s, work.num_tokens * self.token_s)
        attention = sum(
            max(part.num_kv_tokens * self.kv_token_s, part.num_pairs * self.pair_s)
            for part in (work.decodes, work.prompts)
        )
        moves = work.num_moves * self.move_s + work.num_moved_blocks * self.moved_block_s
        copies = work.num_copied_blocks * self.copied_block_s
        return self.step_s + products + attention + work.num_tokens * self.row_s + moves + copies


def ring_share(kind: str, num_devices: int) -> float:
    """Returns how much of a collective's bytes go through each device's link, in a ring.

    Args:
      kind: "all-reduce" or "all-gather".
      num_devices: in the ring.

    Raises:
      KeyError: another kind.
    """
    passes = {"all-reduce": 2, "all-gather": 1}[kind]
    return passes * (num_devices - 1) / num_devices


def costs_on(shape: Shape, device: Hardware, block_size: int) -> Costs:
    """Returns the constants of a model on GPUs that divide its heads and columns among them."""
    n = device.num_devices
    bytes_per_s, flops_per_s = n * device.bytes_per_s, n * device.flops_per_s
    layers, kv_bytes = shape.num_layers, shape.kv_bytes_per_token
    block_bytes = block_size * kv_bytes
    reduces = 2 * layers if n > 1 else 0
    reduced_bytes = reduces * ring_share("all-reduce", n) * shape.hidden * 2
    return Costs(
        weights_s=shape.weight_bytes / bytes_per_s,
        token_s=2 * shape.num_parameters / flops_per_s,
        kv_token_s=kv_bytes / bytes_per_s,
        pair_s=4 * layers * shape.num_heads * shape.head_dim / flops_per_s,
        step_s=LAUNCHES_PER_LAYER * layers * device.launch_s + reduces * COLLECTIVE_S,
        copied_block_s=2 * block_bytes / bytes_per_s,
        moved_block_s=block_bytes / (n * device.host_bytes_per_s),
        move_s=2 * layers * device.launch_s,
        row_s=reduced_bytes / device.link_bytes_per_s,
    )
