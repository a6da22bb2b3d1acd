"""Messages from the first of several processes to the others, as a broadcast of JAX's own.

A broadcast is a sum over one CPU device of each process, of which all but the first give zeros: a
compiled program, whose collective is JAX's (Gloo). It waits for no step that is in flight on a GPU,
because it runs on the processors of the hosts. Where the model runs on these too, it does wait: XLA
would run both at a time, and mix up what they exchange.

A message is a frame of `_FIRST_INTS` numbers, and behind it a second one if that is too small. The
receivers wait in the first one, however long it takes. So that a process that is gone is noticed
while nobody has anything to say, the sender says so every `IDLE_S` seconds.
"""

import collections
import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_paged.engine.errors import ProcessLostError

logger = logging.getLogger(__name__)

IDLE_S = 2.0
"""After so many seconds without a message one is sent that says nothing."""
NOTHING = 0
"""The kind of that message; it is not given to who receives."""
_CLOSE_S = 10.0
_FIRST_INTS = 4096
_HEAD_INTS = 3  # kind, number of an engine, bytes
_MAX_UNSEEN = 3
"""Messages that may be on their way before the sender looks whether the first of them arrived."""


class Message(NamedTuple):
    """What the first process says.

    Attributes:
      kind: a number from 1 on.
      engine: which of the process's engines it is about.
      content: bytes; their number is a multiple of four, or what is missing of that is zeros.
    """

    kind: int
    engine: int
    content: bytes = b""


class Channel:
    """This process's end of the channel; all processes open it at the same time.

    Attributes:
      before: arrays of a step on the CPU devices, which has to be done before the next message;
        None where the model is elsewhere.
      is_first: whether this process sends.
      lost: what was raised when a process was found to be gone.

    Only the first process sends. Its messages, and the programs that it runs on the processes'
    devices in between, must reach all processes in one order: it holds `order` meanwhile.
    """

    def __init__(self) -> None:
        """Raises `RuntimeError` where JAX has no CPU device."""
        self.is_first = jax.process_index() == 0
        self.lost: ProcessLostError | None = None
        self.before: Any = None
        self._lock = threading.RLock()
        try:
            devices = jax.devices("cpu")
        except RuntimeError as error:
            raise RuntimeError(
                "several processes talk through JAX's CPU devices, and there are none: add cpu to "
                "the environment variable JAX_PLATFORMS, behind the platform of the model"
            ) from error
        firsts = {device.process_index: device for device in reversed(devices)}
        self._device = firsts[jax.process_index()]
        mesh = Mesh(np.array([firsts[index] for index in sorted(firsts)]), ("process",))
        self._sharding = NamedSharding(mesh, PartitionSpec("process"))
        self._sum = jax.jit(
            jax.shard_map(
                lambda x: jax.lax.psum(x, "process")[0],
                mesh=mesh,
                in_specs=PartitionSpec("process"),
                out_specs=PartitionSpec(),
                check_vma=False,
            )
        )
        self._later: collections.deque[Message] = collections.deque()
        self._num_engines = 0
        self._unseen: collections.deque[jax.Array] = collections.deque()
        self._last_s = time.monotonic()
        self._last: Message | None = None
        self._is_closing, self._is_closed = threading.Event(), threading.Event()
        if self.is_first:
            threading.Thread(target=self._keep_alive, name="channel", daemon=True).start()

    # --- the first process --------------------------------------------------------------------

    @contextlib.contextmanager
    def order(self) -> Iterator[None]:
        """Inside, nothing else is sent."""
        with self._lock:
            yield

    def new_engine(self) -> int:
        """Returns a number for an engine that no other one has."""
        self._num_engines += 1
        return self._num_engines

    def send_later(self, message: Message) -> None:
        """Sends a message before the next one. For a collector of garbage: it waits for nobody."""
        self._later.append(message)

    def send(self, message: Message, *, wait: bool = False) -> None:
        """Sends a message; with `wait` returns when all processes have it.

        Raises:
          ProcessLostError: a process is gone, and this or an earlier message has not reached it.
        """
        with self._lock, self._noticing():
            if self.lost is not None:
                raise self.lost
            while self._later:
                self._send(self._later.popleft())
            self._send(message)
            self._look(wait)
            self._last_s = time.monotonic()

    def _send(self, message: Message) -> None:
        size = len(message.content)
        ints = np.frombuffer(message.content.ljust(-(-size // 4) * 4, b"\0"), np.int32)
        frame, count = np.zeros(_FIRST_INTS, np.int32), _FIRST_INTS - _HEAD_INTS
        first, rest = ints[:count], ints[count:]
        frame[:_HEAD_INTS] = message.kind, message.engine, size
        frame[_HEAD_INTS : _HEAD_INTS + len(first)] = first
        self._unseen.append(self._broadcast(frame))
        if len(rest):
            padding = _room(len(rest)) - len(rest)
            self._unseen.append(self._broadcast(np.pad(rest, (0, padding))))

    def _look(self, wait: bool) -> None:
        """Raises what has become of messages, of all of them with `wait`, else of old ones."""
        unseen = self._unseen
        while len(unseen) > (0 if wait else _MAX_UNSEEN):
            np.asarray(unseen.popleft())

    def give_up(self, reason: str) -> None:
        """Sends nothing any more: this process cannot go on with the others."""
        self.lost = ProcessLostError(
            f"this engine of {jax.process_count()} processes has ended, {reason}: start it again"
        )
        logger.critical("%s", self.lost)

    def close(self, last: Message) -> bool:
        """Sends a last message; returns whether all processes have it, after some seconds at most.

        One that is gone, or does not listen, is no reason to wait for it. At an interpreter's exit
        no thread can be started: the one that is there sends it.
        """
        self._last = last
        self._is_closing.set()
        if not self._is_closed.wait(_CLOSE_S):
            logger.critical("the other processes do not follow this one, which ends")
            return False
        return self.lost is None

    def _keep_alive(self) -> None:
        while self.lost is None and not self._is_closing.wait(IDLE_S / 4):
            with contextlib.suppress(ProcessLostError), self._lock:
                if time.monotonic() - self._last_s > IDLE_S:
                    self.send(Message(NOTHING, 0), wait=True)
        self._is_closing.wait()
        if self._last is not None:
            with contextlib.suppress(ProcessLostError):
                self.send(self._last, wait=True)
        self._is_closed.set()

    # --- the others ---------------------------------------------------------------------------

    def receive(self) -> Message:
        """Waits for the next message and returns it.

        Raises:
          ProcessLostError: a process is gone.
        """
        with self._noticing():
            while True:
                frame = np.asarray(self._broadcast(np.zeros(_FIRST_INTS, np.int32)))
                kind, engine, size = frame[:_HEAD_INTS].tolist()
                ints, length = frame[_HEAD_INTS:], -(-size // 4)
                if length > len(ints):
                    room = _room(length - len(ints))
                    ints = np.concatenate([ints, self._broadcast(np.zeros(room, np.int32))])
                if kind != NOTHING:
                    return Message(kind, engine, ints[:length].tobytes()[:size])

    def _broadcast(self, ints: np.ndarray) -> jax.Array:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # who waits for the step gets that
            jax.block_until_ready(self.before)
        here = jax.device_put(ints[None], self._device)
        shape = (self._sharding.mesh.size, len(ints))
        return self._sum(jax.make_array_from_single_device_arrays(shape, self._sharding, [here]))

    @contextlib.contextmanager
    def _noticing(self) -> Iterator[None]:
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            self.lost = ProcessLostError.of(jax.process_index(), jax.process_count(), error)
            logger.critical("%s", self.lost)
            raise self.lost from error


def _room(num_ints: int) -> int:
    """Returns the size of a second frame: few sizes, for each is a program."""
    return max(_FIRST_INTS, 1 << (num_ints - 1).bit_length())
