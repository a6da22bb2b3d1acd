"""The shapes of the paper's models, as far as a step's cost depends on them.

Parameters and KV memory of the OPT models are those of the paper's Table 1 (Kwon et al. 2023); the
rest is in the published configurations, those of `step_report.SHAPES`.
"""

import dataclasses

from pallas_paged.engine.device import step_report
from pallas_paged.models import ModelConfig


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model on the devices that serve it.

    Attributes:
      name: of the model.
      num_parameters: how many.
      num_layers: L.
      hidden: of an activation.
      num_heads: Hq, query heads.
      num_kv_heads: Hk.
      head_dim: D.
      gpu: which devices, see `hardware.hardware`.
      num_gpus: how many.
      num_slots: tokens that the KV cache holds, over all devices.
      weight_itemsize: bytes of a parameter.
      kv_itemsize: bytes of an element of the KV cache.
    """

    name: str
    num_parameters: float
    num_layers: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    gpu: str
    num_gpus: int
    num_slots: int
    weight_itemsize: int = 2
    kv_itemsize: int = 2

    @property
    def weight_bytes(self) -> float:
        """Bytes of all parameters."""
        return self.num_parameters * self.weight_itemsize

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of a token's keys and values in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.kv_itemsize


def shape_of(
    name: str, model: ModelConfig, num_parameters: float, gpu: str, num_gpus: int, num_slots: int
) -> Shape:
    """Returns a model's shape from its configuration; the other arguments are those of `Shape`."""
    return Shape(
        name,
        num_parameters,
        model.num_layers,
        model.hidden_size,
        model.num_q_heads,
        model.num_kv_heads,
        model.head_dim,
        gpu,
        num_gpus,
        num_slots,
    )


_PAPER = {
    "opt-13b": (13e9, "a100-40gb", 1, 15_700),
    "opt-66b": (66e9, "a100-40gb", 4, 9_700),
    "opt-175b": (173e9, "a100-80gb", 8, 60_100),
}
SHAPES = {
    shape.name: shape
    for shape in (
        *(shape_of(name, step_report.SHAPES[name], *rest) for name, rest in _PAPER.items()),
        Shape("llama-13b", 13e9, 40, 5120, 40, 40, 128, "a100-40gb", 1, 15_700),
    )
}
