"""What conftest sets holds wherever tests compute: jitted, in threads, in programs they run."""

import concurrent.futures
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

PROGRAM = """
import jax, jax.numpy as jnp
print(jax.config.jax_numpy_dtype_promotion, jax.config.jax_numpy_rank_promotion)
"""


def add(x: jax.Array, y: jax.Array) -> jax.Array:
    return x + y


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ((jnp.ones(3, jnp.int32), jnp.ones(3, jnp.float32)), "promotion"),
        ((jnp.ones(3), jnp.ones((2, 3))), "rank_promotion"),
    ],
    ids=["dtypes", "ranks"],
)
def test_promotion_is_an_error(arrays: tuple[jax.Array, ...], message: str) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        for run in (add, jax.jit(add), lambda *x: pool.submit(jax.jit(add), *x).result()):
            with pytest.raises((ValueError, jax.dtypes.TypePromotionError), match=message):
                run(*arrays)


def test_programs_are_as_strict() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.stdout.split() == ["strict", "raise"], done.stderr
