"""Programs that are compiled in another thread: when, in whose place steps run, and at the end."""

import contextlib
import dataclasses
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_paged.engine import SamplingParams
from pallas_paged.engine.config import EngineConfig
from pallas_paged.engine.core.buckets import Bucket, Buckets
from pallas_paged.engine.device import implementations
from pallas_paged.engine.device.background import Background
from pallas_paged.engine.device.placement import Placement
from pallas_paged.engine.device.programs import StepPrograms
from pallas_paged.engine.resolved import resolve_background_compilation
from tests.engine.serving import make_llm
from tests.programs import ROOT

PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)


class Slow:
    """Makes a thing when it is allowed to."""

    def __init__(self) -> None:
        self.made: list[int] = []
        self.may = threading.Semaphore(0)
        self.begun = threading.Semaphore(0)

    def __call__(self, key: int) -> None:
        self.begun.release()
        assert self.may.acquire(timeout=60)
        if key < 0:
            raise ValueError(key)
        self.made.append(key)


def test_one_after_the_other_each_once() -> None:
    slow = Slow()
    background = Background(slow)
    for key in (3, 1, 3, 2, 1):
        background.start(key)
    slow.may.release(9)
    background.wait()
    assert slow.made == [3, 1, 2]
    assert "compiler" not in {thread.name for thread in threading.enumerate()}
    background.start(7)
    background.wait()
    assert slow.made == [3, 1, 2, 7]


def test_what_is_under_way_is_waited_for_and_what_waits_is_taken_back() -> None:
    slow = Slow()
    background = Background(slow)
    background.start(1)
    background.start(2)
    slow.begun.acquire()
    background.settle(2)  # returns at once
    assert slow.made == []
    threading.Timer(0.1, slow.may.release).start()
    background.settle(1)
    assert slow.made == [1]
    background.settle(5)  # nobody asked for it
    background.wait()
    assert slow.made == [1]


def test_a_failure_is_told_and_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    slow = Slow()
    background = Background(slow)
    with caplog.at_level(logging.WARNING):
        for key in (1, -1, 2):
            background.start(key)
        slow.may.release(9)
        background.wait()
    assert slow.made == [1, 2]
    assert "-1 was not compiled in the background" in caplog.text
    background.start(-1)  # may be tried again
    background.wait()


def test_a_process_ends_without_what_only_waits() -> None:
    code = """
import time
from pallas_paged.engine.device.background import Background

def make(key):
    time.sleep(0.5)
    print("made", key, flush=True)

background = Background(make)
for key in range(50):
    background.start(key)
time.sleep(0.1)
print("end", flush=True)
"""
    assert lines_of(code) == ["end", "made 0"]


def lines_of(code: str) -> list[str]:
    """Returns what a Python program prints."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_process_ends_before_what_others_left_to_its_end() -> None:
    """As JAX does, which forgets then what a compilation needs, and may say so late."""
    code = """
import atexit
import time
from pallas_paged.engine.device.background import Background

def make(key):
    time.sleep(0.5 * key)
    print("made", key, flush=True)

background = Background(make)
background.start(0)
background.wait()
atexit.register(print, "forgotten")
background.start(1)
time.sleep(0.1)
"""
    assert lines_of(code) == ["made 0", "made 1", "forgotten"]


def test_all_buckets_that_hold_a_step() -> None:
    buckets = Buckets((1, 2, 4), (8, 32), (2, 4), (5, 50), num_steps=8)
    fits = buckets.holding(2, 2, 6, is_decode=True)
    assert fits[0] == buckets.pick(2, 2, 6, is_decode=True) == Bucket(2, 2, 50, True, False, 8)
    assert fits[1:] == [
        Bucket(4, 4, 50, True, False, 8),
        *(Bucket(tokens, seqs, 50, False) for tokens in (8, 32) for seqs in (2, 4)),
    ]
    mixed = buckets.holding(9, 1, 1, is_decode=False, is_full=True)
    assert mixed[0] == buckets.pick(9, 1, 1, is_decode=False, is_full=True)
    assert {(b.num_tokens, b.is_decode, b.is_full) for b in mixed} == {(32, False, True)}


def test_by_default() -> None:
    default, fixed = EngineConfig("m"), EngineConfig("m", deterministic=True)
    assert resolve_background_compilation(default, "cpu")
    assert not resolve_background_compilation(default, "gpu")
    assert not resolve_background_compilation(fixed, "cpu")
    assert resolve_background_compilation(EngineConfig("m", background_compilation=True), "gpu")
    with pytest.raises(ValueError, match="background_compilation='no' must be True, False or None"):
        EngineConfig("m", background_compilation="no")


def test_steps_go_on_while_their_shape_is_compiled(
    ran: list[Bucket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step waits, and lets the next one's shape be compiled; until it is, they share."""
    may_end = threading.Event()
    compile_alone = StepPrograms._compile_alone

    def wait_first(programs: StepPrograms, bucket: Bucket) -> None:
        assert may_end.wait(60)
        compile_alone(programs, bucket)

    monkeypatch.setattr(StepPrograms, "_compile_alone", wait_first)
    llm = make_llm("llama-mqa-linear", max_num_seqs=4, background_compilation=True)
    outputs = []
    for output in llm.stream({"prompt_token_ids": [3, 4, 5]}, PARAMS):
        outputs.append(output)
        if len(outputs) == 6:
            assert not any(bucket.is_decode for bucket in ran)
            may_end.set()
            llm.runner.programs.wait_for_background()
    decode = [bucket.is_decode for bucket in ran]
    assert decode == sorted(decode)
    assert 0 < sum(decode) < 7
    alone = make_llm("llama-mqa-linear", max_num_seqs=4)
    (expected,) = alone.generate({"prompt_token_ids": [3, 4, 5]}, PARAMS, use_tqdm=False)
    assert outputs[-1].outputs[0].token_ids == expected.outputs[0].token_ids


def test_a_step_without_any_shape_waits_for_its_own(ran: list[Bucket]) -> None:
    llm = make_llm("llama-mqa-linear", max_num_seqs=4, background_compilation=True)
    begin = time.perf_counter()
    llm.generate({"prompt_token_ids": [3, 4, 5]}, PARAMS, use_tqdm=False)  # several steps at once
    assert [bucket.is_decode for bucket in ran] == [False, True, True]
    assert llm.runner.programs.num_traces == dict.fromkeys(ran, 1)
    assert time.perf_counter() > begin


def test_a_small_step_does_not_run_in_a_large_one(ran: list[Bucket]) -> None:
    llm: Any = make_llm("llama-mqa-linear", max_num_seqs=4, background_compilation=True)
    large = max(b for b in llm.runner.buckets.all() if not b.is_decode and not b.is_full)
    assert large.num_tokens > 64
    llm.runner.programs.compile([large])
    for _ in llm.stream({"prompt_token_ids": [3, 4, 5]}, PARAMS):
        pass
    assert large not in ran


def test_what_programs_call_is_compiled_before_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be put off while they are traced, and is not while they run."""
    events = []
    compile_program = jax.stages.Lowered.compile

    def note(event: str) -> None:
        if threading.current_thread().name != "compiler":  # of an engine of another test
            events.append(event)

    def compiled(lowered: jax.stages.Lowered, **options: Any) -> jax.stages.Compiled:
        note("program")
        return compile_program(lowered, **options)

    @contextlib.contextmanager
    def later(kernels: dict[str, Callable[[], object]]) -> Iterator[None]:
        kernels["kernel"] = lambda: note("kernel")
        yield

    monkeypatch.setattr("pallas_paged.engine.device.programs.kernels_later", later)
    llm = make_llm("llama-mqa-linear", max_num_seqs=4)
    monkeypatch.setattr(jax.stages.Lowered, "compile", compiled)
    llm.generate({"prompt_token_ids": [3, 4, 5]}, PARAMS, use_tqdm=False)
    assert events.count("program") == 3  # of tables, a prompt, and decode steps
    assert events == ["program", "kernel"] * 3


class Registered:
    """Records what kernels are asked for, and by which thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.done = threading.Event()
        self.found: list[tuple[Any, ...]] = []
        self.threads: set[str] = set()
        for api in (implementations.product, implementations.attention):
            monkeypatch.setattr(api, "register_for_loading", self)

    def __call__(self, *what: Any) -> None:
        self.found.append(what)
        self.threads.add(threading.current_thread().name)
        if len(what) > 2:
            self.done.set()


@pytest.mark.parametrize(
    ("dtype", "in_config", "expected"),
    [
        ("auto", "bfloat16", jnp.bfloat16),
        ("float32", "bfloat16", jnp.float32),
        ("auto", None, None),
    ],
)
def test_kernels_are_compiled_while_weights_are_read(
    monkeypatch: pytest.MonkeyPatch, dtype: str, in_config: str | None, expected: Any
) -> None:
    """Where the dtype of the weights is known before."""
    model = make_llm("llama-mqa-linear", max_num_seqs=4).model_config
    shape = dataclasses.replace(model, checkpoint_dtype=in_config)
    placement = Placement.on(jax.devices("cpu")[0])
    registered = Registered(monkeypatch)
    implementations.compile_kernels_soon(EngineConfig("m", dtype=dtype), shape, placement)
    if expected is None:
        assert not registered.found
        return
    assert registered.done.wait(60)
    assert registered.threads == {"compiler"}
    (weights,), (name, q, k, _) = registered.found
    assert weights == q.dtype == k.dtype == expected
    assert name == "numba"
