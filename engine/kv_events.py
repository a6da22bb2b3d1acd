"""Publishes what is cached to routers that send a request to where its prefix is, as vLLM does.

The wire format is that of vLLM 0.23, whose events are arrays; routers that also read the maps of
later releases go on to read these. A message on the PUB socket has three parts: the topic, the
batch's number (8 bytes, big endian) and the batch in msgpack: `[seconds since 1970, events, rank]`,
with the engine's data parallel rank. An event is one of

    ["BlockStored", block_hashes, parent_block_hash, token_ids, block_size, lora_id, "GPU",
     lora_name, extra_keys]
    ["BlockRemoved", block_hashes, "GPU"]
    ["AllBlocksCleared"]

Hashes are integers of 64 bits, see `kv/block_events.py`; `lora_id` and `lora_name` are null. Only
an event with the first block of a salted sequence has `extra_keys`: a list with `[salt]` for that
block and null for each other one. Whoever can connect reads the prompts' tokens and salts. A block
is stored when the step that fills it is dispatched: it is there for every later step.

Numbers count the batches from 0; one that is missing was lost. To the ROUTER socket for replays a
client's DEALER socket sends a number, 8 bytes, behind an empty part or alone. It gets each batch
that is still kept from that number on as two parts, number and batch, and in the end the number -1
with an empty batch, behind an empty part if the request was.
"""

import collections
import contextlib
import logging
import queue
import threading
import time
from typing import Any, NamedTuple

from pallas_paged.engine.core.step_record import StepRecord
from pallas_paged.engine.kv.block_events import (
    AllBlocksCleared,
    BlockEvent,
    BlockEvents,
    BlockRemoved,
)

logger = logging.getLogger(__name__)

DEFAULT_BUFFER_STEPS = 10_000
MAX_QUEUED_BATCHES = 10_000
"""Batches that wait to be sent."""
_MAX_UNREAD_BATCHES = 100_000
"""Of one subscriber; those behind them are lost to it."""
_MEDIUM = "GPU"
"""Of blocks that a step can read at once, whatever the device is."""
_END = (-1).to_bytes(8, "big", signed=True)
_IDLE_S = 0.1
"""Until what changed outside of steps is sent, and a replay begun."""
_LINGER_MS = 1000
"""What is on its way when the publisher is closed may take so long."""


def check_kv_events(
    endpoint: object,
    topic: object,
    replay_endpoint: object,
    buffer_steps: object,
    enable_prefix_caching: bool,
) -> None:
    """Checks the fields of `EngineConfig`; raises `ValueError` with field, value and way out."""
    for name, value in (
        ("kv_events_endpoint", endpoint),
        ("kv_events_replay_endpoint", replay_endpoint),
    ):
        ok = value is None or (isinstance(value, str) and value.startswith(("tcp://", "ipc://")))
        if not ok:
            raise ValueError(
                f"{name}={value!r} must be like 'tcp://*:5557' or 'ipc://path', or None"
            )
    if not isinstance(topic, str):
        raise ValueError(f"kv_events_topic={topic!r} must be a string")
    ok = isinstance(buffer_steps, int) and not isinstance(buffer_steps, bool) and buffer_steps >= 1
    if not ok:
        raise ValueError(f"kv_events_buffer_steps={buffer_steps!r} must be an integer >= 1")
    if endpoint is None:
        for name, value in (
            ("kv_events_topic", topic),
            ("kv_events_replay_endpoint", replay_endpoint),
        ):
            if value:
                raise ValueError(f"{name}={value!r} needs a socket; set kv_events_endpoint")
    elif not enable_prefix_caching:
        raise ValueError(
            f"kv_events_endpoint={endpoint!r} tells of cached blocks, and there are none; leave "
            "enable_prefix_caching at True"
        )
    if replay_endpoint is None and buffer_steps != DEFAULT_BUFFER_STEPS:
        raise ValueError(
            f"kv_events_buffer_steps={buffer_steps!r} needs a socket for replays; set "
            "kv_events_replay_endpoint"
        )


class Batch(NamedTuple):
    """What changed in a step.

    Attributes:
      number: counts the batches.
      time_s: since 1970.
      events: in their order.
    """

    number: int
    time_s: float
    events: list[BlockEvent]


def wire_event(event: BlockEvent) -> tuple[Any, ...]:
    """Returns what an event is in msgpack."""
    if isinstance(event, AllBlocksCleared):
        return ("AllBlocksCleared",)
    if isinstance(event, BlockRemoved):
        return ("BlockRemoved", event.block_hashes, _MEDIUM)
    fields = ("BlockStored", *event[:4], None, _MEDIUM, None)
    if event.root is None:
        return fields
    return (*fields, [(event.root,), *[None] * (len(event.block_hashes) - 1)])


def wire_batch(batch: Batch, data_parallel_rank: int = 0) -> tuple[Any, ...]:
    """Returns what a batch of an engine is in msgpack."""
    return batch.time_s, [wire_event(event) for event in batch.events], data_parallel_rank


def endpoint_of_rank(endpoint: str | None, data_parallel_rank: int) -> str | None:
    """Returns the endpoint of a replica, as vLLM has them: ports count up from the first one's.

    Of `ipc://` the name gets the suffix `_dp1`; a port that ZeroMQ chooses is left to it.
    """
    if endpoint is None or not data_parallel_rank:
        return endpoint
    if endpoint.startswith("ipc://"):
        return f"{endpoint}_dp{data_parallel_rank}"
    address, _, port = endpoint.rpartition(":")
    return f"{address}:{int(port) + data_parallel_rank}" if port.isdecimal() else endpoint


class KVEventPublisher:
    """Publishes events of blocks, a batch per step; as a `StepObserver` it is told of the steps.

    The engine's thread hands batches over, and a thread of the publisher's own encodes and sends
    them. Batches that it does not keep up with are dropped whole: they are counted, a warning says
    so, and their numbers are missing.

    Args:
      events: where the events come from.
      endpoint: of the PUB socket. One with `*` or `::`, and one of `ipc://`, is bound; to any other
        it connects.
      topic: the first part of each message.
      replay_endpoint: of the ROUTER socket for replays, which is bound; None has none.
      buffer_steps: batches that are kept for replays.
      max_queued_batches: batches that may wait for the publisher's thread.
      data_parallel_rank: the engine's place among replicas, which every batch tells.

    Attributes:
      endpoint: as given; of a bound socket with the port that it has. So is the next one.
      replay_endpoint: likewise.
      num_dropped_batches: so far.

    Raises:
      ImportError: pyzmq or msgspec is missing.
      ValueError: an endpoint cannot be used; the message names it.
    """

    def __init__(
        self,
        events: BlockEvents,
        endpoint: str,
        *,
        topic: str = "",
        replay_endpoint: str | None = None,
        buffer_steps: int = DEFAULT_BUFFER_STEPS,
        max_queued_batches: int = MAX_QUEUED_BATCHES,
        data_parallel_rank: int = 0,
    ):
        self.num_dropped_batches = 0
        self._rank = data_parallel_rank
        self._events = events
        self._topic = topic.encode()
        self._next_number = 0
        self._is_dropping = False
        self._queue: queue.Queue[Batch | None] = queue.Queue(max_queued_batches)
        num_kept = 0 if replay_endpoint is None else buffer_steps
        self._kept: collections.deque[tuple[bytes, bytes]] = collections.deque(maxlen=num_kept)
        self._flushing = threading.Lock()  # batches are queued in the order of their numbers
        self._is_closing = threading.Event()
        self._open(endpoint, replay_endpoint)
        self._thread = threading.Thread(target=self._run, name="kv-events", daemon=True)
        self._thread.start()

    def _open(self, endpoint: str, replay_endpoint: str | None) -> None:
        """Makes the sockets, which only the publisher's thread uses from then on."""
        try:
            import msgspec
            import zmq
        except ImportError as error:
            raise ImportError(
                "kv_events_endpoint needs pyzmq and msgspec: pip install 'pallas-paged[serve]'"
            ) from error
        self._encode = msgspec.msgpack.Encoder().encode
        self._context = zmq.Context()

        def open_socket(field: str, value: str, kind: int, is_bound: bool) -> tuple[Any, str]:
            socket: Any = self._context.socket(kind)
            socket.linger = _LINGER_MS
            socket.sndhwm = _MAX_UNREAD_BATCHES if kind == zmq.PUB else 0  # a replay is whole
            socket.ipv6 = "::" in value
            try:
                (socket.bind if is_bound else socket.connect)(value)
            except zmq.ZMQError as error:
                self._context.destroy(linger=0)
                raise ValueError(f"{field}={value!r} cannot be used: {error}") from error
            return socket, socket.last_endpoint.decode() if is_bound else value

        is_bound = endpoint.startswith("ipc://") or "*" in endpoint or "::" in endpoint
        self._socket, self.endpoint = open_socket("kv_events_endpoint", endpoint, zmq.PUB, is_bound)
        self._replay, self.replay_endpoint = None, replay_endpoint
        if replay_endpoint is not None:
            self._replay, self.replay_endpoint = open_socket(
                "kv_events_replay_endpoint", replay_endpoint, zmq.ROUTER, True
            )

    def begin(self, step_id: int) -> None:
        """Nothing: what a step changes is known when it is over."""

    def end(self, record: StepRecord) -> None:
        """Hands over what has changed since the step before."""
        self.flush()

    def flush(self) -> None:
        """Hands over what has changed, if anything has; never waits for the sockets.

        Once the publisher is closed, that is forgotten.
        """
        with self._flushing:
            events = self._events.take()
            if events and not self._is_closing.is_set():
                self._hand_over(events)

    def _hand_over(self, events: list[BlockEvent]) -> None:
        batch = Batch(self._next_number, time.time(), events)
        self._next_number += 1
        try:
            self._queue.put_nowait(batch)
            self._is_dropping = False
        except queue.Full:
            self._drop(batch)

    def _drop(self, batch: Batch) -> None:
        self.num_dropped_batches += 1
        if not self._is_dropping:  # once for as long as it lasts
            logger.warning(
                "KV events: %d batches wait to be sent, and batch %d is dropped, as are those that "
                "follow until there is room; routers see that their numbers are missing, and do "
                "not know what they held (%d dropped so far)",
                self._queue.maxsize,
                batch.number,
                self.num_dropped_batches,
            )
        self._is_dropping = True

    def close(self) -> None:
        """Sends what waits, closes the sockets and ends the thread; may be called again.

        What changes afterwards is not published.
        """
        if threading.current_thread() is self._thread:  # which may collect an engine as garbage
            self._is_closing.set()
            return
        self.flush()
        self._is_closing.set()
        with contextlib.suppress(queue.Full):  # then the thread is awake
            self._queue.put_nowait(None)
        self._thread.join()

    # --- the publisher's thread ---------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not (self._is_closing.is_set() and self._queue.empty()):
                self._turn()
        finally:
            self._context.destroy(linger=_LINGER_MS)

    def _turn(self) -> None:
        """Answers who asks for a replay, and sends the next batch, if one comes soon."""
        try:
            while self._replay is not None and self._replay.poll(0):
                self._answer(self._replay.recv_multipart())
            batch = self._queue.get(timeout=_IDLE_S)
            if batch is not None:
                self._send(batch)
        except queue.Empty:
            self.flush()  # what has changed outside of a step
        except Exception:
            logger.exception("KV events: a batch or a replay was not sent")

    def _send(self, batch: Batch) -> None:
        number, payload = (
            batch.number.to_bytes(8, "big"),
            self._encode(wire_batch(batch, self._rank)),
        )
        self._kept.append((number, payload))
        self._socket.send_multipart((self._topic, number, payload))

    def _answer(self, request: list[bytes]) -> None:
        """Sends the kept batches from the one on that is asked for."""
        client, *delimiter, first = request
        if any(delimiter) or len(first) != 8:
            logger.warning(
                "KV events: a replay was asked for by %r, and not by a number of 8 bytes", request
            )
            return
        assert self._replay is not None
        for number, payload in self._kept:
            if number >= first:  # big endian: in the order of the numbers
                self._replay.send_multipart((client, *delimiter, number, payload))
        self._replay.send_multipart((client, *delimiter, _END, b""))
