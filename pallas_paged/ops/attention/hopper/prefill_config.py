"""How the prefill kernels cut their work: frozen data, and the choice where none is given."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class PrefillTuning:
    """How the sm_90a kernel cuts its work; every combination gives the same result.

    Attributes:
      tile_keys: keys per step, a multiple of 64.
      stages: steps whose keys and values are in shared memory at a time.
      in_registers: whether the second product reads the weights from registers and adds up in
        them. Interpret mode cannot do that: False takes the weights by way of shared memory and
        adds the product afterwards. On a GPU that costs registers, and speed.
      converted: of a quantised cache, steps that are in shared memory as numbers of 16 bits too.
      converters: of a quantised cache, warpgroups that convert: one, or one for keys and one for
        values. A second one takes registers from those that compute.
      turns: whether the two computing warpgroups take turns, products of one under the softmax of
        the other.
      ahead: whether a warpgroup begins the products of a step's keys before it waits for those of
        the values of the step before.
      persistent: whether there are as many thread blocks as the GPU holds, each with one tile after
        the other, else one for each tile that there may be.
    """

    tile_keys: int = 128
    stages: int = 2
    in_registers: bool = True
    converted: int = 1
    converters: int = 1
    turns: bool = True
    ahead: bool = True
    persistent: bool = True

    def __post_init__(self) -> None:
        if self.tile_keys < 64 or self.tile_keys % 64:
            raise ValueError(f"tile_keys={self.tile_keys} must be a positive multiple of 64")
        if self.stages < 2:
            raise ValueError(f"stages={self.stages} must be at least 2: one is read, one filled")
        if self.converted < 1:
            raise ValueError(f"converted={self.converted} must be at least 1")
        if self.converters not in (1, 2):
            raise ValueError(f"converters={self.converters} must be 1 or 2")


def prefill_tuning(
    head_dim: int, interpreted: bool = False, quantised: bool = False
) -> PrefillTuning:
    """Returns a tuning that fits into the registers and the shared memory of an sm_90a.

    By estimate, not by measurement. A quantised cache is converted by two warpgroups, with a step
    of numbers that are multiplied beside one that is made: one would take longer than the products.
    At head_dim 256 the computing ones have no registers to give away, and wait for one; nor do they
    have any for a loop over tiles, with the oldest JAX.

    Args:
      head_dim: D.
      interpreted: whether it is for interpret mode.
      quantised: whether the cache is.
    """
    in_registers = not interpreted
    if quantised and head_dim > 192:
        return PrefillTuning(64, 2, in_registers, turns=False, ahead=False, persistent=False)
    if quantised:
        tile, stages = (128, 4) if head_dim <= 64 else (64, 4 if head_dim <= 128 else 2)
        return PrefillTuning(tile, stages, in_registers, converted=2, converters=2)
    if head_dim <= 64:
        return PrefillTuning(128, 4, in_registers)
    return PrefillTuning(128 if head_dim <= 128 else 64, 2, in_registers)
