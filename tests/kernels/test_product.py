"""Products with a weight as it lies, by each implementation, against NumPy."""

import concurrent.futures
import os
import re
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_paged.ops.cpu import vectors
from pallas_paged.ops.product import api, xla
from pallas_paged.ops.product.cpu import kernel, multiply

SHAPES = [
    *((1, 64, 6), (1, 384, 640), (2, 3, 7), (3, 17, 8), (4, 31, 33), (5, 1, 9), (7, 100, 37)),
    *((16, 384, 96), (17, 48, 130), (64, 100, 77), (250, 33, 9)),
]
"""Rows, features that are summed over, output features."""
NAMES = ("numba", "xla")


def operands(rows, k, out, dtype="float32", seed=0):
    draw = np.random.default_rng(seed)
    return (
        jnp.asarray(draw.standard_normal((rows, k)), dtype),
        jnp.asarray(draw.standard_normal((out, k)), dtype),
    )


def expected(x, weight):
    return np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T


def assert_near(found, x, weight, dtype="float32"):
    """Asserts that sums are float32's: within a few units of their terms' sizes."""
    sizes = np.abs(np.asarray(x, np.float64)) @ np.abs(np.asarray(weight, np.float64)).T
    error = np.abs(np.asarray(found, np.float64) - expected(x, weight))
    unit = 2.0**-24 if dtype == "float32" else 2.0**-8
    if dtype == "float32":
        assert np.max(error / sizes) < 8 * unit
    else:  # rounded once, at the end
        assert np.all(error <= unit * np.abs(expected(x, weight)) + 1e-5 * sizes)


@pytest.mark.parametrize("implementation", ["numba", "xla"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_against_numpy(shape, dtype, implementation):
    x, weight = operands(*shape, dtype)
    found = api.product(x, weight, jnp.float32, implementation=implementation)
    assert found.dtype == jnp.float32
    assert_near(found, x, weight)
    narrow = api.product(x, weight, implementation=implementation)
    assert narrow.dtype == x.dtype
    assert_near(narrow, x, weight, dtype)


def test_leading_axes_are_rows():
    x, weight = operands(6, 32, 8)
    found = api.product(x.reshape(2, 3, 32), weight)
    np.testing.assert_array_equal(found.reshape(6, 8), api.product(x, weight))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_is_the_same_among_any_others(dtype):
    x, weight = operands(33, 100, 24, dtype)
    together = api.product(x, weight, jnp.float32, implementation="numba")
    for i in (0, 7, 32):
        alone = api.product(x[i : i + 1], weight, jnp.float32, implementation="numba")
        np.testing.assert_array_equal(alone[0], together[i])


@pytest.mark.parametrize("rows", [1, 9])
def test_nan_and_infinity_stay_where_they_are(rows):
    x, weight = operands(rows, 19, 10)
    weight = weight.at[3, 18].set(jnp.nan).at[9, 0].set(jnp.inf)
    found = np.asarray(api.product(x, weight, implementation="numba"))
    assert np.isnan(found[:, 3]).all()
    assert np.isinf(found[:, 9]).all()
    np.testing.assert_allclose(found[:, :3], expected(x, weight[:3]), rtol=1e-4, atol=1e-4)
    assert np.isfinite(np.delete(found, (3, 9), axis=1)).all()


def test_nothing_is_read_behind_an_operand():
    """What follows in the memory is NaN, which a sum of too many terms would have."""
    flat = np.full(1 << 12, np.nan, np.float32)
    start = -flat.ctypes.data % 64 // 4
    flat[start : start + 7 * 5] = 1.0
    x = jax.device_put(flat[start : start + 7 * 5].reshape(7, 5))
    np.testing.assert_array_equal(api.product(x, x, implementation="numba"), np.full((7, 7), 5.0))


@pytest.mark.parametrize("in_use", [0, 1, 4, 6, 13, 14, 20])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_behind_those_in_use_are_left_out(dtype, in_use):
    x, weight = operands(14, 40, 24, dtype)
    every = api.product(x, weight, jnp.float32, implementation="numba")

    @jax.jit
    def run(x, weight, count):
        with api.rows_in_use({14: count}):
            found = [api.product(x, weight, jnp.float32, implementation=name) for name in NAMES]
            shorter = api.product(x[:13], weight, jnp.float32, implementation="numba")
        return *found, shorter, api.product(x, weight, jnp.float32, implementation="numba")

    found, of_xla, shorter, behind = run(x.at[in_use:].set(jnp.nan), weight, jnp.int32(in_use))
    np.testing.assert_array_equal(found[:in_use], every[:in_use])
    np.testing.assert_array_equal(found[in_use:], np.zeros_like(found[in_use:]))
    for other in (of_xla, behind):  # compute all
        assert np.isnan(other[in_use:]).all()
    if in_use:
        assert_near(of_xla[:in_use], x[:in_use], weight)
    assert np.isnan(shorter[in_use:]).all()


def test_no_rows():
    x, weight = operands(0, 16, 8)
    assert jax.jit(api.product)(x, weight).shape == (0, 8)


def test_derivatives_are_those_of_xla():
    x, weight = operands(3, 20, 6)

    def loss(x, weight, implementation):
        return jnp.sum(jnp.sin(api.product(x, weight, implementation=implementation)))

    for found, wanted in zip(
        jax.grad(loss, (0, 1))(x, weight, "numba"),
        jax.grad(loss, (0, 1))(x, weight, "xla"),
        strict=True,
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    tangent = jax.jvp(lambda x: api.product(x, weight), (x,), (jnp.ones_like(x),))[1]
    np.testing.assert_allclose(
        tangent, np.broadcast_to(np.asarray(weight).sum(1), (3, 6)), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("rows", [2, 64, 128])
def test_xla_has_few_rows_on_the_right(rows):
    """It knows that the other product is the transpose of this one, and took it instead."""
    text = jax.jit(xla.product, static_argnums=2).lower(*operands(rows, 48, 24), jnp.float32)
    found = re.findall(r"= f32\[(\d+),(\d+)\]\S* dot\(", text.compile().as_text())
    assert found == [("24", str(rows)) if rows <= 64 else (str(rows), "24")]


def test_it_can_be_mapped():
    x, weight = operands(6, 20, 8)
    found = jax.vmap(lambda x: api.product(x, weight))(x.reshape(2, 3, 20))
    np.testing.assert_array_equal(found.reshape(6, 8), api.product(x, weight))


@pytest.mark.parametrize(
    ("rows", "out", "dtype", "reason"),
    [
        (multiply.MAX_ROWS + 1, 8, "float32", "rows, more than"),
        (1, 5, "float32", "5 output features, fewer than 6"),
        (1, 8, "float16", "both must be one of"),
    ],
)
def test_what_it_cannot_do_it_says_and_xla_does(rows, out, dtype, reason):
    x, weight = operands(rows, 16, out, dtype)
    with pytest.raises(NotImplementedError, match=reason):
        api.product(x, weight, implementation="numba")
    np.testing.assert_allclose(
        np.asarray(api.product(x, weight), np.float32), expected(x, weight), rtol=0.02, atol=0.02
    )


def test_beside_instructions_for_matrices_only_few_rows_of_bfloat16(monkeypatch):
    monkeypatch.setattr(vectors, "HAS_AMX", True)
    rows = multiply.MAX_ROWS_BESIDE_AMX
    for count, dtype in ((rows, "bfloat16"), (rows + 1, "float32")):
        assert multiply.unsupported(*operands(count, 16, 8, dtype)) is None
    assert "more than" in multiply.unsupported(*operands(rows + 1, 16, 8, "bfloat16"))


def test_a_kernel_is_kept_on_disk():
    kernel.load_kernel(False)
    assert kernel.compile_kernel(False).cache_hits == 1


def test_programs_side_by_side_do_not_mix_their_work():
    """Each of them opens hundreds of jobs that helpers may take from the wrong one."""
    cases = [operands(rows, 64, 3200, seed=rows) for rows in (1, 3, 6, 18)]

    @jax.jit
    def chain(x, weight):
        first = api.product(x, weight, implementation="numba")
        total = first
        for i in range(50):
            y = api.product(x * (1 + i * 0), weight + 0 * total[0, 0], implementation="numba")
            total = total + jnp.abs(y - first)
        return first, total - first

    def check(case):
        first, change = chain(*case)
        assert_near(first, *case)
        np.testing.assert_array_equal(change, np.zeros_like(change))

    with concurrent.futures.ThreadPoolExecutor(len(cases)) as pool:
        for _ in range(5):
            list(pool.map(check, cases))


OTHER_CPUS = {
    "AVX2": "+sse2,+avx,+avx2,+fma",
    "no AVX": "+sse2,+sse4.1",
    "AVX-512 without bfloat16": "+sse2,+avx,+avx2,+fma,+avx512f,+avx512bw,+avx512vl,+avx512dq",
}


def printed_on(name, program, folder):
    """Returns what a program prints as on a CPU with less; one that has it runs all of them."""
    own = vectors._cpu_features()
    features = OTHER_CPUS[name]
    missing = [feature for feature in features.replace("+", "").split(",") if feature not in own]
    if missing:
        pytest.skip(f"this CPU has no {', '.join(missing)}")
    environment = {
        **os.environ,
        "NUMBA_CPU_NAME": "generic",
        "NUMBA_CPU_FEATURES": features,
        "NUMBA_CACHE_DIR": str(folder),
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("name", OTHER_CPUS)
def test_other_vectors(name, tmp_path):
    program = """
        from pallas_paged.ops.cpu import vectors
        from tests.kernels import test_product as here
        for shape in here.SHAPES:
            for dtype in ("float32", "bfloat16"):
                x, weight = here.operands(*shape, dtype)
                found = here.api.product(x, weight, here.jnp.float32, implementation="numba")
                here.assert_near(found, x, weight)
        print(vectors.LANES, vectors.MULTIPLIES_BFLOAT16)
        """
    lanes = {"AVX2": 8, "no AVX": 4}.get(name, 16)
    assert printed_on(name, program, tmp_path) == [str(lanes), "False"]
