"""How XLA calls a function that Numba compiled, and how that function uses XLA's threads.

XLA's foreign function interface passes the address of a C struct, the call's frame. From there on
everything is read word by word, at the offsets of `xla/ffi/api/c_api.h`; `xla_header` holds that
header, which comes with jaxlib, against them.
"""

import ctypes
import os
from typing import Any

import jax
import numba
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

SIGNATURE = types.intp(types.intp)
"""Of a function that XLA can call: from the frame's address to 0, which is success."""

# In words of 8 bytes from the start of the struct that the comment names.
_EXTENSION, _API, _CONTEXT, _OPERANDS, _RESULTS = 1, 2, 3, 9, 14  # XLA_FFI_CallFrame
_DATA, _SIZES = 3, 5  # XLA_FFI_Buffer
_VERSION, _SCHEDULE, _NUM_THREADS = 4, 17, 18  # XLA_FFI_Api
_METADATA, _METADATA_VERSION = 3, 3  # XLA_FFI_Metadata_Extension, XLA_FFI_Metadata


def register(name: str, function: Any) -> None:
    """Lets XLA's programs for CPUs call a `numba.cfunc` of `SIGNATURE` under this name."""
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = (
        ctypes.py_object,
        (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p),
    )
    capsule = new(function.address, b"xla._CUSTOM_CALL_TARGET", None)
    jax.ffi.register_ffi_target(name, capsule, platform="cpu")


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
def _allocate(typing_context: Any, num_bytes: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function_type = ir.FunctionType(cgutils.voidptr_t, [ir.IntType(64)])
        malloc = cgutils.get_or_insert_function(builder.module, function_type, "malloc")
        return builder.ptrtoint(builder.call(malloc, arguments), ir.IntType(64))

    return types.intp(types.intp), generate


@intrinsic
def _release(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function_type = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t])
        free = cgutils.get_or_insert_function(builder.module, function_type, "free")
        builder.call(free, [builder.inttoptr(arguments[0], cgutils.voidptr_t)])
        return context.get_dummy_value()

    return types.void(types.intp), generate


@intrinsic
def _yield(typing_context: Any) -> Any:
    """Lets other threads run on this one's core, if any wait for it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        name = "SwitchToThread" if os.name == "nt" else "sched_yield"
        function_type = ir.FunctionType(ir.IntType(32), [])
        builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def _call(typing_context: Any, function: Any, argument: Any) -> Any:
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


@numba.njit
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


@numba.njit
def operand(frame: int, index: int) -> Any:
    """Returns a pointer to an operand's first number."""
    return pointer(word(word(word(frame, _OPERANDS), index), _DATA))


@numba.njit
def result(frame: int, index: int) -> Any:
    """Returns a pointer to a result's first number."""
    return pointer(word(word(word(frame, _RESULTS), index), _DATA))


@numba.njit
def size(frame: int, index: int, axis: int) -> int:
    """Returns the length of an operand along an axis."""
    return word(word(word(word(frame, _OPERANDS), index), _SIZES), axis)


# --- threads ----------------------------------------------------------------------------------
# A job is a row of words that threads share: what is left to do, and who still looks at it. A
# helper that begins late, when all is done and the frame is gone, finds nothing to do and leaves.

_MARK, _NEXT, _DONE, _USERS, _NUM_ITEMS, _SPLITS, _FRAME, _ARGUMENTS = range(8)
_JOB_WORDS = _ARGUMENTS + 5


@numba.njit
def is_job(address: int) -> bool:
    """Whether a helper is called, with a job, and not XLA's own thread with a frame."""
    return word(address, _MARK) == -1  # a frame begins with its size


@numba.njit
def new_job(frame: int, num_items: int, num_splits: int) -> int:
    """Returns a job of so many items, and tells helpers `num_splits`, whatever that is."""
    job = _allocate(8 * _JOB_WORDS)
    set_word(job, _MARK, -1)
    set_word(job, _NEXT, 0)
    set_word(job, _DONE, 0)
    set_word(job, _USERS, 1)
    set_word(job, _NUM_ITEMS, num_items)
    set_word(job, _SPLITS, num_splits)
    set_word(job, _FRAME, frame)
    return job


@numba.njit
def call_helpers(job: int, task: int, most: int) -> None:
    """Asks XLA for threads, as many as it has and at most so many, to run `task` with the job."""
    frame = word(job, _FRAME)
    api, arguments = word(frame, _API), job + 8 * _ARGUMENTS
    set_word(arguments, 0, 32)  # bytes of XLA_FFI_ThreadPool_NumThreads_Args
    set_word(arguments, 1, 0)
    set_word(arguments, 2, word(frame, _CONTEXT))
    set_word(arguments, 3, arguments + 8 * 4)  # where the number goes
    if _call(word(api, _NUM_THREADS), arguments) != 0:
        return
    num_threads = word(arguments, 4)
    set_word(arguments, 0, 40)  # bytes of XLA_FFI_ThreadPool_Schedule_Args
    set_word(arguments, 3, task)
    set_word(arguments, 4, job)
    for _ in range(min(most, num_threads - 1)):
        add(job + 8 * _USERS, 1)
        if _call(word(api, _SCHEDULE), arguments) != 0:
            add(job + 8 * _USERS, -1)


@numba.njit
def splits_of(job: int) -> int:
    """Returns the `num_splits` of `new_job`."""
    return word(job, _SPLITS)


@numba.njit
def frame_of(job: int) -> int:
    """Returns the frame of the call; valid while an item is taken and not done."""
    return word(job, _FRAME)


@numba.njit
def take_item(job: int) -> int:
    """Returns the number of an item that nobody else gets, or -1."""
    item = add(job + 8 * _NEXT, 1)
    return item if item < word(job, _NUM_ITEMS) else -1


@numba.njit
def item_is_done(job: int) -> None:
    """Counts an item that was taken as done."""
    add(job + 8 * _DONE, 1)


@numba.njit
def wait_for_items(job: int) -> None:
    """Waits until all items are done, which other threads are at when none is left to take."""
    while add(job + 8 * _DONE, 0) < word(job, _NUM_ITEMS):
        _yield()


@numba.njit
def leave_job(job: int) -> None:
    """Lets go of the job; the last one frees it."""
    if add(job + 8 * _USERS, -1) == 1:
        _release(job)
