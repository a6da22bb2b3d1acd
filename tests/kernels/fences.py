"""Whether a kernel for sm_90a or sm_100a fences what it writes to shared memory: a walk along it.

Threads write shared memory through another proxy than the tensor cores and TMA read it
through, and read it only once the copies out of it have read theirs. What orders them:

- `commit_smem` between a thread's write and a product, or a copy, of that memory, and before
  another warpgroup is told by a barrier that it may multiply or copy it;
- `wait_smem_to_gmem` between a copy out of memory and the next write to it, and before the end;
- the wait for a product, with which its sums are read, before what it multiplies is written.

Interpret mode takes a warpgroup for one thread without proxies, and the compiler takes the program
at its word. So this reads the kernel's jaxpr in the order of the program, follows both ways of a
condition and loops until nothing new turns up, and takes an array in shared memory for one thing.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from pallas_paged.deviceless import target_device

Root = Any
"""An array in shared memory: the variable that the kernel allocates it as."""

Roots = Mapping[Any, Root]
"""The arrays that a jaxpr's variables stand for."""

_MAPS = ("mpmd_map", "core_map")  # of a grid, of the warps of a warpgroup
_CALLS = ("jit", "pjit", "closed_call", "custom_vmap_call", "run_state", *_MAPS)
_READS = ("get", "load", "barrier_wait")


class _State(NamedTuple):
    """What is so at a point of the program, on some way to it."""

    written: frozenset[Root] = frozenset()  # by threads, since the last commit_smem
    being_read: frozenset[Root] = frozenset()  # by copies to global memory
    leaving: frozenset[Root] = frozenset()  # with copies that may not have arrived
    multiplied: frozenset[Root] = frozenset()  # by products that nobody has waited for

    def join(self, other: "_State") -> "_State":
        return _State(*(mine | its for mine, its in zip(self, other, strict=True)))


def missing_fences(
    function: Callable[..., Any], *args: Any, target: str = "h100"
) -> dict[str, set[str]]:
    """Returns what is missing in each Mosaic GPU kernel in `function`, by the kernel's name.

    Args:
      function: of arrays; it is traced for the target, and nothing is compiled.
      *args: its arguments, or `jax.ShapeDtypeStruct`s in their place.
      target: as in `pallas_paged.deviceless`.
    """
    with jax.default_device(target_device(target)):
        program = jax.make_jaxpr(function)(*args)
    found = {}
    for name, body in _kernels(program.jaxpr):
        walk = _Walk()
        walk.run(body, {}, _State())
        walk.missing.clear()  # the second time it knows what products and copies read
        end = walk.run(body, {}, _State())
        walk.need(end.leaving, "wait_smem_to_gmem at the end")
        found[name] = walk.missing
    return found


def _kernels(jaxpr: Any) -> Iterator[tuple[str, Any]]:
    for eqn in jaxpr.eqns:
        bodies = _inner(eqn)
        if eqn.primitive.name in _MAPS:
            yield eqn.params["name"], bodies[0]
        else:
            for body in bodies:
                yield from _kernels(body)


def _inner(eqn: Any) -> list[Any]:
    """Returns the jaxprs among an operation's parameters."""
    found = []
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(_jaxpr(item), "eqns"):
                found.append(_jaxpr(item))
    return found


def _jaxpr(value: Any) -> Any:
    return getattr(value, "jaxpr", value)  # closed or not


def _bind(inside: Sequence[Any], outside: Sequence[Any], roots: Roots) -> dict[Any, Root]:
    """Returns the arrays of variables that others are passed to; there may be more of the first."""
    pairs = zip(inside, outside, strict=False)
    return {
        inner: roots[outer] for inner, outer in pairs if not _is_literal(outer) and outer in roots
    }


def _is_literal(atom: Any) -> bool:
    return hasattr(atom, "val")


def _of(atoms: Sequence[Any], roots: Roots) -> frozenset[Root]:
    return frozenset(roots[atom] for atom in atoms if not _is_literal(atom) and atom in roots)


class _Walk:
    """What is found on the way through a kernel."""

    def __init__(self) -> None:
        self.missing: set[str] = set()
        self.asynchronous: frozenset[Root] = frozenset()  # what products and copies read

    def need(self, arrays: frozenset[Root], what: str) -> None:
        """Notes what is missing for arrays, if there are any."""
        self.missing |= {f"{array.aval}: {what}" for array in arrays}

    def run(self, jaxpr: Any, roots: Roots, state: _State) -> _State:
        """Returns the state after the operations of `jaxpr`."""
        for eqn in jaxpr.eqns:
            name, bodies = eqn.primitive.name, _inner(eqn)
            if bodies:
                state = self.enter(name, eqn, bodies, roots, state)
            elif name in _STEPS:
                state = _STEPS[name](self, eqn, roots, state)
            else:
                known = name in _READS or not _of(eqn.invars, roots)
                assert known, f"what does {name} do to shared memory?"
        return state

    def enter(self, name: str, eqn: Any, bodies: list[Any], roots: Roots, state: _State) -> _State:
        """Returns the state after an operation that is made of others."""
        given = eqn.invars
        if name == "cond":
            ends = [self.run(body, _bind(body.invars, given[1:], roots), state) for body in bodies]
            return functools.reduce(_State.join, ends)
        if name in ("while", "scan"):
            body = _jaxpr(eqn.params["body_jaxpr" if name == "while" else "jaxpr"])
            carried = given[eqn.params["cond_nconsts"] :] if name == "while" else given
            inside = _bind(body.invars, carried, roots)
            while (after := state.join(self.run(body, inside, state))) != state:
                state = after
            return state
        (body,) = bodies
        if name == "run_scoped":
            inside = _bind(body.constvars, given, roots)
            inside |= {var: var for var in body.invars if "smem" in str(var.aval)}
            return self.run(body, inside, state)
        assert name in _CALLS, f"what does {name} do?"
        state = self.run(body, _bind(body.invars, given, roots), state)
        return self.wait_for_products(eqn, roots, state) if name == "run_state" else state

    def commit(self, eqn: Any, roots: Roots, state: _State) -> _State:
        return state._replace(written=frozenset())

    def wait(self, eqn: Any, roots: Roots, state: _State) -> _State:
        if eqn.params["n"] > 0:
            return state
        leaving = state.leaving if eqn.params["wait_read_only"] else frozenset()
        return state._replace(being_read=frozenset(), leaving=leaving)

    def arrive(self, eqn: Any, roots: Roots, state: _State) -> _State:
        self.need(state.written & self.asynchronous, "commit_smem before others are told")
        return state

    def write(self, eqn: Any, roots: Roots, state: _State) -> _State:
        target = _of(eqn.invars[:1], roots)
        self.need(target & state.being_read, "wait_smem_to_gmem before it is written again")
        self.need(target & state.multiplied, "the product's end before it is written again")
        return state._replace(written=state.written | target)

    def multiply(self, eqn: Any, roots: Roots, state: _State) -> _State:
        operands = self.read_by_product(eqn, roots, state)
        return state._replace(multiplied=state.multiplied | operands)

    def multiply_for_barrier(self, eqn: Any, roots: Roots, state: _State) -> _State:
        """A barrier says when it has ended: who does not wait for that, the interpreter sees."""
        self.read_by_product(eqn, roots, state)
        return state

    def read_by_product(self, eqn: Any, roots: Roots, state: _State) -> frozenset[Root]:
        operands = _of(eqn.invars[1:3], roots)
        self.asynchronous |= operands
        self.need(operands & state.written, "commit_smem before a product")
        return operands

    def wait_for_products(self, eqn: Any, roots: Roots, state: _State) -> _State:
        in_flight = eqn.params.get("wait_n", eqn.params.get("n", 0))
        return state._replace(multiplied=frozenset()) if in_flight == 0 else state

    def copy_out(self, eqn: Any, roots: Roots, state: _State) -> _State:
        source = _of(eqn.invars[:1], roots)
        self.asynchronous |= source
        self.need(source & state.written, "commit_smem before a copy out of it")
        return state._replace(being_read=state.being_read | source, leaving=state.leaving | source)

    def copy_in(self, eqn: Any, roots: Roots, state: _State) -> _State:
        target = _of(eqn.invars[1:2], roots)
        self.need(target & state.written, "commit_smem before a copy into it")
        self.need(target & state.being_read, "wait_smem_to_gmem before a copy into it")
        self.need(target & state.multiplied, "the product's end before a copy into it")
        return state


_STEPS = {
    "commit_smem": _Walk.commit,
    "wait_smem_to_gmem": _Walk.wait,
    "barrier_arrive": _Walk.arrive,
    "swap": _Walk.write,
    "store": _Walk.write,
    "wgmma_ref": _Walk.multiply,
    "wgmma_accumulator_deref": _Walk.wait_for_products,
    "wgmma_accumulator_deref_p": _Walk.wait_for_products,  # its name until jax 0.12
    "wgmma_wait": _Walk.wait_for_products,
    "tcgen05_mma": _Walk.multiply_for_barrier,
    "copy_smem_to_gmem": _Walk.copy_out,
    "copy_gmem_to_smem": _Walk.copy_in,
}
