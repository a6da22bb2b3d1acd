"""Events of cached blocks: they say exactly what is cached, and routers can read them."""

import gc
import itertools
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import hypothesis.strategies as st
import msgspec
import numpy as np
import pytest
import zmq
from hypothesis.stateful import initialize, precondition, rule

from pallas_paged.engine import LLM, SamplingParams
from pallas_paged.engine.config import EngineConfig
from pallas_paged.engine.kv.block_events import (
    AllBlocksCleared,
    BlockEvent,
    BlockEvents,
    BlockRemoved,
    BlockStored,
    block_hash,
    root_hash,
)
from pallas_paged.engine.kv.block_memory import BlockTableMemory
from pallas_paged.engine.kv.prefix_cache import First, PrefixCache
from pallas_paged.engine.kv.sharing import FullBlocks, Root
from pallas_paged.engine.kv_events import Batch, KVEventPublisher, wire_batch
from tests.engine import test_interrupts as interrupts
from tests.engine import test_scheduler_stateful as stateful
from tests.engine.mock_model import make_mock_llm

GREEDY = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, detokenize=False)
WAIT_S = 20
"""What does not come in this time is missing."""

Prefix = tuple[Root, tuple[int, ...]]


def until(condition: Callable[[], bool]) -> None:
    """Waits until it holds."""
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "in vain"
        time.sleep(0.01)


class Router:
    """Follows what is cached by the events alone, and by nothing but what they say."""

    def __init__(self) -> None:
        self.prefixes: dict[int, Prefix] = {}

    def take(self, events: Sequence[BlockEvent]) -> None:
        for event in events:
            match event:
                case BlockStored(hashes, parent, token_ids, size, root):
                    assert len(token_ids) == len(hashes) * size > 0
                    assert parent is None or root is None
                    root, known = (root, ()) if parent is None else self.prefixes[parent]
                    for place, each in enumerate(hashes):
                        assert each not in self.prefixes, "stored twice"
                        known += tuple(token_ids[place * size : (place + 1) * size])
                        self.prefixes[each] = root, known
                case BlockRemoved(hashes):
                    assert hashes
                    for each in hashes:
                        del self.prefixes[each]
                case AllBlocksCleared():
                    self.prefixes.clear()

    def check(self, events: BlockEvents, cache: PrefixCache) -> None:
        """Takes the events, and asserts that these prefixes are cached, and no others."""
        self.take(events.take())
        assert events._hashes.keys() == cache._keys.keys()
        cached = prefixes_of(cache)
        assert sorted(self.prefixes.values(), key=str) == sorted(cached, key=str)
        for name, (root, token_ids) in self.prefixes.items():
            assert name == hash_of(root, token_ids, cache.block_size)


def prefixes_of(cache: PrefixCache) -> list[Prefix]:
    """Returns, for each cached block, its root and the tokens up to its end."""

    def prefix(block: int) -> Prefix:
        parent, tokens = cache._keys[block]
        root, before = (parent.root, ()) if isinstance(parent, First) else prefix(parent)
        return root, before + tokens

    return [prefix(block) for block in cache._keys]


def hash_of(root: Root, token_ids: Sequence[int], block_size: int) -> int:
    """Returns the hash of the last of the blocks that the tokens fill."""
    name = root_hash(root)
    for start in range(0, len(token_ids), block_size):
        name = block_hash(name, token_ids[start : start + block_size])
    return name


def listen(memory: BlockTableMemory) -> tuple[Router, BlockEvents]:
    events = BlockEvents(memory.block_size)
    memory.listen(events)
    return Router(), events


# --- what they say --------------------------------------------------------------------------------


def test_equal_content_has_equal_hashes_everywhere() -> None:
    """As `b2sum -l 64` makes them of what `block_hash` and `root_hash` say."""
    assert root_hash(None).to_bytes(8, "little").hex() == "7376b2cbfa0ad26e"
    assert root_hash("a").to_bytes(8, "little").hex() == "167004e8304614a8"
    assert hash_of(None, range(4), 2).to_bytes(8, "little").hex() == "097f41bd6e992f5f"
    assert hash_of("a", range(4), 2) != hash_of(None, range(4), 2)
    assert hash_of(None, range(4), 4) != hash_of(None, range(4), 2)


def test_an_event_for_each_run_of_new_blocks() -> None:
    cache, events = PrefixCache(10, 2), BlockEvents(2)
    cache.listener = events
    tokens = [1, 2, 3, 4, 5, 6]
    cache.enter(FullBlocks(0, tokens, 0, 2, None, True), [3, 4])
    cache.enter(FullBlocks(0, tokens, 2, 3, None, True), [4, 5])
    names = [hash_of(None, tokens[:end], 2) for end in (2, 4, 6)]
    expected: list[BlockEvent] = [
        BlockStored(names[:2], None, [1, 2, 3, 4], 2, None),
        BlockStored(names[2:], names[1], [5, 6], 2, None),
    ]
    assert events.take() == expected
    cache.enter(FullBlocks(1, [1, 2, 3, 4, 7, 7, 8, 8], 0, 4, None, True), [6, 7, 8, 9])
    behind = [hash_of(None, [1, 2, 3, 4, 7, 7, 8, 8][:end], 2) for end in (6, 8)]
    assert events.take() == [BlockStored(behind, names[1], [7, 7, 8, 8], 2, None)]
    cache.enter(FullBlocks(2, [1, 2], 0, 1, "salt", True), [1])
    assert events.take() == [BlockStored([hash_of("salt", [1, 2], 2)], None, [1, 2], 2, "salt")]
    refs = np.ones(10, np.int32)
    refs[[1, 9]] = 2
    assert cache.evict(1, refs) == [5]
    assert events.take() == [BlockRemoved(names[2:])]
    assert cache.evict(0, refs) == []
    cache.enter(FullBlocks(1, [1, 2], 0, 1, None, True), [3])
    assert events.take() == []
    cache.clear()
    assert events.take() == [AllBlocksCleared()]


class EventMachine(stateful.SchedulerMachine):
    """Lives of a scheduler whose cache a router follows; now and then a step fails."""

    @initialize(setting=stateful.SETTINGS.filter(lambda each: each.enable_prefix_caching))
    def start(self, setting: stateful.Setting) -> None:
        self.begin(setting)

    def begin(self, setting: stateful.Setting) -> None:
        super().begin(setting)
        self.memory = self.engine.runner.memory
        self.router, self.events = listen(self.memory)

    def check_blocks(self) -> None:
        before = len(self.router.prefixes)
        self.router.check(self.events, self.memory.prefix_cache)
        self.seen["stored"] += len(self.router.prefixes) > before
        self.seen["removed"] += len(self.router.prefixes) < before

    @rule()
    def reset(self) -> None:
        before = len(self.router.prefixes)
        self.memory.reset_prefix_cache()
        self.check_blocks()
        self.seen["reset"] += len(self.router.prefixes) < before

    @precondition(lambda self: self.router.prefixes)
    @rule(odds=st.integers(0, 3))
    def fail(self, odds: int) -> None:
        if odds:
            return
        self.engine.in_flight = None
        self.engine.runner.queue.clear()
        self.scheduler.abort_all()
        self.pinned.clear()
        self.check_blocks()
        assert not self.router.prefixes
        self.seen["failure"] += 1


class WindowEventMachine(EventMachine):
    """The same with a sliding window, where blocks in use are forgotten."""

    @initialize(setting=stateful.WINDOW_SETTINGS.filter(lambda each: each.enable_prefix_caching))
    def start(self, setting: stateful.Setting) -> None:
        self.begin(setting)
        cache = self.memory.prefix_cache
        self.find_last, cache._last_before_rows = cache._last_before_rows, self.note_forgotten

    def note_forgotten(self, candidates: np.ndarray) -> tuple[int, list[int]]:
        block, behind = self.find_last(candidates)
        self.seen["in use and forgotten"] += len(behind)
        return block, behind


@pytest.mark.parametrize("machine", [EventMachine, WindowEventMachine])
def test_random_lives(machine: type[EventMachine]) -> None:
    seen = stateful.live(machine, 60)
    events = ["stored", "removed", "reset", "failure", "preemption", "prefix hit"]
    if machine is WindowEventMachine:
        events.append("in use and forgotten")
    for event in events:
        assert seen[event], f"the lives do not test {event!r}: {seen}"


def test_an_interrupt_before_any_line_of_the_memory() -> None:
    engine = interrupts.make_engine()
    router, events = listen(engine.memory)
    files = [*interrupts.FILES["memory"], "block_events.py"]
    lines = interrupts.lines_of(interrupts.Life(engine).run, files)
    assert {code.co_name for code, _ in lines} >= {"stored", "removed", "enter", "evict"}
    names = ("prefix_cache.py", "block_events.py")
    for target in [line for line in lines if line[0].co_filename.endswith(names)]:
        life = interrupts.Life(engine)
        assert interrupts.interrupted_at(target, 1, life.run), target
        life.drain()
        router.check(events, engine.memory.prefix_cache)


# --- how they are sent ----------------------------------------------------------------------------


def test_the_bytes_of_a_batch() -> None:
    batch = Batch(
        7,
        1.5,
        [
            BlockStored([2**64 - 1, 1], None, [3, 4], 1, "s"),
            BlockStored([5], 1, [300], 1, None),
            BlockRemoved([5]),
            AllBlocksCleared(),
        ],
    )
    stored = b"\xabBlockStored"
    assert msgspec.msgpack.encode(wire_batch(batch)) == b"".join(
        [
            b"\x93\xcb\x3f\xf8\0\0\0\0\0\0\x94",  # three items: 1.5, four events, ...
            b"\x99" + stored + b"\x92\xcf" + b"\xff" * 8 + b"\x01" + b"\xc0" + b"\x92\x03\x04",
            b"\x01\xc0\xa3GPU\xc0" + b"\x92\x91\xa1s\xc0",
            b"\x98" + stored + b"\x91\x05" + b"\x01" + b"\x91\xcd\x01\x2c" + b"\x01\xc0\xa3GPU\xc0",
            b"\x93\xacBlockRemoved\x91\x05\xa3GPU",
            b"\x91\xb0AllBlocksCleared",
            b"\0",  # ... and the rank
        ]
    )


Connect = Callable[[int, str | None], Any]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Makes sockets that are connected to an endpoint, and closes them."""
    context = zmq.Context()
    sockets: list[Any] = []

    def make(kind: int, endpoint: str | None) -> Any:
        assert endpoint is not None
        socket = context.socket(kind)
        sockets.append(socket)
        socket.rcvtimeo = 1000 * WAIT_S
        if kind == zmq.SUB:
            socket.subscribe(b"topic")
        socket.connect(endpoint.replace("0.0.0.0", "127.0.0.1"))
        return socket

    yield make
    context.destroy(linger=0)


def replay(socket: Any, first: int, delimiter: tuple[bytes, ...] = (b"",)) -> list[tuple[int, Any]]:
    """Returns the kept batches from a number on, which a DEALER socket asks for."""
    batches: list[tuple[int, Any]] = []
    socket.send_multipart([*delimiter, first.to_bytes(8, "big")])
    while True:
        *before, number, payload = socket.recv_multipart()
        assert before == [*delimiter]
        if number == b"\xff" * 8:
            assert payload == b""
            return batches
        batches.append((int.from_bytes(number, "big"), msgspec.msgpack.decode(payload)))


def events_of(payload: Any) -> list[BlockEvent]:
    """Returns the events of a decoded batch."""
    events: list[BlockEvent] = []
    for name, *fields in payload[1]:
        if name == "BlockStored":
            hashes, parent, token_ids, size, lora_id, medium, lora_name, *extra = fields
            assert (lora_id, medium, lora_name) == (None, "GPU", None)
            events.append(
                BlockStored(hashes, parent, token_ids, size, extra[0][0][0] if extra else None)
            )
        elif name == "BlockRemoved":
            events.append(BlockRemoved(fields[0]))
        else:
            assert (name, fields) == ("AllBlocksCleared", [])
            events.append(AllBlocksCleared())
    return events


def generate(llm: LLM, first: int, salt: str | None = None) -> None:
    prompt: Any = {"prompt_token_ids": np.arange(first, first + 9).tolist()}
    llm.generate(prompt if salt is None else prompt | {"cache_salt": salt}, GREEDY, use_tqdm=False)


@pytest.fixture
def make_llm() -> Iterator[Callable[..., LLM]]:
    """Makes LLMs of the mock model that publish on ports that are free, and closes them."""
    publishers: list[KVEventPublisher] = []

    def make(**options: Any) -> LLM:
        llm = make_mock_llm(
            enable_prefix_caching=True,
            kv_events_endpoint="tcp://*:*",
            kv_events_topic="topic",
            kv_events_replay_endpoint="tcp://127.0.0.1:*",
            **options,
        )
        publishers.append(publisher_of(llm))
        return llm

    yield make
    for publisher in publishers:
        publisher.close()


def publisher_of(llm: LLM) -> KVEventPublisher:
    assert llm.kv_events is not None
    return llm.kv_events


def test_a_router_hears_what_an_engine_caches(
    connect: Connect, make_llm: Callable[..., LLM]
) -> None:
    llm = make_llm(num_blocks=9)
    subscriber = connect(zmq.SUB, publisher_of(llm).endpoint)
    heard: list[list[bytes]] = []
    prompts = itertools.cycle(range(0, 40, 3))

    def hears() -> bool:
        generate(llm, next(prompts))
        if subscriber.poll(50):
            heard.append(subscriber.recv_multipart())
        return bool(heard)

    until(hears)  # the subscription has arrived
    generate(llm, 11, salt="s")  # where others are evicted
    publisher_of(llm).flush()
    num_batches = publisher_of(llm)._next_number
    while number_of(heard[-1]) < num_batches - 1:
        heard.append(subscriber.recv_multipart())

    requester = connect(zmq.DEALER, publisher_of(llm).replay_endpoint)
    batches = replay(requester, 0)
    assert [number for number, _ in batches] == list(range(num_batches))
    router = Router()
    for _, payload in batches:
        assert payload[0] > 1e9
        assert payload[2] == 0
        router.take(events_of(payload))
    cached = prefixes_of(llm.engine.memory.prefix_cache)
    assert sorted(router.prefixes.values(), key=str) == sorted(cached, key=str)
    assert {root for root, _ in cached} >= {"s"}
    assert [message[0] for message in heard] == [b"topic"] * len(heard)
    parsed = [(number_of(message), msgspec.msgpack.decode(message[2])) for message in heard]
    assert parsed == batches[-len(heard) :]
    assert replay(requester, num_batches - 1, delimiter=()) == batches[-1:]


def number_of(message: list[bytes]) -> int:
    assert len(message[1]) == 8
    return int.from_bytes(message[1], "big")


def test_what_changes_outside_of_steps_is_published(
    connect: Connect, make_llm: Callable[..., LLM]
) -> None:
    llm = make_llm()
    requester = connect(zmq.DEALER, publisher_of(llm).replay_endpoint)
    generate(llm, 3)
    assert llm.reset_prefix_cache()
    names = [hash_of(None, range(3, 3 + num_tokens), 4) for num_tokens in (8, 4)]
    expected: list[BlockEvent] = [BlockRemoved(names)]
    until(lambda: [events_of(payload) for _, payload in replay(requester, 0)][-1:] == [expected])


def test_only_the_last_batches_are_kept_for_replays(
    connect: Connect, make_llm: Callable[..., LLM]
) -> None:
    llm = make_llm(kv_events_buffer_steps=2)
    requester = connect(zmq.DEALER, publisher_of(llm).replay_endpoint)
    for first in (0, 10, 20, 30):
        generate(llm, first)
    last = publisher_of(llm)._next_number - 1
    assert last >= 3

    def numbers() -> list[int]:
        return [number for number, _ in replay(requester, 0)]

    until(lambda: numbers()[-1:] == [last])
    assert numbers() == [last - 1, last]


def test_a_wrong_request_for_a_replay_is_said(
    connect: Connect, make_llm: Callable[..., LLM], caplog: pytest.LogCaptureFixture
) -> None:
    llm = make_llm()
    requester = connect(zmq.DEALER, publisher_of(llm).replay_endpoint)
    requester.send_multipart([b"", b"5"])
    assert replay(requester, 0) == []
    assert "not by a number of 8 bytes" in caplog.text


def test_batches_that_it_does_not_keep_up_with_are_dropped_and_missed(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sent: list[int] = []
    has_begun, may_send = threading.Event(), threading.Event()

    def send(publisher: KVEventPublisher, batch: Batch) -> None:
        has_begun.set()
        assert may_send.wait(WAIT_S)
        sent.append(batch.number)

    monkeypatch.setattr(KVEventPublisher, "_send", send)
    events = BlockEvents(4)
    publisher = KVEventPublisher(events, f"ipc://{tmp_path}/events", max_queued_batches=2)

    def change() -> None:
        events.cleared()
        publisher.flush()

    change()
    assert has_begun.wait(WAIT_S)
    for _ in range(5):  # two wait, and three are too many
        change()
    assert publisher.num_dropped_batches == 3
    assert caplog.text.count("KV events") == 1
    assert "2 batches wait to be sent, and batch 3 is dropped" in caplog.text
    may_send.set()
    until(lambda: len(sent) == 3)
    change()
    publisher.close()
    assert sent == [0, 1, 2, 6]
    assert publisher.num_dropped_batches == 3


def test_a_batch_that_cannot_be_sent_ends_nothing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sent: list[int] = []

    def send(publisher: KVEventPublisher, batch: Batch) -> None:
        if batch.number == 0:
            raise RuntimeError("no such luck")
        sent.append(batch.number)

    monkeypatch.setattr(KVEventPublisher, "_send", send)
    events = BlockEvents(4)
    publisher = KVEventPublisher(events, f"ipc://{tmp_path}/events")
    for _ in range(2):
        events.cleared()
        publisher.flush()
    publisher.close()
    assert sent == [1]
    assert "no such luck" in caplog.text


# --- how it begins and ends -----------------------------------------------------------------------


def publishing_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "kv-events"]


def test_closing_sends_what_waits_and_frees_the_port(
    connect: Connect, make_llm: Callable[..., LLM]
) -> None:
    llm = make_llm()
    publisher = publisher_of(llm)
    subscriber = connect(zmq.SUB, publisher.endpoint)

    def hears() -> bool:
        generate(llm, 3)
        llm.reset_prefix_cache()
        return bool(subscriber.poll(50))

    until(hears)  # the subscription has arrived
    for first in range(0, 40, 8):
        generate(llm, first)
    assert publisher._next_number >= 5
    publisher.close()
    while number_of(subscriber.recv_multipart()) < publisher._next_number - 1:
        pass
    publisher.close()
    assert publishing_threads() == []
    generate(llm, 20)  # goes on, and nothing heaps up
    assert publisher._events.take() == []
    KVEventPublisher(BlockEvents(4), publisher.endpoint.replace("0.0.0.0", "*")).close()


def test_an_engine_that_is_garbage_publishes_no_more() -> None:
    llm = make_mock_llm(enable_prefix_caching=True, kv_events_endpoint="tcp://*:*")
    generate(llm, 3)
    assert len(publishing_threads()) == 1
    del llm
    gc.collect()
    assert publishing_threads() == []


def test_an_engine_may_be_garbage_in_the_publishers_thread(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    closed = threading.Event()

    def send(publisher: KVEventPublisher, batch: Batch) -> None:
        publisher.close()
        closed.set()

    monkeypatch.setattr(KVEventPublisher, "_send", send)
    events = BlockEvents(4)
    publisher = KVEventPublisher(events, f"ipc://{tmp_path}/events")
    events.cleared()
    publisher.flush()
    assert closed.wait(WAIT_S)
    publisher.close()
    assert publishing_threads() == []


def test_a_program_ends_without_being_told_to_close(tmp_path: pathlib.Path) -> None:
    source = f"""
from tests.engine.mock_model import make_mock_llm
llm = make_mock_llm(enable_prefix_caching=True, kv_events_endpoint="ipc://{tmp_path}/events")
"""
    root = pathlib.Path(__file__).parent.parent.parent
    command = [sys.executable, "-W", "error", "-c", source]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_nothing_is_told_unless_it_is_asked_for() -> None:
    llm = make_mock_llm(enable_prefix_caching=True)
    assert llm.kv_events is None
    assert llm.engine.core.observers == []
    assert llm.engine.memory.prefix_cache.listener is None
    assert publishing_threads() == []


def test_a_port_that_is_taken_is_named() -> None:
    first = KVEventPublisher(BlockEvents(4), "tcp://*:*")
    taken = first.endpoint.replace("0.0.0.0", "*")
    with pytest.raises(ValueError, match=r"^kv_events_endpoint='tcp://.* cannot be used: Addr"):
        KVEventPublisher(BlockEvents(4), taken)
    with pytest.raises(ValueError, match=r"^kv_events_replay_endpoint='tcp://.* cannot be used"):
        KVEventPublisher(BlockEvents(4), "tcp://*:*", replay_endpoint=taken)
    assert len(publishing_threads()) == 1
    first.close()


def test_it_connects_to_a_router_that_waits() -> None:
    context = zmq.Context()
    router = context.socket(zmq.SUB)
    router.rcvtimeo = 1000 * WAIT_S
    router.subscribe(b"")
    endpoint = f"tcp://127.0.0.1:{router.bind_to_random_port('tcp://127.0.0.1')}"
    events = BlockEvents(4)
    publisher = KVEventPublisher(events, endpoint)
    assert publisher.endpoint == endpoint

    def hears() -> bool:
        events.cleared()
        publisher.flush()
        return bool(router.poll(50))

    until(hears)
    topic, _, payload = router.recv_multipart()
    assert (topic, msgspec.msgpack.decode(payload)[1]) == (b"", [["AllBlocksCleared"]])
    publisher.close()
    context.destroy(linger=0)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zmq", None)
    with pytest.raises(ImportError, match=r"pip install 'pallas-paged\[serve\]'"):
        KVEventPublisher(BlockEvents(4), "tcp://*:*")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_events_endpoint": 5557}, "kv_events_endpoint=5557 must be like 'tcp://"),
        ({"kv_events_endpoint": "*:5557"}, "kv_events_endpoint='*:5557' must be like 'tcp://"),
        (
            {"kv_events_endpoint": "tcp://*:1", "kv_events_replay_endpoint": ""},
            "kv_events_replay_endpoint='' must be like 'tcp://",
        ),
        (
            {"kv_events_endpoint": "tcp://*:1", "enable_prefix_caching": False},
            "kv_events_endpoint='tcp://*:1' tells of cached blocks, and there are none",
        ),
        ({"kv_events_topic": b"x"}, "kv_events_topic=b'x' must be a string"),
        ({"kv_events_topic": "x"}, "kv_events_topic='x' needs a socket; set kv_events_endpoint"),
        (
            {"kv_events_replay_endpoint": "tcp://*:1"},
            "kv_events_replay_endpoint='tcp://*:1' needs a socket; set kv_events_endpoint",
        ),
        ({"kv_events_buffer_steps": 0}, "kv_events_buffer_steps=0 must be an integer >= 1"),
        (
            {"kv_events_endpoint": "tcp://*:1", "kv_events_buffer_steps": 7},
            "kv_events_buffer_steps=7 needs a socket for replays; set kv_events_replay_endpoint",
        ),
    ],
)
def test_a_wrong_option_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        EngineConfig("model", **options)
    assert message in str(error.value)
