"""Where an engine's arrays lie: its devices as a mesh, and how each kind of array is laid on it."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from pallas_paged.dispatch import target_device
from pallas_paged.engine.errors import ProcessLostError
from pallas_paged.models.sharding import AXIS, partition_spec

WHOLE = PartitionSpec()
"""Of what every device has: a step's inputs, the rows, what is sampled."""
BY_HEAD = PartitionSpec(None, AXIS)
"""Of the caches, whose second axis is that of KV heads, in blocks on the host too."""


def may_look(platform: str) -> bool:
    """Whether a running program can look at its inputs to decide what to do, at no cost.

    XLA's programs for GPUs have the host do that, for branches and for loops without a fixed number
    of turns: it waits until all that the device has to do before is done. So steps in flight would
    end, and what a step needs has to be decided before it is dispatched.
    """
    return platform == "cpu"


@dataclasses.dataclass(frozen=True)
class Placement:
    """The devices of an engine, which share its model: see `pallas_paged.models.sharding`.

    Who makes arrays asks here for their sharding, and who traces programs asks for their shapes and
    lets `per_device` wrap them: each device runs the same program on its share.

    Attributes:
      mesh: the devices, of one process or of several; None for JAX's default device, whichever that
        is when it is asked.
    """

    mesh: Mesh | None = None

    @classmethod
    def on(cls, *devices: jax.Device) -> "Placement":
        """Returns a placement on these devices, as the axis `AXIS` of a mesh."""
        return cls(Mesh(np.array(devices), (AXIS,)))

    @property
    def num_devices(self) -> int:
        """How many devices share the model."""
        return 1 if self.mesh is None else self.mesh.size

    @property
    def device(self) -> jax.Device:
        """The device that programs are traced for, and whose memory counts: one like all others."""
        return target_device() if self.mesh is None else self.local_devices[0]

    @property
    def local_devices(self) -> Sequence[jax.Device]:
        """Those of this process; all of them, if they are only described."""
        if self.mesh is None:
            return [target_device()]
        return self.mesh.local_devices or list(self.mesh.devices.flat)

    @property
    def devices(self) -> Sequence[jax.Device]:
        """All of them, those of other processes included."""
        return [target_device()] if self.mesh is None else list(self.mesh.devices.flat)

    @property
    def is_local(self) -> bool:
        """Whether all devices are this process's."""
        return len(self.local_devices) == self.num_devices

    @property
    def may_look(self) -> bool:
        """See the function."""
        return may_look(self.device.platform)

    # --- where arrays lie ---------------------------------------------------------------------

    @property
    def inputs(self) -> Sharding:
        """Of a step's inputs, and of what the device keeps of the rows."""
        return self._sharding(WHOLE)

    @property
    def kv_caches(self) -> Sharding:
        """Of each array of the caches, and of blocks on their way to and from the host."""
        return self._sharding(BY_HEAD)

    @property
    def host_blocks(self) -> Sharding:
        """Of blocks that are swapped out: in pinned memory of the host, if the device has any."""
        kinds = {memory.kind for memory in self.device.addressable_memories()}
        kind = "pinned_host" if "pinned_host" in kinds else self.device.default_memory().kind
        return self._sharding(BY_HEAD, kind)

    def parameter(self, axes: tuple[str, ...], shape: tuple[int, ...]) -> Sharding:
        """Of a parameter, from the logical names of its axes; see `load_model`."""
        return self._sharding(partition_spec(axes, shape, self.num_devices))

    def parameter_specs(self, params: Any) -> list[PartitionSpec]:
        """Returns how each leaf of a model's state is divided."""
        if self.num_devices == 1:
            return [WHOLE] * len(jax.tree.leaves(params))
        variables = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, nnx.Variable))
        return [partition_spec(p.out_sharding, p.shape, self.num_devices) for p in variables]

    def put_inputs(self, array: np.ndarray) -> jax.Array:
        """Returns an array of the host on every device.

        Each process puts its own there, without looking whether the others' are the same.
        """
        if self.is_local:
            return jax.device_put(array, self.inputs)
        copies = [jax.device_put(array, device) for device in self.local_devices]
        return jax.make_array_from_single_device_arrays(array.shape, self.inputs, copies)

    def put_parameters(self, params: Any) -> Any:
        """Returns parameters that lie where they belong; shapes stay shapes.

        What lies there already is not copied.
        """
        leaves, tree = jax.tree.flatten(params)
        if self.mesh is None or isinstance(leaves[0], jax.ShapeDtypeStruct):
            return params
        shardings = map(self._sharding, self.parameter_specs(params))
        return jax.tree.unflatten(tree, map(jax.device_put, leaves, shardings))

    # --- how programs are traced --------------------------------------------------------------

    def per_device[F: Callable[..., Any]](self, function: F, in_specs: Any, out_specs: Any) -> F:
        """Returns a function of whole arrays that runs `function` on every device's shares.

        Args:
          function: of one device's shares; what it adds or gathers is all that devices exchange.
          in_specs: how its arguments are divided, see `jax.shard_map`.
          out_specs: how its results are.
        """
        if self.num_devices == 1:
            return function
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

    def parameter_shapes(self, leaves: Sequence[Any], specs: Sequence[PartitionSpec]) -> list[Any]:
        """Returns shapes and dtypes of a state's leaves that are divided like that."""
        return list(map(self._shapes, leaves, specs))

    def input_shapes(self, arrays: Any) -> Any:
        """Returns shapes and dtypes of arrays that lie as `inputs` says, to trace programs with."""
        return self._shapes(arrays, WHOLE)

    def cache_shapes(self, arrays: Any) -> Any:
        """Returns shapes and dtypes of arrays that lie as `kv_caches` says."""
        return self._shapes(arrays, BY_HEAD)

    @property
    def compiler_options(self) -> Mapping[str, Any]:
        """What XLA is told when it compiles for these devices, by name.

        Processes may compile at different times, or find a program in their own cache. Where they
        share a GPU's timing of variants, as is XLA's default, one would wait for another then.
        """
        alone = self.is_local or self.device.platform == "cpu"
        return {} if alone else {"xla_gpu_shard_autotuning": False}

    def as_target(self) -> contextlib.AbstractContextManager[Any]:
        """Inside, what is traced is for these devices, and new arrays lie on the first of them."""
        if self.mesh is None or self.device == target_device():
            return contextlib.nullcontext()  # the same setting by another name compiles anew
        return jax.default_device(self.device)

    # --- between processes --------------------------------------------------------------------

    def least(self, value: int) -> int:
        """Returns the least of what the processes of these devices say; all must ask.

        Raises:
          ProcessLostError: one of them is gone.
        """
        if self.is_local:
            return value
        try:
            return int(multihost_utils.process_allgather(np.int32(value)).min())
        except jax.errors.JaxRuntimeError as error:
            raise ProcessLostError.of(jax.process_index(), jax.process_count(), error) from error

    def moved(self, arrays: Any, sharding: Sharding) -> Any:
        """Returns arrays with the same shares on the same devices in another kind of memory.

        Each process moves its own; JAX would run a program of all processes for that.
        """
        if self.is_local:
            return jax.device_put(arrays, sharding)
        kind = sharding.memory_kind

        def move(array: jax.Array) -> jax.Array:
            shares = [
                jax.device_put(shard.data, SingleDeviceSharding(shard.device, memory_kind=kind))
                for shard in array.addressable_shards
            ]
            return jax.make_array_from_single_device_arrays(array.shape, sharding, shares)

        return jax.tree.map(move, arrays)

    def _sharding(self, spec: PartitionSpec, memory_kind: str | None = None) -> Sharding:
        if self.mesh is None or self.mesh.size == 1:
            return SingleDeviceSharding(self.device, memory_kind=memory_kind)
        return NamedSharding(self.mesh, spec, memory_kind=memory_kind)

    def _shapes(self, arrays: Any, spec: PartitionSpec) -> Any:
        """Leaves out how they lie on one device: `as_target` says it, and programs stay the same.

        Asks for no device.
        """
        sharding = None if self.num_devices == 1 else self._sharding(spec)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arrays
        )


def devices_for(num_devices: int) -> list[jax.Device]:
    """Returns JAX's default device, or so many of its platform, of all processes.

    Raises:
      ValueError: there are fewer, or some processes would have none of them.
    """
    first = target_device()
    if num_devices == 1 and jax.process_count() == 1:
        return [first]
    devices = jax.devices(first.platform)
    if len(devices) < num_devices:
        way_out = (
            "; to try it on a CPU, set the environment variable "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={num_devices} before Python starts"
            if first.platform == "cpu"
            else ""
        )
        raise ValueError(
            f"tensor_parallel_size={num_devices} needs as many devices, and JAX sees "
            f"{len(devices)} ({first.device_kind}){way_out}"
        )
    if jax.process_count() > 1 and len(devices) != num_devices:
        raise ValueError(
            f"tensor_parallel_size={num_devices} must be {len(devices)} here: the "
            f"{jax.process_count()} processes of this program share one model, all their devices do"
        )
    return devices[:num_devices]


DEFAULT_DEVICE = Placement()
"""JAX's default device, whichever that is when it is asked."""


def share_shapes(
    arrays: Sequence[Any], specs: Sequence[PartitionSpec], num_devices: int
) -> list[jax.ShapeDtypeStruct]:
    """Returns shapes and dtypes of what one device has of arrays.

    Args:
      arrays: the whole ones, or shapes and dtypes.
      specs: how each is divided.
      num_devices: that share them.
    """
    shares = []
    for array, spec in zip(arrays, specs, strict=True):
        names = (*spec, *(None for _ in range(array.ndim - len(spec))))
        pairs = zip(array.shape, names, strict=True)
        shape = tuple(size if name is None else size // num_devices for size, name in pairs)
        shares.append(jax.ShapeDtypeStruct(shape, array.dtype))
    return shares
