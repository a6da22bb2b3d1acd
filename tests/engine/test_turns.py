"""Threads that take turns at one engine, and a forked child that has no engine."""

import functools
import itertools
import subprocess
import sys
import threading
import time

import pytest

from pallas_paged.engine.turns import Turns
from tests.engine.test_interrupts import Line, interrupted_at, lines_of
from tests.models.references import DATA

FORK = """
import os, sys, threading, warnings
from pallas_paged.engine import LLM, SamplingParams

warnings.simplefilter("ignore")  # JAX says that forks are dangerous: they are
llm = LLM(sys.argv[1], num_blocks=40, compilation_cache_dir=None)
stream = llm.stream({"prompt_token_ids": [5, 6]}, SamplingParams(max_tokens=4))
next(stream)
child = os.fork()
if child == 0:
    for call in (
        lambda: llm.generate({"prompt_token_ids": [5]}, use_tqdm=False),
        lambda: next(stream),
        llm.get_metrics,
        lambda: llm.abort("request-0"),
    ):
        try:
            call()
        except RuntimeError as error:
            assert "forked child" in str(error) and "spawn" in str(error), error
        else:
            os._exit(3)
    del stream  # whose end is the parent's business
    os._exit(0)
killer = threading.Timer(60, os.kill, (child, 9))
killer.start()
status = os.waitpid(child, 0)[1]
killer.cancel()
assert len(list(stream)) >= 3  # the parent goes on
print("child ended with", os.waitstatus_to_exitcode(status))
"""


def test_one_thread_at_a_time_and_the_waiting_one_is_next() -> None:
    turns, order = Turns(), []
    inside, begin = threading.Lock(), threading.Barrier(2)

    def work(name: str) -> None:
        begin.wait(timeout=30)
        for _ in range(40):
            with turns:
                assert inside.acquire(blocking=False), "two threads are in"
                order.append(name)
                time.sleep(1e-2)  # longer than another process may keep a thread waiting
                inside.release()

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    changes = sum(a != b for a, b in itertools.pairwise(order))
    assert len(order) == 80
    assert changes > 70, "".join(order)  # locks without an order of their own: mostly below 10


def test_a_thread_may_be_in_it_again_while_another_waits() -> None:
    turns = Turns()
    waiting = threading.Thread(target=lambda: turns.__enter__() or turns.__exit__(None, None, None))
    with turns:
        waiting.start()
        time.sleep(0.05)
        with turns:
            pass
        assert waiting.is_alive()
    waiting.join(timeout=30)
    assert not waiting.is_alive()


def test_an_error_inside_gives_the_turn_back() -> None:
    turns = Turns()
    with pytest.raises(ZeroDivisionError), turns:
        _ = 1 / 0
    other = threading.Thread(target=lambda: turns.__enter__() or turns.__exit__(None, None, None))
    other.start()
    other.join(timeout=30)
    assert not other.is_alive()


def one_turn(turns: Turns) -> None:
    with turns:
        pass


def comes_next(turns: Turns) -> bool:
    """Whether another thread gets its turn."""
    other = threading.Thread(target=one_turn, args=(turns,), daemon=True)
    other.start()
    other.join(timeout=10)
    return not other.is_alive()


def lines_of_coming_in() -> list[Line]:
    lines = lines_of(lambda: one_turn(Turns()), ["turns.py"])
    found = [line for line in lines if line[0].co_name == "__enter__"]
    assert len(found) > 5
    return found


def test_an_interrupt_before_any_line_of_coming_in_keeps_nobody_out() -> None:
    for line in lines_of_coming_in():
        turns = Turns()
        assert interrupted_at(line, 1, lambda turns=turns: one_turn(turns))
        assert comes_next(turns), line
        one_turn(turns)


def test_a_turn_may_be_taken_before_any_line_of_coming_in() -> None:
    """As the collector of garbage does when it closes a stream."""
    for line in lines_of_coming_in():
        turns = Turns()
        work = functools.partial(one_turn, turns)
        thread = threading.Thread(target=interrupted_at, args=(line, 1, work, work), daemon=True)
        thread.start()
        thread.join(timeout=10)
        assert not thread.is_alive(), line
        assert comes_next(turns), line


def test_a_forked_child_is_refused_at_once() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORK, DATA / "llama-mha-tied"],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert "child ended with 0" in done.stdout, done.stderr[-2000:]
