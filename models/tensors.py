"""The tensors of a checkpoint in the parameters of a model: which is where.

A tensor's name is the path of its parameter, joined with dots. A parameter with `parts` (see
`pallas_paged.models.layers.MergedLinear`) holds several tensors; in the name of each stands its own
module instead of the merged one.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_paged.models.checkpoint import Slices


class Place(NamedTuple):
    """Where a tensor is in a model's state.

    Attributes:
      path: of the parameter.
      slices: of the tensor in the parameter; empty where that is the tensor.
      shape: of the tensor.
      is_static_scale: whether the tensor holds scales of KV heads, and may have other shapes.
      copies: how many times in a row each index of the parameter's first axis that the tensor has
        is there; it has one in so many of them.
    """

    path: tuple[Any, ...]
    slices: tuple[slice, ...]
    shape: tuple[int, ...]
    is_static_scale: bool = False
    copies: int = 1

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of such a shape is in place here.

        Scales are one number for all heads, or one each, with any axes of length 1 besides.
        """
        if self.is_static_scale:
            return math.prod(shape) == 1 or tuple(n for n in shape if n > 1) == self.shape
        return shape == self.shape


def places(params: nnx.State) -> dict[str, Place]:
    """Returns where each tensor is in parameters, whose values are not needed, by its name."""
    found: dict[str, Place] = {}
    for path, param in nnx.to_flat_state(params):
        *parents, _, leaf = path
        for part in param.parts:
            sides = (len(range(n)[rows]) for n, rows in zip(param.shape, part.slices, strict=False))
            shape = (math.prod(sides) // part.copies, *param.shape[2:])
            place = Place(path, part.slices, shape, copies=part.copies)
            found[name_of((*parents, part.module, leaf))] = place
        if not param.parts:
            copies = param.copies
            shape = (param.shape[0] // copies, *param.shape[1:])
            place = Place(path, (), shape, param.is_static_scale, copies)
            found[name_of(path)] = place
    return found


def tensors_of(params: nnx.State) -> dict[str, jax.Array]:
    """Returns the tensors in a model's parameters by their names."""
    values = {path: param[...] for path, param in nnx.to_flat_state(params)}
    return {
        name: values[place.path][place.slices][:: place.copies].reshape(place.shape)
        for name, place in places(params).items()
    }


def with_tensors(params: nnx.State, tensors: Mapping[str, jax.Array]) -> nnx.State:
    """Returns parameters like `params` that hold the `tensors`, all of them, instead."""
    flat = dict(nnx.to_flat_state(params))
    values: dict[tuple[Any, ...], jax.Array] = {}
    for name, place in places(params).items():
        value = tensors[name]
        merged = values.get(place.path, jnp.zeros(flat[place.path].shape, value.dtype))
        value = spread(value, merged[place.slices].shape, place.copies)
        if place.slices:
            value = merged.at[place.slices].set(value)
        values[place.path] = value
    return nnx.from_flat_state(
        [(path, flat[path].replace(value)) for path, value in values.items()]
    )


def spread(value: Any, shape: tuple[int, ...], copies: int) -> Any:
    """Returns a tensor, of NumPy or JAX, in the shape that it has in a parameter."""
    value = value.reshape(shape[0] // copies, *shape[1:])
    return value if copies == 1 else value.repeat(copies, axis=0)


def source(place: Place, index: Slices) -> Slices:
    """Returns the slice of a tensor that the slice `index` of its parameter needs.

    A merged parameter's second axis is taken whole, whatever the index says: nobody splits it.
    """
    first = slice(index[0].start // place.copies, -(-index[0].stop // place.copies))
    if not place.slices:
        return (first, *index[1:])
    width = _width(place)
    return (slice(first.start * width, first.stop * width), *index[2:])


def paste(place: Place, index: Slices, value: np.ndarray, shard: np.ndarray) -> None:
    """Writes a tensor's slice, as `source` says, into the slice `index` of its parameter."""
    if place.slices:
        value = value.reshape(-1, _width(place), *value.shape[1:])
    skip = index[0].start % place.copies
    value = value if place.copies == 1 else value.repeat(place.copies, axis=0)
    value = value[skip : skip + len(shard)]
    if not place.slices:
        shard[...] = value
        return
    (inner, part) = (index[1], place.slices[1])
    begin, end = max(inner.start, part.start), min(inner.stop, part.stop)
    if begin < end:
        target = shard[:, begin - inner.start : end - inner.start]
        target[...] = value[:, begin - part.start : end - part.start]


def _width(place: Place) -> int:
    """Returns how many features of a part belong to one index of the merged first axis."""
    assert place.slices[0] == slice(None), "a part has the whole of the first axis"
    return place.slices[1].stop - place.slices[1].start


def name_of(path: tuple[Any, ...]) -> str:
    """Returns the name of a parameter: its path, joined by dots."""
    return ".".join(map(str, path))
