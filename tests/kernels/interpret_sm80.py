"""Interprets what JAX's interpret mode lacks of sm_80: `plgpu.mma`, and copies by cp.async.

A kernel starts copies and later waits until at most n of them are in flight; they complete in the
order in which they were started. When a copy lands in between is not its program's to say, so it is
put to the proof at both ends: "early", all land as soon as they are started, and what is still
being read is overwritten; "late", each lands in the wait that demands it, and what is read without
one is NaN, which is how the interpreter fills memory that nobody wrote. A program that gives the
same right result both ways waits for what it reads, and starts no copy over what it is to read.

This takes the place of three things inside the interpreter while it lasts. The kernel itself is
what a GPU would run. Not covered: layouts, alignment and the four warps of a warpgroup, which the
interpreter takes for one thread.
"""

import collections
import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, Literal
from unittest import mock

import jax
import jax.numpy as jnp
from jax._src import callback
from jax._src.interpreters import mlir
from jax._src.pallas.mosaic_gpu import primitives
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, interpret_pallas_call
from jax._src.pallas.mosaic_gpu.interpret.jaxpr_interpret import JaxprInterpreter
from jax._src.state.types import ReshapeTransform

from pallas_paged.dispatch import interpret_kernels

_TOKEN = gpu_callbacks.TOKEN_SHAPE_DTYPE


def _multiply(sums: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array:
    product = jnp.dot(left, right, precision="highest", preferred_element_type=jnp.float32)
    return sums + product


mlir.register_lowering(primitives.mma_p, mlir.lower_fun(_multiply, False), platform="cpu")


class _Copies:
    """The copies in flight, oldest first, of every thread block."""

    def __init__(self, landing: Literal["early", "late"]) -> None:
        self.landing = landing
        self.in_flight: dict[Any, collections.deque[Any]] = collections.defaultdict(
            collections.deque
        )

    def start(self, block: Any, copy: Any) -> None:
        if self.landing == "early":
            copy(0)
        self.in_flight[block].append(copy)

    def wait(self, block: Any, allowed: int) -> None:
        while len(self.in_flight[block]) > allowed:
            copy = self.in_flight[block].popleft()
            if self.landing == "late":
                copy(0)


def _accesses(memory: Any, keys: list[Any], places: list[Any]) -> list[tuple[Any, Any]]:
    """Returns what a copy reads and writes, where its target may be rows of another length."""
    source, (*outer, last) = places
    if not any(isinstance(transform, ReshapeTransform) for transform in outer):
        return [(memory.access(keys[0], source), memory.access(keys[1], places[1]))]
    (*tile, reshape), (rows, _) = outer, last.indices
    accesses = memory.access(keys[0], source), memory.access(keys[1], tile)
    (*block, block_rows, columns), (slot, _, row) = (access.range for access in accesses)
    width = math.gcd(columns.stop, row.stop)
    pairs = []
    for number in range(0, rows.size * columns.stop, width):
        y, x = divmod(number, columns.stop)
        one = *block, block_rows.start + y, slice(x, x + width, 1)
        y, x = divmod(rows.start * reshape.shape[-1] + number, row.stop)
        other = slot, y, slice(x, x + width, 1)
        pair = zip(accesses, (one, other), strict=True)
        pairs.append(tuple(dataclasses.replace(access, range=place) for access, place in pair))
    return pairs


@contextlib.contextmanager
def interpret_sm80(
    landing: Literal["early", "late"], compute_capability: tuple[int, int] = (8, 0)
) -> Iterator[None]:
    """Interprets kernels as on sm_80; fails if their threads race or a copy is never waited for.

    Kernels and configurations are those that are chosen for the compute capability.
    """
    copies = _Copies(landing)

    def name_of(mesh_location):
        return tuple(int(number) for number in jax.tree.leaves(mesh_location))

    def start(token, mesh_location, thread, source, source_at, target, target_at):
        memory = gpu_callbacks._get_shared_memory()
        keys = [gpu_callbacks.HostAllocationKey.from_array(key) for key in (source, target)]
        ats = [
            jax.tree.map(int, gpu_callbacks._remove_noop_transforms(at))
            for at in (source_at, target_at)
        ]
        tasks = [
            gpu_callbacks.AsyncCopyTask(mesh_location, thread, keys[0], one, keys[1], other)
            for one, other in _accesses(memory, keys, ats)
        ]
        copies.start(name_of(mesh_location), lambda tma: [task(tma) for task in tasks])
        return token

    def wait(token, mesh_location, thread, *, allowed):
        copies.wait(name_of(mesh_location), allowed)
        return token

    with_barrier = JaxprInterpreter._interpret_copy_gmem_to_smem_p

    def interpret_copy(self, eqn, token, get_invals):
        if eqn.params["has_barrier"]:
            return with_barrier(self, eqn, token, get_invals)
        source, target, *places = get_invals()
        trees = [eqn.params[f"{name}_transforms_treedef"] for name in ("src", "dst")]
        source_at, target_at = jax.tree.unflatten(
            jax.tree_util.treedef_tuple(trees), places[: sum(tree.num_leaves for tree in trees)]
        )
        place = (source, source_at, target, target_at)
        arguments = (token, self.mesh_location, self.thread, *place)
        return callback.io_callback(start, _TOKEN, *arguments), []

    def interpret_wait(self, eqn, token, get_invals):
        call = functools.partial(wait, allowed=eqn.params["n"])
        return callback.io_callback(call, _TOKEN, token, self.mesh_location, self.thread), []

    methods = {
        "_interpret_copy_gmem_to_smem_p": interpret_copy,
        "_interpret_wait_smem_to_gmem_p": interpret_wait,
    }
    try:
        with (
            mock.patch.multiple(JaxprInterpreter, **methods),
            # The interpreter knows the wait for copies out of shared memory, which sm_80 lacks.
            mock.patch.object(primitives, "wait_smem_to_gmem_p", primitives.wait_gmem_to_smem_p),
            interpret_kernels(detect_races=True, compute_capability=compute_capability),
        ):
            yield
        assert not interpret_pallas_call.get_races().races_found
        assert not any(copies.in_flight.values()), "copies that nobody waited for"
    finally:
        interpret_pallas_call.reset_gpu_interpret_mode_state()
