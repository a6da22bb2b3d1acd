"""One engine on the devices of several processes: the first one leads, the others follow.

The first process has the scheduler, the tokenizer and the callers. What it runs on the devices, the
others run too, each on its own part: they get the plans of its steps as bytes.
"""

import atexit
import contextlib
import dataclasses
import functools
import json
import logging
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import jax

from pallas_paged.engine.config import EngineConfig
from pallas_paged.engine.core.plan import StepPlan
from pallas_paged.engine.device.channel import Channel, Message
from pallas_paged.engine.device.runner import InFlight, ModelRunner

BUILD, STEP, RECOVER, WARM_UP, FORGET, END = range(1, 7)
"""Kinds of messages: an engine's configuration; a step's plan; what `ModelRunner` does by the same
names; an engine is no longer used; the process ends."""


class LeadingRunner(ModelRunner):
    """A runner whose steps the other processes run too.

    Args:
      channel: to them.
      engine: the number of theirs.
      *args, **kwargs: of `ModelRunner`.
    """

    def __init__(self, *args: Any, channel: Channel, engine: int, **kwargs: Any):
        self._channel, self._engine = channel, engine
        super().__init__(*args, **kwargs)
        weakref.finalize(self, channel.send_later, Message(FORGET, engine))

    def dispatch(self, plan: StepPlan) -> InFlight:
        """See `ModelRunner`.

        What fails here, or is interrupted, ends the engine for good: the others have begun a step
        that waits for this process's part.

        Raises:
          ProcessLostError: a process is gone.
        """
        with self._channel.order():
            self._tell(STEP, plan.to_bytes())
            try:
                in_flight = super().dispatch(plan)
            except BaseException as error:
                self._channel.give_up(f"step {plan.step_id} failed: {type(error).__name__}")
                raise
            hold_messages_for(in_flight, self._channel)
            return in_flight

    def recover(self) -> None:
        """See `ModelRunner`; raises `ProcessLostError` where another process is gone."""
        with self._channel.order():
            self._tell(RECOVER, wait=True)
            super().recover()

    def warm_up(self) -> None:
        """See `ModelRunner`; the other processes compile at the same time."""
        with self._channel.order():
            self._tell(WARM_UP)
            super().warm_up()

    def _tell(self, kind: int, content: bytes = b"", *, wait: bool = False) -> None:
        self._channel.send(Message(kind, self._engine, content), wait=wait)


@functools.cache
def channel() -> Channel:
    """Returns this process's channel; the first call opens it, in all processes at one time.

    When the first process exits, it tells the others.
    """
    opened = Channel()
    if opened.is_first:
        atexit.register(_end, opened)
    return opened


def _end(opened: Channel) -> None:
    if not opened.close(Message(END, 0)):
        exit_at_once()


def exit_at_once() -> None:
    """Ends this process with status 1: what JAX does at an exit waits for those that are gone."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


@contextlib.contextmanager
def leading(config: EngineConfig) -> Iterator[Callable[..., LeadingRunner]]:
    """Lets the other processes build an engine; inside, this one builds its part of it.

    Yields what makes the runner here. What fails inside ends the engine for good: the others wait
    for this process in the middle of their part.

    Raises:
      RuntimeError: this is one of the others.
      ProcessLostError: a process is gone.
    """
    opened = channel()
    if not opened.is_first:
        raise RuntimeError(
            f"process {jax.process_index()} of {jax.process_count()} follows the first one, and "
            "makes no engine of its own: call pallas_paged.engine.distributed.follow() there"
        )
    engine = opened.new_engine()
    with opened.order():  # while it is built the processes exchange other things
        opened.send(Message(BUILD, engine, config_to_bytes(config)))
        try:
            yield functools.partial(LeadingRunner, channel=opened, engine=engine)
        except BaseException as error:
            opened.give_up(f"its start failed: {type(error).__name__}")
            raise


def hold_messages_for(in_flight: InFlight, opened: Channel) -> None:
    """Lets messages wait for a step where they must, see `Channel`."""
    if next(iter(in_flight.tokens.devices())).platform == "cpu":
        opened.before = in_flight


def config_to_bytes(config: EngineConfig) -> bytes:
    """Returns a configuration for `config_from_bytes`, in another process with this version."""
    return json.dumps(dataclasses.asdict(config), default=os.fspath).encode()


def config_from_bytes(data: bytes) -> EngineConfig:
    """Returns the configuration that `config_to_bytes` made these of."""
    fields: dict[str, Any] = json.loads(data)
    return EngineConfig(**fields)


def obey(message: Message, runner: ModelRunner) -> None:
    """Does with this process's part what the first process does with its own."""
    if message.kind == STEP:
        hold_messages_for(runner.dispatch(StepPlan.from_bytes(message.content)), channel())
    elif message.kind == RECOVER:
        runner.recover()
    elif message.kind == WARM_UP:
        runner.warm_up()
    else:
        raise ValueError(f"unknown kind of message: {message.kind}")
