"""Programs may be compiled before what they call: then who runs one waits."""

import threading
import time

import jax
import jax.numpy as jnp
import numba
import numpy as np
import pytest

from pallas_paged.ops.cpu import registration, xla_call
from pallas_paged.ops.cpu.later import kernels_later

SECONDS = 60


def seven(frame: int) -> int:
    numba.carray(xla_call.result(frame, 0), 1, np.float32)[0] = 7
    return 0


class Slow:
    """Compiles `seven` when it is allowed to, and fails as often as it is told to."""

    def __init__(self, num_failures: int = 0):
        self.may = threading.Event()
        self.count = 0
        self._num_failures = num_failures

    def __call__(self):
        assert self.may.wait(SECONDS)
        self.count += 1
        if self.count <= self._num_failures:
            raise ValueError("not compiled")
        return numba.cfunc(xla_call.SIGNATURE)(seven)


def compiled_program(name):
    call = jax.ffi.ffi_call(name, jax.ShapeDtypeStruct((1,), jnp.float32))
    return jax.jit(lambda: call()).lower().compile()


def test_a_program_that_runs_too_early_waits():
    kernels, slow, found = {}, Slow(), []
    with kernels_later(kernels):
        assert registration.register("tests.early", slow) == "tests.early"
    program = compiled_program("tests.early")
    thread = threading.Thread(target=lambda: found.append(np.asarray(program())[0]), daemon=True)
    thread.start()
    time.sleep(0.2)
    assert (found, slow.count) == ([], 0)
    slow.may.set()
    assert list(kernels) == ["tests.early"]
    kernels["tests.early"]()
    thread.join(SECONDS)
    kernels["tests.early"]()
    assert (found, slow.count) == ([7], 1)


def test_two_who_want_one_kernel_have_it_compiled_once():
    slow, kernels = Slow(), {}
    first = threading.Thread(target=registration.register, args=("tests.two", slow), daemon=True)
    first.start()
    with kernels_later(kernels):
        registration.register("tests.two", slow)
    second = threading.Thread(target=kernels["tests.two"], daemon=True)
    second.start()
    time.sleep(0.1)
    assert first.is_alive()
    assert second.is_alive()
    slow.may.set()
    first.join(SECONDS)
    second.join(SECONDS)
    registration.register("tests.two", slow)
    assert slow.count == 1
    assert compiled_program("tests.two")()[0] == 7


def test_what_was_not_compiled_is_tried_again():
    slow = Slow(num_failures=2)
    slow.may.set()
    for _ in range(2):
        with pytest.raises(ValueError, match="not compiled"):
            registration.register("tests.again", slow)
    registration.register("tests.again", slow)
    assert compiled_program("tests.again")()[0] == 7


def test_later_is_for_this_thread_and_ends():
    kernels, slow = {}, Slow()
    slow.may.set()
    with kernels_later(kernels):
        other = threading.Thread(target=registration.register, args=("tests.other", slow))
        other.start()
        other.join(SECONDS)
    assert (slow.count, kernels) == (1, {})
    registration.register("tests.after", slow)
    assert (slow.count, kernels) == (2, {})
