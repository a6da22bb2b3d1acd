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
from pallas_paged.models.matching import by_parameter, differences
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
    config: ModelConfig, params: nnx.State, arrays: GivenArrays, plain: nnx.State | None = None
) -> dict[Path, Source]:
    """Returns what each parameter comes from, by its path; reads no values but of tied embeddings.

    Args:
      config: of the model.
      params: its parameters, whose values are not needed.
      arrays: by the names of a checkpoint's tensors, or of parameters that hold several.
      plain: the parameters of the model without copies of KV heads, if `params` have some: an array
        for one that holds several tensors is one of these.

    Raises:
      ValueError: arrays are missing, unused, misshapen or of an unsupported dtype, all are listed;
        tied embeddings differ.
    """
    plain = params if plain is None else plain
    family = FAMILIES.get(config.architecture)
    names = CheckpointNames(embedding="") if family is None else family.names
    own = {
        path: Place(path, (), param.shape)
        for path, param in nnx.to_flat_state(plain)
        if param.parts and name_of(path) in arrays.given
    }
    expected = {name: place for name, place in places(params).items() if place.path not in own} | {
        name_of(path): place for path, place in own.items()
    }
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
    return _sources(params, plain, given)


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


def _sources(params: nnx.State, plain: nnx.State, given: Mapping[str, Given]) -> dict[Path, Source]:
    shapes = {path: param.shape for path, param in nnx.to_flat_state(plain)}
    cuts = {name: place.slices for name, place in places(plain).items()}
    by_path: dict[Path, list[tuple[str, Place]]] = {}
    for name, place in places(params).items():
        by_path.setdefault(place.path, []).append((name, place))
    found: dict[Path, Source] = {}
    for path, param in nnx.to_flat_state(params):
        own = given.get(name_of(path))
        if own is None:
            made = [
                (given[name], Piece(given[name].transform, (), *_shape_of(place, param.shape)))
                for name, place in by_path[path]
            ]
        elif shapes[path] == param.shape or not param.parts:
            (_, place), *_ = by_path[path]
            whole = place._replace(slices=())
            copies = 1 if param.parts else place.copies
            piece = Piece(own.transform, (), param.shape, copies, whole.is_static_scale)
            made = [(own, piece)]
        else:
            made = [
                (own, Piece(own.transform, cuts[name], *_shape_of(place, param.shape)))
                for name, place in by_path[path]
            ]
        recipe = Recipe(tuple(piece for _, piece in made), np.dtype(param.dtype))
        source = Source(name_of(path), tuple(each for each, _ in made), recipe)
        is_same = not source.is_made and not source.is_cast
        found[path] = source._replace(recipe=None) if is_same else source
    return found


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
