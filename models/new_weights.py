"""A model's weights out of a caller's arrays: which is which, and what has to be made of them.

An array that has the layout of a parameter is one as it is. Tensors of a checkpoint that one
parameter holds are joined, others transformed, cast, or repeated for copies of KV heads.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from pallas_paged.models.checkpoint import Tensor
from pallas_paged.models.config import DTYPES, ModelConfig
from pallas_paged.models.given import Given, GivenArrays, Transform
from pallas_paged.models.interface import CheckpointNames
from pallas_paged.models.matching import abstract_parameters, by_parameter, differences
from pallas_paged.models.registry import FAMILIES
from pallas_paged.models.tensors import Place, name_of, places, spread

Path = tuple[Any, ...]


class Piece(NamedTuple):
    """What of a parameter is made of one array.

    Attributes:
      transform: of the array; None for none.
      cut: of the array, which is a merged parameter of a model without copies of KV heads; empty
        for all of it.
      shape: of the piece in the parameter.
      copies: how many times in a row each index of its first axis is there.
      is_static_scale: see `Place`.
    """

    transform: Transform | None
    cut: tuple[slice, ...]
    shape: tuple[int, ...]
    copies: int = 1
    is_static_scale: bool = False


class Recipe(NamedTuple):
    """How a parameter is made; it can be hashed.

    Attributes:
      pieces: one of each array; several are joined along the second axis.
      dtype: of the parameter.
    """

    pieces: tuple[Piece, ...]
    dtype: np.dtype


class Source(NamedTuple):
    """What a parameter comes from.

    Attributes:
      name: of the parameter.
      given: the arrays.
      recipe: how it is made of them; None where it is the only array as it is.
    """

    name: str
    given: tuple[Given, ...]
    recipe: Recipe | None

    @property
    def is_cast(self) -> bool:
        """Whether an array has another dtype than the parameter."""
        recipe = self.recipe
        return recipe is not None and any(x.array.dtype != recipe.dtype for x in self.given)

    @property
    def is_made(self) -> bool:
        """Whether there is more to do than a cast."""
        if self.recipe is None:
            return False
        (piece, *more), first = self.recipe.pieces, self.given[0]
        is_same = piece.transform is None and not piece.cut and piece.copies == 1
        return bool(more) or not is_same or piece.shape != tuple(first.array.shape)


def sources(
    config: ModelConfig, params: nnx.State, arrays: GivenArrays, merged: nnx.State
) -> dict[Path, Source]:
    """Returns what each parameter comes from, by its path; reads no values but of tied embeddings.

    Args:
      config: of the model.
      params: its parameters, whose values are not needed.
      arrays: by the names of a checkpoint's tensors, or of parameters in `merged`.
      merged: see `merged_parameters`.

    Raises:
      ValueError: arrays are missing, unused, misshapen or of an unsupported dtype, all are listed;
        tied embeddings differ.
    """
    names = FAMILIES[config.architecture].names
    of_tensors = places(merged)
    own = {
        path: Place(path, (), param.shape)
        for path, param in nnx.to_flat_state(merged)
        if param.parts and name_of(path) in arrays.given
    }
    expected = {name: place for name, place in of_tensors.items() if place.path not in own}
    expected |= {name_of(path): place for path, place in own.items()}
    tensors = by_parameter(_without_same_output(arrays, names, config), names, config)
    given = {name: arrays.given[tensor.name] for name, tensor in tensors.items()}
    problems = differences(
        {name: _as_named(tensor, given[name]) for name, tensor in tensors.items()},
        expected,
        "in the model",
    )
    problems += [
        f"of dtype {tensor.dtype}: {_as_named(tensor, given[name]).name}; only "
        f"{', '.join(DTYPES)} can be"
        for name, tensor in tensors.items()
        if name in expected and tensor.dtype not in DTYPES
    ]
    if problems:
        raise ValueError("the state is not that of these weights:\n  " + "\n  ".join(problems))
    wholes = {path: param.shape for path, param in nnx.to_flat_state(merged) if path in own}
    return _sources(params, given, of_tensors, wholes)


def merged_parameters(config: ModelConfig) -> nnx.State:
    """Returns a model's parameters, without values, as one device has them that merges projections.

    Whose arrays lie like these can give them whole, whatever the engine does with them.
    """
    plain = dataclasses.replace(
        config,
        num_kv_heads=config.num_kv_heads // config.kv_head_copies,
        kv_head_copies=1,
        merges_projections=True,
    )
    return abstract_parameters(plain, jnp.float32)[1]


def _without_same_output(
    arrays: GivenArrays, names: CheckpointNames, config: ModelConfig
) -> GivenArrays:
    """Leaves out a tied output embedding that is the very array of the input embedding.

    Others are compared, which copies both to the host.
    """
    one, other = arrays.given.get(names.embedding), arrays.given.get(names.output)
    if one is None or other is None or not config.tie_word_embeddings:
        return arrays
    is_same = one.array is other.array and one.transform is other.transform
    return arrays.without(names.output) if is_same else arrays


def _as_named(tensor: Tensor, given: Given) -> Tensor:
    """Returns a tensor that is called what its giver calls it, too."""
    if given.name == tensor.name:
        return tensor
    return dataclasses.replace(tensor, name=f"{tensor.name} (here {given.name})")


def _sources(
    params: nnx.State,
    given: Mapping[str, Given],
    of_tensors: Mapping[str, Place],
    wholes: Mapping[Path, tuple[int, ...]],
) -> dict[Path, Source]:
    """Returns the sources, from tensors or from `wholes`: merged parameters, with their shapes."""
    by_path: dict[Path, list[tuple[str, Place]]] = {}
    for name, place in places(params).items():
        by_path.setdefault(place.path, []).append((name, place))
    found: dict[Path, Source] = {}
    for path, param in nnx.to_flat_state(params):
        if wholes.get(path) == param.shape:
            whole = given[name_of(path)]
            made = [(whole, Piece(whole.transform, (), param.shape))]
        else:
            made = [_piece(*each, param.shape, given, of_tensors) for each in by_path[path]]
        recipe = Recipe(tuple(piece for _, piece in made), np.dtype(param.dtype))
        source = Source(name_of(path), tuple(each for each, _ in made), recipe)
        is_same = not source.is_made and not source.is_cast
        found[path] = source._replace(recipe=None) if is_same else source
    return found


def _piece(
    name: str,
    place: Place,
    shape: tuple[int, ...],
    given: Mapping[str, Given],
    of_tensors: Mapping[str, Place],
) -> tuple[Given, Piece]:
    """Returns what a tensor in a parameter of that shape is made of."""
    own, cut = given.get(name), tuple[slice, ...]()
    if own is None:
        merged = of_tensors[name]
        own, cut = given[name_of(merged.path)], merged.slices
    return own, Piece(own.transform, cut, *_shape_of(place, shape))


def _shape_of(place: Place, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int, bool]:
    """Returns the last fields of a `Piece` for a tensor's place in a parameter of that shape."""
    if not place.slices:
        return shape, place.copies, place.is_static_scale
    sides = (len(range(n)[rows]) for n, rows in zip(shape, place.slices, strict=False))
    return (*sides, *shape[2:]), place.copies, False


def make(recipe: Recipe, arrays: Sequence[Array]) -> Array:
    """Returns a parameter; traceable."""
    pieces = []
    for piece, x in zip(recipe.pieces, arrays, strict=True):
        if piece.transform is not None:
            x = piece.transform(x)
        if piece.cut:
            x = x[piece.cut]
        if piece.is_static_scale:
            x = jnp.broadcast_to(x.reshape(-1), (piece.shape[0] // piece.copies,))
        pieces.append(spread(x, piece.shape, piece.copies).astype(recipe.dtype))
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=1)
