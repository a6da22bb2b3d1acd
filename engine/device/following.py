"""One engine on the devices of several processes: the first one leads, the others follow.

The first process has the scheduler, the tokenizer and the callers. What it runs on the devices, the
others run too, each on its own part: they get the plans of its steps as bytes.
"""

import dataclasses
import functools
import json
import os
import weakref
from collections.abc import Callable
from typing import Any

import jax

from pallas_paged.engine.config import EngineConfig
from pallas_paged.engine.core.plan import StepPlan
from pallas_paged.engine.device.channel import Channel, Message, channel
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

        Raises:
          ProcessLostError: a process is gone.
        """
        with self._channel.order():
            self._tell(STEP, plan.to_bytes())
            in_flight = super().dispatch(plan)
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


def leading(config: EngineConfig) -> Callable[..., LeadingRunner]:
    """Lets the other processes begin to build an engine; returns what makes its runner here.

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
    opened.send(Message(BUILD, engine, config_to_bytes(config)))
    return functools.partial(LeadingRunner, channel=opened, engine=engine)


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
