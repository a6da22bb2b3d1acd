"""How a model's parameters are divided among devices, and what its layers do when they are.

Megatron's way (Shoeybi et al., 2019, arXiv 1909.08053): each device has some of the heads, some of
the MLP's features and some of the vocabulary, and computes with these alone. A layer's function is
traced for one device inside a `jax.shard_map` over the mesh axis `AXIS`; there it sees its share of
each parameter, and adds or gathers what the devices have where it must. Outside of one nothing here
does anything: the same layers then have whole parameters.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array

AXIS = "tensor_parallel"
"""The axis of a mesh of devices that share one model."""

_DIVIDED = frozenset({"kv_heads", "heads", "mlp", "vocab"})
"""Logical axes of parameters that are divided; others lie whole on every device."""


def partition_spec(
    axes: tuple[str, ...], shape: tuple[int, ...], num_devices: int
) -> PartitionSpec:
    """Returns how a parameter is divided among devices.

    A vocabulary that is no multiple of their number stays whole on each.

    Args:
      axes: the logical names of its axes.
      shape: of the whole.
      num_devices: n.

    Raises:
      ValueError: another axis that is to be divided is no multiple of n.
    """
    names: list[str | None] = []
    for axis, size in zip(axes, shape, strict=True):
        is_divided = axis in _DIVIDED and not (axis == "vocab" and size % num_devices)
        if is_divided and size % num_devices:
            raise ValueError(f"{size} {axis} cannot be divided among {num_devices} devices")
        names.append(AXIS if is_divided else None)
    while names and names[-1] is None:
        names.pop()
    return PartitionSpec(*names)


def is_divided() -> bool:
    """Whether what is traced now is one device's part of a model."""
    return AXIS in jax.sharding.get_abstract_mesh().manual_axes


def device_index() -> Array:
    """Returns i32[], which of the devices this is; inside a part only."""
    return jax.lax.axis_index(AXIS)


def own_part(x: Array) -> tuple[Array, np.ndarray]:
    """Returns this device's part of the rows of an array that all devices have whole.

    All parts have one size, so that the last ones may overlap. The second result says where the
    rows are, i32[rows of x], when what devices made of their parts is joined.
    """
    num_rows, num_devices = x.shape[0], jax.lax.axis_size(AXIS)
    size = -(-num_rows // num_devices)
    starts = np.minimum(np.arange(num_devices) * size, num_rows - size).astype(np.int32)
    part = jax.lax.dynamic_slice_in_dim(x, jnp.asarray(starts)[device_index()], size)
    owners = np.arange(num_rows) // size
    return part, (owners * size + np.arange(num_rows) - starts[owners]).astype(np.int32)


def summed(x: Array) -> Array:
    """Returns the sum over all devices of what each has: an all-reduce."""
    return jax.lax.psum(x, AXIS)


def gathered(x: Array) -> Array:
    """Returns the devices' arrays joined along the last axis: an all-gather."""
    return jax.lax.all_gather(x, AXIS, axis=x.ndim - 1, tiled=True)
