"""How several of XLA's threads work on one call.

A call's work is a job of numbered items. The thread that XLA calls opens the job in a slot, takes
items, and so do helpers, until none is left. A helper runs on one of XLA's own threads. To wake one
takes 30 to 45 us, as long as many a product of a small model; so a helper that finds nothing more
to do stays for a while and looks whether another job is opened in its slot.

Slots are never freed: whoever comes late to one finds that its job has no item left. Who gets an
item is decided in one word, which is changed by compare-and-swap.
"""

import ctypes
from typing import Any

import numba
from llvmlite import binding, ir
from numba.core import types
from numba.extending import intrinsic

from pallas_paged.ops.cpu import xla_call
from pallas_paged.ops.cpu.xla_call import (
    COMPILED_ONLY,
    add,
    ask_for_thread,
    call,
    num_threads,
    replace,
    set_word,
    word,
    yield_core,
)

PATIENCE = 500
"""How often a helper looks for another job before it leaves, about 0.4 us each."""

MAX_ITEMS = 2**24 - 1
"""Of a job."""

_SYMBOL = "pallas_paged_team"
_NUM_SLOTS = 64
_SLOT_WORDS = 16  # two lines of a CPU's caches, which come together
_STAY = 0  # of the words before the first slot: the address of the function that helpers run
_STATE, _DONE, _HELPERS, _IS_TAKEN, _FRAME, _TASK, _NOTE = range(7)  # the words of a slot
# The state: the job's number, how many items it has, and the next one.
_NUMBER_BIT, _COUNT_BIT = 48, 24
_NUMBER_MASK, _COUNT_MASK = 2**16 - 1, MAX_ITEMS
# What a job goes by: a negative number, for a frame's address is a positive one.
_IS_JOB, _JOB_BIT, _SLOT_MASK = -(2**63), 8, 2**8 - 1

_words = (ctypes.c_int64 * (_SLOT_WORDS * (_NUM_SLOTS + 1)))()
binding.add_symbol(_SYMBOL, ctypes.addressof(_words))


@intrinsic
def _team(typing_context: Any) -> Any:
    """Returns the address of the words before the first slot."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        name, kind = _SYMBOL, ir.IntType(64)
        known = builder.module.globals.get(name)
        words = known or ir.GlobalVariable(builder.module, kind, name)
        return builder.ptrtoint(words, kind)

    return types.intp(), generate


@numba.njit(**COMPILED_ONLY)
def _place(job: int) -> int:
    """Returns the address of a job's slot."""
    return _team() + 8 * _SLOT_WORDS * (1 + (job & _SLOT_MASK))


@numba.njit(**COMPILED_ONLY)
def is_job(address: int) -> bool:
    """Whether a helper is called, with a job, and not XLA's own thread with a frame."""
    return address < 0


@numba.njit(**COMPILED_ONLY)
def open_job(frame: int, task: int, num_items: int, note: int) -> int:
    """Returns a new job of at most `MAX_ITEMS` items, which helpers work at by calling `task`.

    Args:
      frame: of the call.
      task: `own_address()` of the kernel, which is called with the job.
      num_items: of the job.
      note: a number for all who work at it.
    """
    slot = 0
    place = _place(slot)
    while word(place, _IS_TAKEN) != 0 or not replace(place + 8 * _IS_TAKEN, 0, 1):
        slot = (slot + 1) % _NUM_SLOTS  # who holds one needs nobody else to get on
        place = _place(slot)
    set_word(place, _FRAME, frame)
    set_word(place, _TASK, task)
    set_word(place, _NOTE, note)
    set_word(place, _DONE, 0)
    before = add(place + 8 * _STATE, 0)
    state = ((before >> _NUMBER_BIT) + 1 << _NUMBER_BIT) | num_items << _COUNT_BIT
    replace(place + 8 * _STATE, before, state)  # nobody else changes it while no item is left
    return _job(slot, state)


@numba.njit(**COMPILED_ONLY)
def _job(slot: int, state: int) -> int:
    """Returns what a job goes by, which tells it from those before and after it in its slot."""
    return _IS_JOB | (state >> _NUMBER_BIT & _NUMBER_MASK) << _JOB_BIT | slot


@numba.njit(**COMPILED_ONLY)
def call_helpers(job: int, most: int) -> None:
    """Has up to so many of XLA's other threads help, as far as it has them."""
    place = _place(job)
    frame = word(place, _FRAME)
    missing = min(most, num_threads(frame) - 1) - add(place + 8 * _HELPERS, 0)
    for _ in range(missing):
        add(place + 8 * _HELPERS, 1)
        if not ask_for_thread(frame, word(_team(), _STAY), job):
            add(place + 8 * _HELPERS, -1)


_OTHERS = xla_call.digest(xla_call)


def _stay(job: int) -> int:
    """What a helper runs: it works at the jobs in a slot until none has come for a while."""
    slot, place = job & _SLOT_MASK, _place(job) if _OTHERS >= 0 else 0
    while True:
        looks = 0
        while looks < PATIENCE:
            state = add(place + 8 * _STATE, 0)
            if _has_items(state):
                # The task may be that of a later job by now; then this one has no item left.
                call(word(place, _TASK), _job(slot, state))
                looks = 0
            yield_core()
            looks += 1
        add(place + 8 * _HELPERS, -1)
        # One that was opened just now counts on this helper.
        if not _has_items(add(place + 8 * _STATE, 0)):
            return 0
        add(place + 8 * _HELPERS, 1)


@numba.njit(**COMPILED_ONLY)
def _has_items(state: int) -> bool:
    return state & _COUNT_MASK < state >> _COUNT_BIT & _COUNT_MASK


@numba.njit(**COMPILED_ONLY)
def _frame_of(job: int) -> int:
    """Returns the frame of the call; valid while an item is taken and not done."""
    return word(_place(job), _FRAME)


@numba.njit(**COMPILED_ONLY)
def note_of(job: int) -> int:
    """Returns the `note` of `open_job`; valid likewise."""
    return word(_place(job), _NOTE)


@numba.njit(**COMPILED_ONLY)
def take_item(job: int) -> int:
    """Returns the number of an item of the job that nobody else gets, or -1 if none is left."""
    slot, address = job & _SLOT_MASK, _place(job) + 8 * _STATE
    while True:
        state = add(address, 0)
        if _job(slot, state) != job or not _has_items(state):
            return -1
        if replace(address, state, state + 1):
            return state & _COUNT_MASK


@numba.njit(**COMPILED_ONLY)
def enter(address: int) -> tuple[int, int]:
    """Returns what a kernel that is called finds: the frame, 0 if there is nothing to do.

    And, for a helper, an item that it has taken; -1 for XLA's own thread, which opens the job.
    """
    if is_job(address):
        item = take_item(address)
        return (_frame_of(address) if item >= 0 else 0), item
    return address, -1


@numba.njit(**COMPILED_ONLY)
def item_is_done(job: int) -> None:
    """Counts an item that was taken as done."""
    add(_place(job) + 8 * _DONE, 1)


@numba.njit(**COMPILED_ONLY)
def close_job(job: int) -> None:
    """Waits until all items are done, which helpers are at when none is left to take."""
    place = _place(job)
    num_items = word(place, _STATE) >> _COUNT_BIT & _COUNT_MASK
    while add(place + 8 * _DONE, 0) < num_items:
        yield_core()
    add(place + 8 * _IS_TAKEN, -1)


_helper = xla_call.compiled(_stay, set())
_words[_STAY] = _helper.address
xla_call.keep(_helper)
xla_call.keep(_words)
