"""Where an engine's arrays lie: its devices as a mesh, and how each kind of array is laid on it."""

import contextlib
import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from pallas_paged.dispatch import target_device

_WHOLE = PartitionSpec()


def may_look(platform: str) -> bool:
    """Whether a running program can look at its inputs to decide what to do, at no cost.

    XLA's programs for GPUs have the host do that, for branches and for loops without a fixed number
    of turns: it waits until all that the device has to do before is done. So steps in flight would
    end, and what a step needs has to be decided before it is dispatched.
    """
    return platform == "cpu"


@dataclasses.dataclass(frozen=True)
class Placement:
    """The devices of an engine. Everything lies whole on each of them: nothing is split yet.

    Who makes arrays asks here for their sharding, and who traces programs asks for their shapes, so
    that tensor parallelism has one place to say what is split over which axis of the mesh.

    Attributes:
      mesh: the devices; None for JAX's default device, whichever that is when it is asked.
    """

    mesh: Mesh | None = None

    @classmethod
    def on(cls, *devices: jax.Device) -> "Placement":
        """Returns a placement on these devices, as the axis `model` of a mesh."""
        return cls(Mesh(np.array(devices), ("model",)))

    @property
    def device(self) -> jax.Device:
        """The device that programs are traced for, and whose memory counts: one like all others."""
        return target_device() if self.mesh is None else self.mesh.devices.flat[0]

    @property
    def may_look(self) -> bool:
        """See the function."""
        return may_look(self.device.platform)

    @property
    def inputs(self) -> Sharding:
        """Of a step's inputs, and of what the device keeps of the rows."""
        return self._sharding(_WHOLE)

    @property
    def kv_caches(self) -> Sharding:
        """Of each array of the caches, and of blocks on their way to and from the host."""
        return self._sharding(_WHOLE)

    @property
    def host_blocks(self) -> Sharding:
        """Of blocks that are swapped out: in pinned memory of the host, if the device has any."""
        kinds = {memory.kind for memory in self.device.addressable_memories()}
        kind = "pinned_host" if "pinned_host" in kinds else self.device.default_memory().kind
        return self._sharding(_WHOLE, kind)

    def parameter(self, axes: tuple[str, ...], shape: tuple[int, ...]) -> Sharding:
        """Of a parameter, from the logical names of its axes and its shape; see `load_model`."""
        return self._sharding(_WHOLE)

    def put_parameters(self, params: Any) -> Any:
        """Returns parameters that lie where they belong; shapes stay shapes.

        What lies there already is not copied.
        """
        if self.mesh is None or isinstance(jax.tree.leaves(params)[0], jax.ShapeDtypeStruct):
            return params
        return jax.device_put(params, self._sharding(_WHOLE))

    def parameter_shapes(self, params: Any) -> Any:
        """Returns shapes and dtypes of parameters that lie as `parameter` says."""
        return self._shapes(params, _WHOLE)

    def input_shapes(self, arrays: Any) -> Any:
        """Returns shapes and dtypes of arrays that lie as `inputs` says, to trace programs with."""
        return self._shapes(arrays, _WHOLE)

    def cache_shapes(self, arrays: Any) -> Any:
        """Returns shapes and dtypes of arrays that lie as `kv_caches` says."""
        return self._shapes(arrays, _WHOLE)

    def as_target(self) -> contextlib.AbstractContextManager[Any]:
        """Inside, what is traced is for these devices, and new arrays lie on the first of them."""
        if self.mesh is None or self.device == target_device():
            return contextlib.nullcontext()  # the same setting by another name compiles anew
        return jax.default_device(self.device)

    def _sharding(self, spec: PartitionSpec, memory_kind: str | None = None) -> Sharding:
        if self.mesh is None or self.mesh.size == 1:
            return SingleDeviceSharding(self.device, memory_kind=memory_kind)
        return NamedSharding(self.mesh, spec, memory_kind=memory_kind)

    def _shapes(self, arrays: Any, spec: PartitionSpec) -> Any:
        """Leaves out how they lie on one device: `as_target` says it, and programs stay the same.

        Asks for no device.
        """
        is_one = self.mesh is None or self.mesh.size == 1
        sharding = None if is_one else self._sharding(spec)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arrays
        )


DEFAULT_DEVICE = Placement()
"""JAX's default device, whichever that is when it is asked."""
