"""What the processes of `test_processes.py` run, by a name and arguments."""

import json
import os
import pathlib
import signal
import sys
import threading
import time
from typing import Any

import jax
import numpy as np

from pallas_paged.engine import LLM, BeamSearchParams, SamplingParams, distributed, loading
from pallas_paged.engine.device.channel import Message
from pallas_paged.engine.device.following import channel
from pallas_paged.engine.device.placement import Placement
from tests.models.references import DATA

NAME = "llama-mqa-linear"
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
OPTIONS: dict[str, Any] = {
    "max_num_seqs": 4,
    "max_num_batched_tokens": 16,
    "block_size": 4,
    "max_model_len": 64,
    "num_scheduler_steps": 1,
    "compilation_cache_dir": None,
    "background_compilation": False,
}


def say(*words: object) -> None:
    """Prints a line that the test tells from those of XLA's collectives, which print there too."""
    print("\n=", *words, flush=True)


def requests() -> tuple[list[dict[str, list[int]]], list[Any]]:
    """Returns prompts and parameters of several kinds."""
    kinds = [
        GREEDY,
        SamplingParams(temperature=1.0, seed=3, max_tokens=12, n=2, ignore_eos=True),
        BeamSearchParams(3, 8, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=8, logprobs=2, prompt_logprobs=1, ignore_eos=True),
        SamplingParams(temperature=1.0, seed=5, max_tokens=12, presence_penalty=0.5),
    ]
    rng = np.random.default_rng(0)
    prompts = [{"prompt_token_ids": rng.integers(3, 128, 4 + 2 * i).tolist()} for i in range(10)]
    return prompts, [kinds[i % len(kinds)] for i in range(10)]


def answers(llm: LLM) -> list[list[list[int]]]:
    """Returns the tokens of all requests."""
    outputs = llm.generate(*requests(), use_tqdm=False)
    llm.engine.check_idle()
    return [[list(map(int, c.token_ids)) for c in output.outputs] for output in outputs]


def serve(num_devices: int) -> None:
    """Prints what two engines answer, one after the other; the second one swaps."""
    say(json.dumps(answers(LLM(DATA / NAME, tensor_parallel_size=num_devices, **OPTIONS))))
    small = LLM(
        DATA / NAME,
        tensor_parallel_size=num_devices,
        num_blocks=14,
        swap_space=0.01,
        preemption_mode="auto",
        **OPTIONS,
    )
    if jax.process_count() == 2:
        small.warm_up()
    say(json.dumps(answers(small)))
    stats = small.kv_stats()
    say(stats.num_swaps + stats.num_recomputations)


def busy(num_devices: int, ready: str) -> None:
    """Generates until something fails, and prints when and how."""
    llm = LLM(DATA / NAME, tensor_parallel_size=num_devices, **OPTIONS)
    answers(llm)
    pathlib.Path(ready).touch()
    try:
        while True:
            answers(llm)
    except Exception as error:
        say(time.time(), type(error).__name__, error)


def idle(num_devices: int, ready: str) -> None:
    """Waits, with an engine that has nothing to do, until the channel knows that one is gone."""
    llm = LLM(DATA / NAME, tensor_parallel_size=num_devices, **OPTIONS)
    answers(llm)
    pathlib.Path(ready).touch()
    while channel().lost is None:
        time.sleep(0.05)
    say(time.time(), type(channel().lost).__name__, channel().lost)


def interrupted(num_devices: int) -> None:
    """Interrupts the first step when the others have begun it, and asks for another one."""
    llm = LLM(DATA / NAME, tensor_parallel_size=num_devices, **OPTIONS)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    llm.runner._move_blocks = interrupt  # type: ignore[method-assign]
    for _ in range(2):
        try:
            answers(llm)
        except BaseException as error:
            say(type(error).__name__, error)


def failing_start(num_devices: int) -> None:
    """Fails where the other processes wait for this one, and tries again."""

    def fail(*_: object, **__: object) -> None:
        raise MemoryError("no room")

    loading.plan_pool = fail  # type: ignore[assignment]
    for _ in range(2):
        try:
            LLM(DATA / NAME, tensor_parallel_size=num_devices, **OPTIONS)
        except Exception as error:
            say(type(error).__name__, error)


def wrong_size(num_devices: int) -> None:
    """Asks for fewer devices than there are."""
    try:
        LLM(DATA / NAME, tensor_parallel_size=num_devices // 2, **OPTIONS)
    except ValueError as error:
        say(error)


def messages(seed: str) -> None:
    """Sends messages of many sizes; the others print what came of them."""
    rng = np.random.default_rng(int(seed))
    for number in range(40):
        size = int(rng.integers(0, 100_000)) if number % 4 else number
        content = rng.bytes(size)
        channel().send(Message(1 + number % 3, number, content), wait=number % 7 == 0)
        if number % 10 == 0:
            channel().send_later(Message(9, number))
    time.sleep(0.5)
    channel().close(Message(99, 0))


def receive(seed: str) -> None:
    """Prints whether the messages are those that were sent."""
    rng = np.random.default_rng(int(seed))
    numbers, late = [], []
    while (message := channel().receive()).kind != 99:
        if message.kind == 9:
            late.append(message.engine)
            continue
        number = len(numbers)
        size = int(rng.integers(0, 100_000)) if number % 4 else number
        assert message == Message(1 + number % 3, number, rng.bytes(size))
        numbers.append(number)
    say(len(numbers), late)


def own_engine() -> None:
    """Makes an engine in a process that should follow."""
    try:
        LLM(DATA / NAME, tensor_parallel_size=2, **OPTIONS)
    except RuntimeError as error:
        say(error)
    os._exit(0)


def main() -> None:
    """Joins the others, and does what the first or another process does by that name."""
    name, port, number, count, *arguments = sys.argv[1:]
    distributed.initialize(f"127.0.0.1:{port}", int(count), int(number))
    import jax

    if name == "least":
        say(Placement.on(*jax.devices()).least(10 - jax.process_index()))
        if not distributed.is_first():
            distributed.follow()
    elif name == "messages":
        (messages if distributed.is_first() else receive)(*arguments)
    elif not distributed.is_first():
        if name == "own_engine":
            own_engine()
        if arguments and arguments[-1] == "die" and int(number) == int(count) - 1:
            threading.Thread(target=_die, args=arguments[:1], daemon=True).start()
        distributed.follow()
        say("followed to the end")
    elif name == "own_engine":
        channel()
        time.sleep(20)
    elif name in ("serve", "wrong_size", "interrupted", "failing_start"):
        globals()[name](jax.device_count())
    else:
        globals()[name](jax.device_count(), arguments[0])


def _die(ready: str) -> None:
    while not pathlib.Path(ready).exists():
        time.sleep(0.02)
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
