"""Breaks what joins the thread of the steps and the event loop on purpose.

python -m tests.engine.mutate_async              # all of them, some seconds each
python -m tests.engine.mutate_async wake-up ...  # some, by name
"""

import sys

from tests.mutations import Mutation, run

_LOOP, _ENGINE, _LLM, _STREAM, _OVER = (
    f"pallas_paged/engine/{name}.py"
    for name in ("engine_loop", "async_engine", "async_llm", "request_stream", "hand_over")
)
_TESTS, _FAILURES, _LOOPS, _STREAMS, _STRESS = (
    f"tests/engine/test_{name}.py"
    for name in (
        "async_engine",
        "async_failures",
        "engine_loop",
        "request_stream",
        "async_stress",
    )
)
_DROP = "                self._inbox.get().drop()"

MUTATIONS = {
    "wake-up": Mutation(_OVER, "if not self._is_woken:\n            self._wake()", "pass", _LOOPS),
    "wake-up forgotten": Mutation(
        _OVER,
        "self._is_woken = False  # first: what is put in from here on wakes again",
        "pass",
        _LOOPS,
    ),
    "no turn for others": Mutation(
        _OVER, "for _ in range(len(self._items)):", "while self._items:", _LOOPS
    ),
    "the thread keeps its engine": Mutation(
        _OVER, "weakref.WeakMethod(take)", "(lambda: take)  # type: ignore", _LOOPS
    ),
    "names of those that leave": Mutation(
        _ENGINE, "self._leaving[request_id] += 1", "pass", f"{_TESTS} {_STRESS}"
    ),
    "names of those that leave twice": Mutation(
        _ENGINE,
        "self._leaving[request_id] += 1",
        "self._leaving[request_id] = 1",
        f"{_TESTS} {_STRESS}",
    ),
    "who leaves stays in the core": Mutation(
        _ENGINE, "self._loop.leave(request_id)", "pass", f"{_TESTS} {_STRESS}"
    ),
    "who leaves stays with the processor": Mutation(
        _ENGINE, "if request_id in self.parts.processor:", "if False:", f"{_TESTS} {_STRESS}"
    ),
    "a failed step fails nobody": Mutation(
        _ENGINE,
        "self._fail_all(functools.partial(step_failed, event.error), added_only=True)",
        "pass",
        _FAILURES,
    ),
    "a failed step fails those to come": Mutation(
        _ENGINE,
        "self._fail_all(functools.partial(step_failed, event.error), added_only=True)",
        "self._fail_all(functools.partial(step_failed, event.error))",
        _FAILURES,
    ),
    "a dead loop fails nobody": Mutation(
        _ENGINE, "self._fail_all(lambda: self.dead_error)", "pass", _FAILURES
    ),
    "lost outputs": Mutation(
        _ENGINE,
        "self._fail_all(functools.partial(step_failed, error), added_only=True)",
        "pass",
        _FAILURES,
    ),
    "a request that cannot be opened": Mutation(
        _ENGINE, "self._end(event.request_id, step_failed(error))", "pass", _FAILURES
    ),
    "a fault that stays in the core": Mutation(
        _ENGINE, "for request_id in processed.faults:", "for request_id in ():", _FAILURES
    ),
    "a stop string that ends nothing": Mutation(
        _ENGINE, "for ending in processed.endings:", "for ending in ():", f"{_TESTS} {_STRESS}"
    ),
    "a cancelled opening stays": Mutation(
        _ENGINE, "except BaseException:\n            stream.close()", "except ValueError:", _TESTS
    ),
    "a timer that stays": Mutation(_ENGINE, "entry.deadline.cancel()", "pass", _TESTS),
    "a watcher that fails": Mutation(
        _ENGINE, "except Exception as error:  # who only", "except OSError as error:  #", _TESTS
    ),
    "the steps are not told what was taken": Mutation(
        _ENGINE, "self._loop.note_taken()", "pass", _TESTS
    ),
    "an open event loop is left": Mutation(
        _ENGINE, "if not before.is_closed():", "if False:", _FAILURES
    ),
    "a closed event loop keeps its requests": Mutation(
        _ENGINE,
        'self._fail_all(lambda: EngineError("the event loop of the request was closed"))',
        "pass",
        _FAILURES,
    ),
    "futures of a closed event loop": Mutation(
        _ENGINE,
        "if not self.taken_in.done() and not self.taken_in.get_loop().is_closed():",
        "if not self.taken_in.done():",
        _FAILURES,
    ),
    "readers of a closed event loop": Mutation(
        _STREAM, "waiter.get_loop().is_closed()", "False", _FAILURES
    ),
    "no failure counts": Mutation(
        _LOOP, "if self._num_failures == MAX_FAILURES:", "if False:", _FAILURES
    ),
    "a dispatch counts as success": Mutation(
        _LOOP, "if self._core.num_generated_tokens > num_tokens:", "if True:", _FAILURES
    ),
    "every failure counts": Mutation(
        _LOOP,
        "self._num_failures = 0\n        self._deliver",
        "pass\n        self._deliver",
        _FAILURES,
    ),
    "a failed step that is not cleared": Mutation(_LOOP, "self._core.reset()", "pass", _FAILURES),
    "a failed change leaves a name": Mutation(
        _LOOP,
        "finally:  # if it fails, all requests have failed, and this one is gone with them",
        "except ZeroDivisionError:\n                raise\n            else:",
        _FAILURES,
    ),
    "late changes in another order": Mutation(
        _LOOP,
        "                while not self._inbox.empty():\n    " + _DROP,
        "            while not self._inbox.empty():\n" + _DROP,
        _LOOPS,
    ),
    "calls after the end": Mutation(
        _LOOP, "future.set_exception(ended(self.death))", "pass", _LOOPS
    ),
    "the dead are not known": Mutation(_LOOP, "self.death = error", "pass", _FAILURES),
    "aborted requests without their outputs": Mutation(
        _LOOP, "            if outputs:\n", "            if False:\n", _TESTS
    ),
    "nobody waits in the queue": Mutation(_LOOP, "self._num_asked += 1", "pass", _TESTS),
    "all wait in the queue for ever": Mutation(
        _LOOP,
        "def add() -> None:\n            self._num_answered += 1",
        "def add() -> None:\n            pass",
        _TESTS,
    ),
    "steps that run ahead": Mutation(_LOOP, "return self._is_held_up or not", "return not", _TESTS),
    "steps that wait for ever": Mutation(
        _LOOP, "if self._is_held_up and not self._is_behind:", "if False:", _TESTS
    ),
    "a second reader": Mutation(
        _STREAM,
        "if self._waiter is not None:\n                raise",
        "if False:\n                raise",
        _TESTS,
    ),
    "deltas that are lost": Mutation(
        _STREAM, "output = earlier.merged_with(output)", "pass", _STREAMS
    ),
    "all deltas are held": Mutation(_STREAM, "self._pending[-1][0] <= size:", "False:", _STREAMS),
    "readers outlive the end": Mutation(
        _LLM, "(None, self._readers.shutdown)", "(None, id, 0)", _TESTS
    ),
    "a new name that is in use": Mutation(_LLM, "if name not in self.engine:", "if True:", _TESTS),
}


if __name__ == "__main__":
    sys.exit(run(MUTATIONS, sys.argv[1:]))
