"""Puts a caller's arrays in the place of a model's weights, as they are wherever they can be.

What has to be made of them is made by one program, to which the engine's own arrays that it takes
the place of are donated: nothing is in memory twice.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array

from pallas_paged.engine.device.placement import Placement
from pallas_paged.models.new_weights import Recipe, Source, make


class Placed(NamedTuple):
    """Weights where they belong, and what that took.

    Attributes:
      leaves: the arrays.
      owned: bool for each: whether it is the engine's alone, and not the caller's.
      num_taken: how many are the caller's own buffers.
      cast: names of those that were of another dtype.
      made: names of those that were joined, transformed or repeated.
      moved: names of those that lay on other devices, or otherwise divided, or on the host.
    """

    leaves: list[jax.Array]
    owned: list[bool]
    num_taken: int
    cast: list[str]
    made: list[str]
    moved: list[str]

    def __str__(self) -> str:
        return describe(self.num_taken, cast=self.cast, made=self.made, moved=self.moved)


def describe(num_taken: int, **names: Sequence[str]) -> str:
    """Returns in words how many weights were taken as they are, and which were not, by kind."""
    parts = [f"{num_taken} as they are"]
    for kind, which in names.items():
        if which:
            more = f" and {len(which) - 1} more" if len(which) > 1 else ""
            parts.append(f"{len(which)} {kind} ({which[0]}{more})")
    return ", ".join(parts)


def place(
    sources: Sequence[Source],
    shardings: Sequence[Sharding],
    placement: Placement,
    old: Sequence[jax.Array | None] | None = None,
) -> Placed:
    """Returns weights made of a caller's arrays.

    Args:
      sources: what they are made of, one for each.
      shardings: where each belongs.
      placement: of these.
      old: arrays of the same shapes, dtypes and shardings that nobody needs any more, which may be
        donated; None in the place of others, or of all.

    Raises:
      ValueError: a value is too large for float16. The old arrays are as they were.
    """
    old = [None] * len(sources) if old is None else old
    leaves: list[Any] = [None] * len(sources)
    owned = [True] * len(sources)
    cast, made, moved = [], [], []
    recipes: list[tuple[int, Recipe]] = []
    for index, (source, sharding) in enumerate(zip(sources, shardings, strict=True)):
        if source.is_cast:
            cast.append(source.name)
        if source.is_made:
            made.append(source.name)
        is_moved = any(_is_elsewhere(given.array, sharding, source) for given in source.given)
        if is_moved:
            moved.append(source.name)
        if source.recipe is not None:
            recipes.append((index, source.recipe))
            continue
        leaves[index] = jax.device_put(_unshared(source.given[0].array), sharding)
        owned[index] = is_moved
    if recipes:
        places = [index for index, _ in recipes]
        new = _made(
            [sources[index] for index in places],
            [shardings[index] for index in places],
            placement,
            [old[index] for index in places],
        )
        for index, array in zip(places, new, strict=True):
            leaves[index] = array
    return Placed(leaves, owned, owned.count(False), cast, made, moved)


def _is_elsewhere(array: Any, sharding: Sharding, source: Source) -> bool:
    """Whether an array has to be moved: of one that is made into another only the devices count."""
    if not isinstance(array, jax.Array):
        return True
    if source.recipe is not None:
        return array.sharding.device_set != sharding.device_set
    return not array.sharding.is_equivalent_to(sharding, array.ndim)


def _made(
    sources: Sequence[Source],
    shardings: Sequence[Sharding],
    placement: Placement,
    old: Sequence[jax.Array | None],
) -> list[jax.Array]:
    recipes = tuple(source.recipe for source in sources if source.recipe is not None)
    arrays = [
        [_moved(given.array, sharding, source) for given in source.given]
        for source, sharding in zip(sources, shardings, strict=True)
    ]
    checks = tuple(
        recipe.dtype == jnp.float16 and source.is_cast
        for recipe, source in zip(recipes, sources, strict=True)
    )
    # What may be refused must leave the old arrays alone.
    donated = [] if any(checks) else [array for array in old if array is not None]
    with placement.as_target():
        new, lost = _program(recipes, checks, tuple(shardings))(donated, arrays)
    if too_large := [s.name for s, is_lost in zip(sources, lost, strict=True) if bool(is_lost)]:
        raise ValueError(
            f"values beyond {float(jnp.finfo(jnp.float16).max):.4g}, the largest of float16: "
            f"{', '.join(too_large)}; choose another dtype for the engine"
        )
    return new


def _moved(array: Any, sharding: Sharding, source: Source) -> Any:
    """Returns an array on the devices where what is made of it belongs, divided as that is."""
    if not _is_elsewhere(array, sharding, source):
        return array
    if isinstance(sharding, NamedSharding):
        first = sharding.spec[0] if len(sharding.spec) else None
        num_devices = sharding.mesh.size
        is_divided = first is not None and array.ndim and not array.shape[0] % num_devices
        sharding = NamedSharding(sharding.mesh, PartitionSpec(first if is_divided else None))
    return jax.device_put(_unshared(array), sharding)


def _unshared(array: Any) -> Any:
    """Returns an array whose memory no caller writes to: on a CPU JAX may take NumPy's as it is."""
    return np.array(array) if isinstance(array, np.ndarray) else array


@functools.lru_cache(maxsize=8)
def _program(
    recipes: tuple[Recipe, ...], checks: tuple[bool, ...], shardings: tuple[Sharding, ...]
) -> Callable[..., tuple[list[jax.Array], list[Any]]]:
    """Returns what makes parameters: (donated, arrays) -> (parameters, which have lost values).

    Of what is donated the memory is used, and not the values.
    """

    def run(
        donated: list[Array], arrays: list[list[Array]]
    ) -> tuple[list[Array], list[Array | bool]]:
        new = [make(recipe, mine) for recipe, mine in zip(recipes, arrays, strict=True)]
        lost = [
            jnp.all(jnp.stack([jnp.isfinite(x).all() for x in mine])) & ~jnp.isfinite(value).all()
            if check
            else False
            for check, mine, value in zip(checks, arrays, new, strict=True)
        ]
        return new, lost

    outputs = (list(shardings), [None] * len(recipes))
    return jax.jit(run, donate_argnums=0, keep_unused=True, out_shardings=outputs)
