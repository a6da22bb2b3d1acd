"""The weights that an engine computes with: replaced by a trainer's, or given back for a while."""

import dataclasses
import logging
import time
from typing import Any, NamedTuple

import jax
from flax import nnx

from pallas_paged.engine.device.new_weights import describe, place
from pallas_paged.engine.device.pool_size import num_bytes
from pallas_paged.engine.device.programs import StepPrograms
from pallas_paged.engine.loading import Begun, load_network
from pallas_paged.models.given import GivenArrays, NameMapping
from pallas_paged.models.new_weights import Path, Source, merged_parameters, sources

logger = logging.getLogger(__name__)


MODES = ("wait", "abort", "keep")
"""What can become of unfinished requests when the weights change."""


def check_mode(mode: str) -> None:
    """Raises `ValueError` if there is no such mode."""
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} must be one of {MODES}")


@dataclasses.dataclass(frozen=True)
class WeightsUpdate:
    """What `update_weights` did.

    Attributes:
      version: of the weights from now on; those that an engine starts with are 0.
      seconds: how long it took, without what had to be finished before; what makes parameters
        may still be under way on the device.
      num_taken: parameters that are the caller's own buffers: nothing was copied.
      cast: names of parameters that were of another dtype.
      made: names of those that were joined from several arrays, transformed or repeated.
      moved: names of those that lay on the host or on other devices, or were divided otherwise.
    """

    version: int
    seconds: float
    num_taken: int
    cast: tuple[str, ...]
    made: tuple[str, ...]
    moved: tuple[str, ...]

    def __str__(self) -> str:
        what = describe(self.num_taken, cast=self.cast, made=self.made, moved=self.moved)
        return f"weights {self.version} in {self.seconds:.4f} s: {what}"


class Matched(NamedTuple):
    """A caller's arrays that are the model's weights, each in its place.

    Attributes:
      sources: by the parameters' paths.
      begin_s: when it was begun to match them, as `time.perf_counter()`.
    """

    sources: dict[Path, Source]
    begin_s: float


class Weights:
    """The weights in the compiled programs of an engine.

    Args:
      programs: their parameters are exchanged.
      begun: what the engine is like, and where its model came from.
      shared: the paths of those parameters whose arrays are somebody else's too.

    Attributes:
      are_there: whether the programs have any.
    """

    def __init__(self, programs: StepPrograms, begun: Begun, shared: frozenset[Path]):
        self.are_there = True
        self._programs, self._begun = programs, begun
        self._params = jax.tree.map(_shape_of, programs.params)
        self._tree = jax.tree.structure(self._params)
        flat = nnx.to_flat_state(self._params)
        numbered = nnx.from_flat_state([(path, x.replace(i)) for i, (path, x) in enumerate(flat)])
        self._paths = [flat[number][0] for number in jax.tree.leaves(numbered)]
        # A trainer's weights are the model's own; a draft model keeps what it has.
        self._prefix: Path = ("target",) if "target" in self._params else ()
        self._trained = self._params["target"] if self._prefix else self._params
        self._shared = set(shared)
        self._merged: nnx.State | None = None  # made when it is needed

    def check_process(self, what: str) -> None:
        """Raises `ValueError` where the engine has parts in other processes, which miss it."""
        if not self._begun.placement.is_local:
            raise ValueError(f"{what} is for an engine of one process, and this one is of several")

    def match(self, state: Any, mapping: NameMapping | None = None) -> Matched:
        """Finds a caller's arrays their places; changes nothing.

        Raises:
          ValueError: see `LLM.update_weights`.
        """
        begin_s = time.perf_counter()
        self.check_process("update_weights")
        if self._merged is None:
            self._merged = merged_parameters(self._begun.shape)
        arrays = GivenArrays(state, mapping)
        found = sources(self._begun.shape, self._trained, arrays, self._merged)
        return Matched(found, begin_s)

    def take(self, matched: Matched, version: int) -> WeightsUpdate:
        """Puts a caller's arrays in the place of the weights; no step may be in flight.

        Raises:
          ValueError: a value is too large for float16; nothing has changed.
        """
        placement, now = self._begun.placement, self._by_path()
        flat = nnx.to_flat_state(self._trained)
        paths = [(*self._prefix, *path) for path, _ in flat]
        placed = place(
            [matched.sources[path] for path, _ in flat],
            [placement.parameter(x.out_sharding, x.shape) for _, x in flat],
            placement,
            [now[path] if path not in self._shared and self.are_there else None for path in paths],
        )
        now |= zip(paths, placed.leaves, strict=True)
        self._put(now)
        self.are_there = True
        self._shared = {path for path, own in zip(paths, placed.owned, strict=True) if not own}
        update = WeightsUpdate(
            version,
            time.perf_counter() - matched.begin_s,
            placed.num_taken,
            tuple(placed.cast),
            tuple(placed.made),
            tuple(placed.moved),
        )
        logger.info("%s", update)
        return update

    def give_back(self) -> tuple[int, int]:
        """Leaves the programs without weights; returns the bytes freed, and those of callers.

        A caller's arrays stay in memory as long as the caller has them, and a draft model's stay.
        """
        now = self._by_path()
        mine = {path: x for path, x in now.items() if path[: len(self._prefix)] == self._prefix}
        freed = num_bytes([x for path, x in mine.items() if path not in self._shared])
        kept = num_bytes([x for path, x in mine.items() if path in self._shared])
        self._put({path: _shape_of(x) if path in mine else x for path, x in now.items()})
        self.are_there, self._shared = False, set()
        return freed, kept

    def reload(self) -> None:
        """Reads the weights from the engine's folder again.

        Raises:
          RuntimeError: it has none.
          ValueError, FileNotFoundError: see `load_model`.
        """
        if not self._begun.source.can_load:
            raise RuntimeError(
                "this engine was made of a model in memory, which it has given back: call "
                "update_weights to bring weights"
            )
        with self._begun.placement.as_target():
            network, shared = load_network(self._begun)
        self._programs.params = self._begun.placement.put_parameters(nnx.state(network))
        self.are_there, self._shared = True, set(shared)

    def _by_path(self) -> dict[Path, Any]:
        return dict(zip(self._paths, jax.tree.leaves(self._programs.params), strict=True))

    def _put(self, arrays: dict[Path, Any]) -> None:
        leaves = [arrays[path] for path in self._paths]
        self._programs.params = jax.tree.unflatten(self._tree, leaves)


def _shape_of(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)
