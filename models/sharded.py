"""Parameters that are built in their shards, from what these need of a checkpoint and no more."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from pallas_paged.models.checkpoint import Checkpoint, Slices, size_of
from pallas_paged.models.tensors import Place, paste, source

ShardingOf = Callable[[tuple[str, ...], tuple[int, ...]], jax.sharding.Sharding]
"""From the logical names of a parameter's axes, and its shape, to where it goes."""

Prepare = Callable[[str, np.ndarray, Place, Any], np.ndarray]
"""`prepare(name, value, place, dtype)`: a tensor's slice as a parameter of that dtype has it."""


def is_split(sharding: jax.sharding.Sharding | None) -> bool:
    """Whether an array is on several devices, or on one of another process."""
    return sharding is not None and (
        len(sharding.device_set) > 1 or not sharding.is_fully_addressable
    )


def read_parameter(
    param: Any,
    sharding: jax.sharding.Sharding,
    tensors: Mapping[str, Place],
    checkpoint: Checkpoint,
    prepare: Prepare,
) -> jax.Array:
    """Returns a parameter's array, of which this process reads the shards of its own devices.

    Devices that hold the same have it from one reading. The host holds this parameter's shards,
    and one tensor's slices for them; the tensors of scales are read whole.

    Args:
      param: its shape and dtype; the value is not used.
      sharding: where it goes.
      tensors: places of the checkpoint's tensors that it is made of, by their names there.
      checkpoint: has them.
      prepare: see `Prepare`.
    """
    by_device = sharding.addressable_devices_indices_map(param.shape)
    shards = {
        index: np.empty(size_of(index), param.dtype)
        for index in {_exact(index, param.shape) for index in by_device.values()}
    }
    for name, place in tensors.items():
        _fill(shards, name, place, checkpoint, prepare, param.dtype)
    return jax.make_array_from_callback(
        param.shape,
        sharding,
        lambda index: shards[_exact(index, param.shape)],
        dtype=param.dtype,
    )


def _fill(
    shards: Mapping[Slices, np.ndarray],
    name: str,
    place: Place,
    checkpoint: Checkpoint,
    prepare: Prepare,
    dtype: Any,
) -> None:
    """Writes what a tensor is of each shard into it."""
    sources = {index: source(place, index) for index in shards}
    if place.is_static_scale:
        whole = tuple(slice(0, length) for length in checkpoint.tensors[name].shape)
        (value,) = checkpoint.read_slices(name, [whole])
        scales = prepare(name, value, place, dtype)
        values = {wanted: scales[wanted] for wanted in sources.values()}
    else:
        distinct = list(dict.fromkeys(sources.values()))
        read = checkpoint.read_slices(name, distinct)
        values = {
            wanted: prepare(name, value, place, dtype)
            for wanted, value in zip(distinct, read, strict=True)
        }
    for index, shard in shards.items():
        paste(place, index, values[sources[index]], shard)


def _exact(index: Any, shape: tuple[int, ...]) -> Slices:
    """Returns a slice with a start and a stop for each axis."""
    ranges = (axis.indices(length) for axis, length in zip(index, shape, strict=True))
    return tuple(slice(begin, end) for begin, end, _ in ranges)
