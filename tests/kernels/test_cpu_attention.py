"""Attention on CPUs: what it refuses, how it shares its work, what it relies on in XLA."""

import dataclasses
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numba
import numpy as np
import pytest

from benchmarks.attention_cases.arguments import AttentionSpec, build
from pallas_paged import paged_attention
from pallas_paged.deviceless import target_device
from pallas_paged.ops.attention.api import attention_implementation
from pallas_paged.ops.attention.cpu import kernel
from pallas_paged.ops.cpu import registration, team, xla_call, xla_header
from tests.kernels.one_program import attend as run
from tests.kernels.test_attention import assert_close
from tests.kernels.test_product import OTHER_CPUS, printed_on

LARGE = AttentionSpec(
    "large", (700, 1, 350, 33), (1, 1, 90, 33), num_q_heads=6, head_dim=64, block_size=16
)


def attend(spec, **options):
    return run(build(spec), "numba", **options)


def test_what_it_cannot_do_is_refused_with_the_reason():
    q = jax.ShapeDtypeStruct((4, 4, 64), jnp.dtype("float32"))
    cache = jax.ShapeDtypeStruct((9, 2, 16, 64), jnp.dtype("float32"))
    half, eighth = (
        jax.ShapeDtypeStruct(cache.shape, jnp.dtype(name)) for name in ("float16", "float8_e4m3fn")
    )
    assert attention_implementation(None, q, cache) == "numba"
    for arguments, options, reason in (
        ((q, half), {}, "the cache float16; q must be one of float32, bfloat16"),
        ((q, eighth), {}, "the cache float8_e4m3fn; q must"),
        ((q, cache), {"deterministic": True}, "deterministic=True, and few query tokens"),
    ):
        with pytest.raises(NotImplementedError, match=re.escape(reason)):
            attention_implementation("numba", *arguments, **options)
        assert attention_implementation(None, *arguments, **options) == "xla"
    with (
        jax.default_device(target_device("h100")),
        pytest.raises(NotImplementedError, match="it is for CPUs, not NVIDIA H100"),
    ):
        attention_implementation("numba", q, cache)


def test_steps_that_threads_share_equal_the_reference():
    assert sum(LARGE.seq_lens) * LARGE.num_kv_heads > kernel.MIN_SHARED_PAIRS
    arguments = build(LARGE)
    out, lse = run(arguments, "numba")
    expected, expected_lse = run(arguments, "reference")
    assert_close(out, expected, 1e-5)
    assert_close(lse, expected_lse, 1e-5)


NARROW = dataclasses.replace(LARGE, num_q_heads=4, head_dim=20, block_size=5, sliding_window=70)
"""Nothing in it is a multiple of a vector's length."""


@pytest.mark.parametrize("name", OTHER_CPUS)
def test_other_vectors(name, tmp_path):
    program = """
        from tests.kernels import test_cpu_attention as here
        for spec in (here.LARGE, here.NARROW):
            arguments = here.build(spec)
            for found, expected in zip(
                here.run(arguments, "numba"), here.run(arguments, "reference"), strict=True
            ):
                here.assert_close(found, expected, 1e-5)
        print("done")
        """
    assert printed_on(name, program, tmp_path) == ["done"]


def test_whoever_computes_an_item_the_result_is_the_same():
    arguments = build(LARGE)
    attend = jax.jit(lambda *arrays: paged_attention(*arrays, implementation="numba"))
    first = np.asarray(attend(*arguments.arrays))
    results = [attend(*arguments.arrays) for _ in range(50)]
    for result in results:
        np.testing.assert_array_equal(result, first)


def test_calls_beside_each_other_do_not_meet():
    """Two calls of a program need nothing of each other, so that XLA may run both at once."""
    arguments = build(LARGE)

    @jax.jit
    def twice(*arrays):
        q, *others = arrays
        return tuple(paged_attention(q * s, *others, implementation="numba") for s in (1.0, 0.5))

    expected = [run(arguments._replace(q=arguments.q * s), "reference")[0] for s in (1.0, 0.5)]
    for _ in range(10):
        for result, other in zip(twice(*arguments.arrays), expected, strict=True):
            assert_close(result, other, 1e-5)


def test_under_vmap():
    arguments = build(dataclasses.replace(LARGE, seq_lens=(33, 1, 35), query_lens=(1, 1, 30)))
    q = jnp.stack([arguments.q, 2 * arguments.q])
    others = arguments.arrays[1:]
    found = jax.vmap(lambda q: paged_attention(q, *others, implementation="numba"))(q)
    for result, one in zip(found, q, strict=True):
        expected = run(arguments._replace(q=one), "reference")[0]
        assert_close(result, expected, 1e-5)


def test_a_kernel_is_kept_on_disk():
    kind = kernel.Kind(np.float32, np.float32, 64, kernel.CHUNK)
    kernel.load_kernel(kind)
    assert kernel.compile_kernel(kind).cache_hits == 1


# --- XLA's side -----------------------------------------------------------------------------------

SECONDS = 20


def meet(address: int) -> int:
    """Two items, each of which waits for the other to begin: one thread alone would not end."""
    job, is_helper = address, team.is_job(address)
    frame, item = team.enter(address)
    if frame == 0:
        return 0
    begun = numba.carray(xla_call.result(frame, 0), 4, np.int64)
    if not is_helper:
        begun[:] = 0
        job = team.open_job(frame, xla_call.own_address(), 2, 1)
        team.call_helpers(job, 1)
        item = team.take_item(job)
    while item >= 0:
        xla_call.add(begun.ctypes.data, 1)
        waits = 0
        while xla_call.add(begun.ctypes.data, 0) < 2 and waits < SECONDS * 1_000_000:
            xla_call.yield_core()
            waits += 1
        begun[1 + item] = xla_call.add(begun.ctypes.data, 0)
        xla_call.add(begun[3:].ctypes.data, int(is_helper))
        team.item_is_done(job)
        item = team.take_item(job)
    if not is_helper:
        team.close_job(job)
    return 0


def test_items_are_worked_at_by_several_threads():
    compiled = numba.cfunc(xla_call.SIGNATURE, error_model="numpy")(meet)
    registration.register("tests.meet", lambda: compiled)
    with jax.enable_x64(True):
        call = jax.ffi.ffi_call("tests.meet", jax.ShapeDtypeStruct((4,), jnp.int64))
        for _ in range(20):
            begun = np.asarray(jax.jit(lambda: call())())
            np.testing.assert_array_equal(begun, [2, 2, 2, 1])


def test_the_interface_is_the_one_that_is_read():
    assert xla_header.unknown_interface() is None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  XLA_FFI_Args args;", "  int more;\n  XLA_FFI_Args args;", "XLA_FFI_CallFrame in"),
        ("  int64_t rank;\n", "", "XLA_FFI_Buffer in"),
        ("XLA_FFI_ThreadPool_Schedule)", "XLA_FFI_Other)", "XLA_FFI_Api in"),
    ],
)
def test_another_interface_is_refused(old, new, message, tmp_path, monkeypatch):
    copy = tmp_path / "xla"
    shutil.copytree(pathlib.Path(jax.ffi.include_dir(), "xla"), copy)
    header = copy / "ffi" / "api" / "c_api.h"
    text = header.read_text()
    assert old in text
    header.write_text(text.replace(old, new))
    monkeypatch.setattr(jax.ffi, "include_dir", lambda: str(tmp_path))
    reason = xla_header.unknown_interface.__wrapped__()
    assert reason.startswith(message)
    header.unlink()
    assert "cannot be read" in xla_header.unknown_interface.__wrapped__()
