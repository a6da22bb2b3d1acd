"""Arrays that a caller gives for a model's weights: by name, wherever in a tree they stand.

Such as the state of a training loop. To the loader's checks they are one more kind of checkpoint.
"""

import copy
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from pallas_paged.models.checkpoint import Slices, Take, Tensor

Transform = Callable[[jax.Array], jax.Array]
"""Makes of a caller's array ours: transposes it, for instance. It is traced, not run."""
NameMapping = Mapping[str, str | tuple[str, Transform]]
"""By a caller's name ours, or ours and a transform.

Each `*` in a caller's name stands for one part of it between dots; ours has as many, which stand
for the same, in order.
"""


class Given(NamedTuple):
    """An array that a caller gave.

    Attributes:
      name: the caller's name for it.
      array: of JAX or NumPy.
      transform: makes ours of it; None leaves it as it is.
    """

    name: str
    array: Any
    transform: Transform | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what `transform` makes of it."""
        if self.transform is None:
            return tuple(self.array.shape)
        aval = jax.ShapeDtypeStruct(self.array.shape, self.array.dtype)
        try:
            return tuple(jax.eval_shape(self.transform, aval).shape)
        except Exception as error:
            raise ValueError(
                f"the transform of {self.name}, {tuple(self.array.shape)}, failed: {error}"
            ) from error


class GivenArrays:
    """The arrays of a caller's tree as a `Checkpoint`.

    Args:
      state: a Flax NNX module, of which its `nnx.Param` are taken, an `nnx.State`, or a tree of
        arrays. Where something stands, joined by dots, is its name.
      mapping: of these names to ours; those that it does not name are taken for ours, and of its
        own those that are not there are not used.

    Attributes:
      given: the arrays by our names for them.
      tensors: the same without values.

    Raises:
      ValueError: something in the tree is no array, or deleted; two have the same name; a transform
        fails.
    """

    def __init__(self, state: Any, mapping: NameMapping | None = None):
        self.given = _renamed(_by_name(state), mapping or {})
        self.tensors = {
            name: Tensor(name, given.shape, np.dtype(given.array.dtype).name)
            for name, given in self.given.items()
        }

    def without(self, name: str) -> "GivenArrays":
        """Returns the arrays but the one of that name."""
        fewer = copy.copy(self)
        fewer.tensors = {other: x for other, x in self.tensors.items() if other != name}
        return fewer

    def read(self, names: Collection[str], take: Take) -> None:
        """See `Checkpoint.read`."""
        for name in names:
            take(name, self._value(name))

    def read_slices(self, name: str, slices: Sequence[Slices]) -> list[np.ndarray]:
        """See `Checkpoint.read_slices`."""
        value = self._value(name)
        return [value[index] for index in slices]

    def _value(self, name: str) -> np.ndarray:
        given = self.given[name]
        transform = given.transform
        return np.asarray(given.array if transform is None else transform(given.array))


def _by_name(state: Any) -> dict[str, Any]:
    """Returns a tree's arrays by where they stand in it."""
    if isinstance(state, nnx.Module):
        state = nnx.state(state, nnx.Param)
    if isinstance(state, nnx.State):
        found = [(path, variable[...]) for path, variable in nnx.to_flat_state(state)]
    else:
        leaves, _ = jax.tree_util.tree_flatten_with_path(
            state, is_leaf=lambda x: isinstance(x, nnx.Variable)
        )
        found = [
            (tuple(map(_part, path)), x[...] if isinstance(x, nnx.Variable) else x)
            for path, x in leaves
        ]
    arrays: dict[str, Any] = {}
    for path, array in found:
        name = ".".join(map(str, path))
        if not isinstance(array, jax.Array | np.ndarray) or isinstance(array, jax.core.Tracer):
            raise ValueError(f"{name or 'state'} is of type {type(array).__name__}, and no array")
        if isinstance(array, jax.Array) and array.is_deleted():
            raise ValueError(
                f"{name} has been deleted: it was donated to a program, such as a training step, "
                "whose result takes its place; give that"
            )
        if name in arrays:
            raise ValueError(f"two arrays of the state have the name {name}")
        arrays[name] = array
    return arrays


def _part(key: Any) -> Any:
    """Returns what a key of a tree's path is called."""
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return getattr(key, attribute)
    return key


def _renamed(arrays: Mapping[str, Any], mapping: NameMapping) -> dict[str, Given]:
    """Returns arrays by our names for them.

    Raises:
      ValueError: two are the same of ours, or an entry of the mapping is none.
    """
    entries = {name: _entry(name, entry) for name, entry in mapping.items()}
    patterns = [
        (re.compile(re.escape(name).replace(r"\*", r"([^.]+)")), entry)
        for name, entry in entries.items()
        if "*" in name
    ]
    renamed: dict[str, Given] = {}
    for name, array in arrays.items():
        ours, transform = name, None
        if name in entries:
            ours, transform = entries[name]
        else:
            for pattern, entry in patterns:
                if found := pattern.fullmatch(name):
                    ours, transform = entry
                    for part in found.groups():
                        ours = ours.replace("*", part, 1)
                    break
        if ours in renamed:
            raise ValueError(f"{renamed[ours].name} and {name} are both {ours}")
        renamed[ours] = Given(name, array, transform)
    return renamed


def _entry(name: str, entry: Any) -> tuple[str, Transform | None]:
    """Returns our name and the transform of an entry of a mapping."""
    ours, transform = entry if isinstance(entry, tuple) and len(entry) == 2 else (entry, None)
    is_wrong = not isinstance(ours, str) or not (transform is None or callable(transform))
    if is_wrong or ours.count("*") != name.count("*"):
        raise ValueError(
            f"mapping[{name!r}]={entry!r:.120} must be our name, or that and a function, with as "
            f"many * as there are in {name!r}"
        )
    return ours, transform
