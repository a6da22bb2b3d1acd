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
    """

    tile_keys: int = 128
    stages: int = 2
    in_registers: bool = True
    converted: int = 1

    def __post_init__(self) -> None:
        if self.tile_keys < 64 or self.tile_keys % 64:
            raise ValueError(f"tile_keys={self.tile_keys} must be a positive multiple of 64")
        if self.stages < 2:
            raise ValueError(f"stages={self.stages} must be at least 2: one is read, one filled")
        if self.converted < 1:
            raise ValueError(f"converted={self.converted} must be at least 1")


def prefill_tuning(head_dim: int, interpreted: bool = False) -> PrefillTuning:
    """Returns a tuning that fits into the registers and the shared memory of an sm_90a.

    Args:
      head_dim: D.
      interpreted: whether it is for interpret mode.
    """
    if head_dim <= 64:
        return PrefillTuning(128, 4, not interpreted, converted=2)
    return PrefillTuning(128 if head_dim <= 128 else 64, 2, not interpreted)
