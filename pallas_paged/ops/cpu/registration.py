"""Makes functions that Numba compiles known to XLA, which may be before they are compiled."""

import ctypes
import threading
from collections.abc import Callable
from typing import Any

import jax
from llvmlite import binding

from pallas_paged.ops.cpu import xla_call
from pallas_paged.ops.cpu.later import now_or_later
from pallas_paged.ops.cpu.xla_call import asks_for_version, keep, yield_core

_ENTRY = """
define i64 @entry(i64 %frame) {{
  %answered = call i64 inttoptr (i64 {serve} to ptr)(i64 %frame)
  %is_question = icmp ne i64 %answered, 0
  br i1 %is_question, label %end, label %look
look:
  %address = load atomic i64, ptr inttoptr (i64 {word} to ptr) acquire, align 8
  %is_compiled = icmp ne i64 %address, 0
  br i1 %is_compiled, label %run, label %wait
wait:
  call i64 inttoptr (i64 {serve} to ptr)(i64 0)
  br label %look
run:
  %function = inttoptr i64 %address to ptr
  %error = call i64 %function(i64 %frame)
  ret i64 %error
end:
  ret i64 0
}}
"""
"""What XLA calls: it answers XLA's question, and else runs the function that a word points to."""


def _serve(frame: int) -> int:
    """Returns whether a frame was XLA's question, now answered; without a frame, it rests."""
    if frame == 0:
        yield_core()
        return 0
    return 1 if asks_for_version(frame) else 0


_served = xla_call.compiled(_serve, set())
keep(_served)


class _Kernel:
    """A function that XLA knows by a name, compiled or not."""

    def __init__(self, name: str):
        self._lock = threading.Lock()
        self._word = ctypes.c_int64(0)  # the function's address
        keep(self._word)
        code = _ENTRY.format(serve=_served.address, word=ctypes.addressof(self._word))
        machine = binding.Target.from_default_triple().create_target_machine()
        compiler = binding.create_mcjit_compiler(binding.parse_assembly(code), machine)
        compiler.finalize_object()
        keep(compiler)
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = (
            ctypes.py_object,
            (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p),
        )
        address = compiler.get_function_address("entry")
        capsule = new(address, b"xla._CUSTOM_CALL_TARGET", None)
        jax.ffi.register_ffi_target(name, capsule, platform="cpu")

    def compile(self, compile_function: Callable[[], Any]) -> None:
        """Compiles the function unless it is; one thread does, others wait."""
        with self._lock:
            if not self._word.value:
                function = compile_function()
                keep(function)
                self._word.value = function.address


_lock = threading.Lock()
_kernels: dict[str, _Kernel] = {}


def register(name: str, compile_function: Callable[[], Any]) -> str:
    """Lets XLA's programs for CPUs call a `numba.cfunc` of `xla_call.SIGNATURE`; returns its name.

    Compiles it too, unless it is or inside `later.kernels_later`. A program that runs before waits
    for it, on all the cores that call.

    Args:
      name: for the function.
      compile_function: returns it; called by one thread, again only if it raised.
    """
    with _lock:  # XLA refuses a name that comes twice
        if name not in _kernels:
            _kernels[name] = _Kernel(name)
    now_or_later(name, lambda: _kernels[name].compile(compile_function))
    return name
