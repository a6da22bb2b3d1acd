"""What the devices of a step exchange, by kind, and the least that they need to."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp

from pallas_paged.collectives import Collective
from pallas_paged.engine.core.buckets import Bucket
from pallas_paged.models import ModelConfig
from pallas_paged.models.sharding import partition_spec


@dataclasses.dataclass(frozen=True, order=True)
class Exchanges:
    """The exchanges of one kind in one run of a step.

    Attributes:
      kind: as `Collective` has it.
      count: how many.
      num_bytes: of what each device has after them, together.
    """

    kind: str
    count: int
    num_bytes: int

    def __str__(self) -> str:
        return f"{self.count} {self.kind} ({self.num_bytes / 2**20:.2f} MiB)"


def by_kind(collectives: Iterable[Collective], num_steps: int = 1) -> tuple[Exchanges, ...]:
    """Returns the exchanges of a run by kind, sorted.

    Args:
      collectives: of the program.
      num_steps: of its bucket: the turns of a loop that may end before.
    """
    found: dict[str, tuple[int, int]] = {}
    for one in collectives:
        times = num_steps if one.num_times is None else one.num_times
        count, num_bytes = found.get(one.kind, (0, 0))
        found[one.kind] = count + times, num_bytes + times * one.num_bytes
    return tuple(sorted(Exchanges(kind, *sums) for kind, sums in found.items()))


def least(
    shape: ModelConfig, dtype: Any, bucket: Bucket, num_devices: int, *, deterministic: bool = False
) -> tuple[Exchanges, ...]:
    """Returns the exchanges that a step needs where devices divide heads, MLP and vocabulary.

    Two all-reduces of activations in each layer, behind the attention and behind the MLP; one more
    of the token embeddings, if the vocabulary is divided; and an all-gather of the float32 logits.
    In a plain step with prompts the last layer's are of those tokens alone whose logits are wanted.

    Args:
      shape: of the model.
      dtype: of activations.
      bucket: the step's shape; a draft model's exchanges are left out.
      num_devices: n.
      deterministic: see `EngineConfig`: the last layer computes all tokens.
    """
    if num_devices == 1:
        return ()
    itemsize, tokens, logits = jnp.dtype(dtype).itemsize, bucket.num_tokens, bucket.num_logits
    at_the_end = tokens if bucket.is_full or deterministic else logits
    rows = 2 * (tokens * (shape.num_layers - 1) + at_the_end)
    count, elements = 2 * shape.num_layers, rows * shape.hidden_size
    steps = bucket.num_steps
    is_divided = bool(partition_spec(("vocab",), (shape.vocab_size,), num_devices))
    if is_divided:
        count, elements = count + 1, elements + tokens * shape.embedding_size
    wanted = bucket.num_seqs if bucket.num_drafts == 0 else logits
    vocab_size = -(-shape.vocab_size // num_devices) * num_devices  # parts of one size
    return (
        Exchanges("all-gather", steps, steps * wanted * vocab_size * 4),
        Exchanges("all-reduce", steps * count, steps * elements * itemsize),
    )
