"""How XLA calls a function that Numba compiled, and what that function reads of the call.

XLA's foreign function interface passes the address of a C struct, the call's frame. From there on
everything is read word by word, at the offsets of `xla/ffi/api/c_api.h`; `xla_header` holds that
header, which comes with jaxlib, against them.
"""

import ctypes
import os
import pathlib
import zlib
from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

COMPILED_ONLY: Any = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
"""Options of functions that nobody calls but compiled ones: a seventh of the time to compile."""
SIGNATURE = types.intp(types.intp)
"""Of a function that XLA can call: from the frame's address to 0, which is success."""

# In words of 8 bytes from the start of the struct that the comment names.
_EXTENSION, _API, _CONTEXT, _OPERANDS, _RESULTS = 1, 2, 3, 9, 14  # XLA_FFI_CallFrame
_DATA, _SIZES = 3, 5  # XLA_FFI_Buffer
_VERSION, _SCHEDULE, _NUM_THREADS = 4, 17, 18  # XLA_FFI_Api
_METADATA, _METADATA_VERSION = 3, 3  # XLA_FFI_Metadata_Extension, XLA_FFI_Metadata


def keep(thing: Any) -> None:
    """Keeps an object to the very end of the process: XLA's threads may be in its memory."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def compiled(function: Callable[[int], int], fastmath: set[str]) -> Any:
    """Returns a function compiled, or as Numba has kept it.

    Numba keeps it beside the file that it is in, or where that cannot be written to in the user's
    folder for caches. It looks at that file only to tell whether what it has kept is out of date,
    so a function must hold a `digest` of all other sources that are compiled with it.
    """
    return numba.cfunc(SIGNATURE, cache=True, fastmath=fastmath, error_model="numpy")(function)


def digest(*modules: Any) -> int:
    """Returns a number that changes with the sources of some modules."""
    return zlib.crc32(b"".join(pathlib.Path(module.__file__).read_bytes() for module in modules))


# --- memory -----------------------------------------------------------------------------------


@intrinsic
def pointer(typing_context: Any, address: Any) -> Any:
    """Returns an address as a pointer, for `numba.carray`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.intp), generate


@intrinsic
def add(typing_context: Any, address: Any, amount: Any) -> Any:
    """Adds to the word at an address, which other threads may do too; returns what was there."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", word, arguments[1], "seq_cst")

    return types.intp(types.intp, types.intp), generate


@intrinsic
def replace(typing_context: Any, address: Any, expected: Any, new: Any) -> Any:
    """Sets the word at an address, if it is what is expected; returns whether it was."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        pair = builder.cmpxchg(word, arguments[1], arguments[2], "seq_cst", "seq_cst")
        return builder.extract_value(pair, 1)

    return types.boolean(types.intp, types.intp, types.intp), generate


@intrinsic
def prefetch(typing_context: Any, address: Any) -> Any:
    """Asks for the cache line at an address, which may be any number."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        half = ir.IntType(32)
        function_type = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, half, half, half])
        name = "llvm.prefetch.p0"
        function = cgutils.get_or_insert_function(builder.module, function_type, name)
        line = builder.inttoptr(arguments[0], cgutils.voidptr_t)
        read, near, data = (ir.Constant(half, value) for value in (0, 2, 1))
        builder.call(function, [line, read, near, data])
        return context.get_dummy_value()

    return types.void(types.intp), generate


@intrinsic
def _five_words(typing_context: Any) -> Any:
    """Returns the address of five words on the stack of the function that this stands in."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        words = cgutils.alloca_once(builder, ir.ArrayType(ir.IntType(64), 5))
        return builder.ptrtoint(words, ir.IntType(64))

    return types.intp(), generate


@intrinsic
def yield_core(typing_context: Any) -> Any:
    """Lets other threads run on this one's core, if any wait for it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        name = "SwitchToThread" if os.name == "nt" else "sched_yield"
        function_type = ir.FunctionType(ir.IntType(32), [])
        builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def call(typing_context: Any, function: Any, argument: Any) -> Any:
    """Calls the C function at an address with one pointer; returns the pointer it returns."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function_type = ir.FunctionType(cgutils.voidptr_t, [cgutils.voidptr_t])
        called = builder.inttoptr(arguments[0], function_type.as_pointer())
        given = builder.inttoptr(arguments[1], cgutils.voidptr_t)
        return builder.ptrtoint(builder.call(called, [given]), ir.IntType(64))

    return types.intp(types.intp, types.intp), generate


@intrinsic
def own_address(typing_context: Any) -> Any:
    """Returns the address of a C function that calls the one this stands in, of `SIGNATURE`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        here = builder.function
        function_type = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t])
        task = ir.Function(builder.module, function_type, f"{here.name}.task")
        task.linkage = "internal"
        inside = ir.IRBuilder(task.append_basic_block())
        address = inside.ptrtoint(task.args[0], ir.IntType(64))
        context.call_conv.call_function(inside, here, types.intp, (types.intp,), (address,))
        inside.ret_void()
        return builder.ptrtoint(task, ir.IntType(64))

    return types.intp(), generate


@intrinsic
def word(typing_context: Any, address: Any, index: Any) -> Any:
    """Returns the word at an address, or one so many words behind it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.load(builder.gep(first, [arguments[1]]))

    return types.intp(types.intp, types.intp), generate


@intrinsic
def set_word(typing_context: Any, address: Any, index: Any, value: Any) -> Any:
    """Sets such a word."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        builder.store(arguments[2], builder.gep(first, [arguments[1]]))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), generate


# --- the frame --------------------------------------------------------------------------------


@numba.njit(**COMPILED_ONLY)
def asks_for_version(frame: int) -> bool:
    """Answers XLA's question, when it first sees a function, for the interface's version.

    XLA then calls with a frame that has an extension, and no operands.
    """
    extension = word(frame, _EXTENSION)
    if extension == 0 or word(extension, 1) & 0xFFFFFFFF != 1:  # XLA_FFI_Extension_Metadata
        return False
    # The version of XLA itself, two numbers in a word: what is read here is in it.
    set_word(word(extension, _METADATA), _METADATA_VERSION, word(word(frame, _API), _VERSION))
    return True


@numba.njit(**COMPILED_ONLY)
def operand_address(frame: int, index: int) -> int:
    """Returns where an operand's first number is."""
    return word(word(word(frame, _OPERANDS), index), _DATA)


@numba.njit(**COMPILED_ONLY)
def result_address(frame: int, index: int) -> int:
    """Returns where a result's first number goes."""
    return word(word(word(frame, _RESULTS), index), _DATA)


@numba.njit(**COMPILED_ONLY)
def operand(frame: int, index: int) -> Any:
    """Returns a pointer to an operand's first number."""
    return pointer(operand_address(frame, index))


@numba.njit(**COMPILED_ONLY)
def result(frame: int, index: int) -> Any:
    """Returns a pointer to a result's first number."""
    return pointer(result_address(frame, index))


@numba.njit(**COMPILED_ONLY)
def size(frame: int, index: int, axis: int) -> int:
    """Returns the length of an operand along an axis."""
    return word(word(word(word(frame, _OPERANDS), index), _SIZES), axis)


# --- threads ----------------------------------------------------------------------------------


@numba.njit(**COMPILED_ONLY)
def num_threads(frame: int) -> int:
    """Returns how many threads XLA has for the program that calls."""
    words = _five_words()
    set_word(words, 0, 32)  # bytes of XLA_FFI_ThreadPool_NumThreads_Args
    set_word(words, 1, 0)
    set_word(words, 2, word(frame, _CONTEXT))
    set_word(words, 3, words + 8 * 4)  # where the number goes
    set_word(words, 4, 0)
    return word(words, 4) if call(word(word(frame, _API), _NUM_THREADS), words) == 0 else 1


@numba.njit(**COMPILED_ONLY)
def ask_for_thread(frame: int, task: int, argument: int) -> bool:
    """Has one of XLA's threads call the C function `task`; returns False if XLA refuses."""
    words = _five_words()
    set_word(words, 0, 40)  # bytes of XLA_FFI_ThreadPool_Schedule_Args
    set_word(words, 1, 0)
    set_word(words, 2, word(frame, _CONTEXT))
    set_word(words, 3, task)
    set_word(words, 4, argument)
    return call(word(word(frame, _API), _SCHEDULE), words) == 0
