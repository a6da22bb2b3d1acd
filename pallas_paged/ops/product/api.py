"""Products of activations with a weight that lies as checkpoints have it."""

import contextlib
import contextvars
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_paged.dispatch import Implementation, choose_implementation
from pallas_paged.ops.product import xla
from pallas_paged.ops.product.cpu import multiply as cpu

_IMPLEMENTATIONS = {
    "numba": Implementation(cpu.product, cpu.unsupported),
    "xla": Implementation(xla.product),
}


_in_use: contextvars.ContextVar[Mapping[int, jax.Array] | None] = contextvars.ContextVar(
    "rows_in_use", default=None
)


@contextlib.contextmanager
def rows_in_use(counts: Mapping[int, Int32[Array, ""]]) -> Iterator[None]:
    """Lets products that are traced inside leave out rows which are padding, in this thread.

    Args:
      counts: by how many rows `x` has, how many of them, the first ones, are in use. Of the others
        results may be 0 or those of any other product: "numba" leaves them out, "xla" does not.
    """
    token = _in_use.set(counts)
    try:
        yield
    finally:
        _in_use.reset(token)


def product(
    x: Float[Array, "*n in"],
    weight: Float[Array, "out in"],
    dtype: jax.typing.DTypeLike | None = None,
    *,
    implementation: str | None = None,
) -> Float[Array, "*n out"]:
    """Returns `x @ weight.T`, summed in float32 (in XLA's own way on a GPU).

    Both operands have two axes: a weight with three is copied into another order in every step by
    XLA's CPU compiler. What each implementation gains `benchmarks/products.py` measures.

    Args:
      x: the activations.
      weight: of the same dtype.
      dtype: of the result, by default that of `x`.
      implementation: "numba" (CPUs, up to `MAX_ROWS` rows) or "xla"; None takes the first that can.

    Raises:
      NotImplementedError: the implementation cannot do this; the message says why.
      ValueError: there is none of that name.
    """
    rows = x.reshape(-1, x.shape[-1])
    name = choose_implementation("product", _IMPLEMENTATIONS, implementation, rows, weight)
    num_rows = (_in_use.get() or {}).get(len(rows), jnp.int32(len(rows)))
    y = _IMPLEMENTATIONS[name].run(rows, weight, x.dtype if dtype is None else dtype, num_rows)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def register_for_loading(dtype: jax.typing.DTypeLike) -> None:
    """Makes XLA know what compiled programs with products of such weights call.

    Tracing does so by itself; a process that loads programs and traces none has to ask.
    """
    few = jax.ShapeDtypeStruct((8, 8), dtype)
    if cpu.unsupported(few, few) is None:
        cpu.register(few)
