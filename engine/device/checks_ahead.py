"""Compiles what checks kernels in a thread of its own, while an engine reads its weights."""

import jax

from pallas_paged.deviceless import compile_lowered
from pallas_paged.dispatch import target_device
from pallas_paged.engine.config import EngineConfig
from pallas_paged.engine.device.background import Background
from pallas_paged.engine.device.choices import Choices, choose
from pallas_paged.engine.device.drafted import abstract_network
from pallas_paged.engine.device.kernel_check import KernelCheck
from pallas_paged.engine.device.placement import Placement
from pallas_paged.models import ModelConfig


class ChecksAhead:
    """The programs of checks, which take seconds to trace and to compile.

    Attributes:
      choices: what is checked is among them.
    """

    def __init__(self, choices: Choices, placement: Placement) -> None:
        """Begins at once, for the device of `placement`."""
        self.choices = choices
        self._placement = placement
        self._programs: dict[tuple[str, int], jax.stages.Compiled] = {}
        self._background = Background(self._compile)
        for check in choices.checks:
            self._background.start(check)

    def programs(self) -> dict[tuple[str, int], jax.stages.Compiled]:
        """Returns the programs by name, when they are done; without those that failed."""
        self._background.wait()
        return self._programs

    def _compile(self, check: KernelCheck) -> None:
        with self._placement.as_target():
            self._programs[check.name] = compile_lowered(check.lower(), target_device())


def begin_checks(
    config: EngineConfig, shape: ModelConfig, max_model_len: int, placement: Placement
) -> ChecksAhead | None:
    """Begins the checks of an engine's model; call it as the target.

    None where there is nothing to compile, or the dtype is known only when the weights are read.
    """
    dtype = shape.checkpoint_dtype if config.dtype == "auto" else config.dtype
    has_none = placement.device.platform == "cpu" or not config.verify_kernels
    if has_none or config.bundle is not None or dtype is None:
        return None
    network = abstract_network(config, shape, max_model_len)
    return ChecksAhead(choose(config, network, placement), placement)
