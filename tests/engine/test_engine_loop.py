"""The thread of the steps, and how what it tells comes to an event loop."""

import asyncio
import gc
import threading
from typing import Any

import pytest

from pallas_paged.engine.engine_loop import EngineLoop, Event, Failed, Gone, Refused
from pallas_paged.engine.errors import EngineDeadError
from pallas_paged.engine.hand_over import HandOver
from tests.engine.async_serving import PATIENCE_S
from tests.engine.mock_model import make_parts


def add(loop: EngineLoop, name: str) -> None:
    def make_group() -> Any:
        raise ValueError("no such request")

    loop.add(name, make_group)


class TestTheEnd:
    @pytest.fixture
    def told(self) -> list[Event]:
        return []

    def test_changes_that_come_too_late_are_answered_in_their_order(
        self, told: list[Event]
    ) -> None:
        """Those that were waiting first, whatever another thread asks for meanwhile."""
        parts, others = make_parts(), list[threading.Thread]()

        def deliver(event: Event) -> None:
            if isinstance(event, Refused) and not others:
                other = threading.Thread(target=loop.leave, args=("b",))
                others.append(other)
                other.start()
                other.join(0.05)
            told.append(event)

        loop = EngineLoop(parts.core, deliver)
        loop.call(lambda: setattr(loop, "_is_stopping", True))
        add(loop, "a")
        add(loop, "b")
        loop.start()
        assert loop.stop(PATIENCE_S)
        others[0].join(PATIENCE_S)
        assert [(type(event), event[0]) for event in told] == [
            (Refused, "a"),
            (Refused, "b"),
            (Gone, "b"),
        ]

    def test_every_change_is_answered_after_it(self, told: list[Event]) -> None:
        loop = EngineLoop(make_parts().core, told.append)
        loop.start()
        assert loop.stop(PATIENCE_S)
        add(loop, "a")
        loop.leave("b")
        loop.abort("c")
        loop.finish("d", 0, "x")
        with pytest.raises(EngineDeadError):
            loop.call(lambda: 3).result(PATIENCE_S)
        assert loop.stop(PATIENCE_S)
        refused, gone = told
        assert isinstance(refused, Refused)
        assert isinstance(refused.error, EngineDeadError)
        assert gone == Gone("b")
        assert not loop.is_running
        assert loop.death is None

    def test_an_error_is_told_before_what_it_drops(
        self, told: list[Event], caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(60)

        def die() -> None:
            raise SystemExit

        loop = EngineLoop(make_parts().core, told.append)
        loop._inbox.put(type(_some_change(loop))(die, lambda: None))
        add(loop, "a")
        loop.start()
        assert loop.stop(PATIENCE_S)
        failed, refused = told
        assert isinstance(failed, Failed)
        assert failed.is_dead
        assert failed.error is loop.death
        assert isinstance(refused, Refused)
        assert refused.error.__cause__ is loop.death


def _some_change(loop: EngineLoop) -> Any:
    loop.finish("nobody", 0, "x")
    return loop._inbox.get()


class Taker:
    """Keeps what it takes; fails on what is odd, if told so."""

    def __init__(self) -> None:
        self.taken: list[int] = []
        self.fails = False

    def take(self, item: int) -> None:
        if self.fails and item % 2:
            raise ZeroDivisionError
        self.taken.append(item)


class TestHandingOver:
    def test_everything_comes_in_order_whenever_it_is_put_in(self) -> None:
        taker, count = Taker(), 20_000
        hand_over = HandOver(taker.take)

        def put() -> None:
            for item in range(count):
                hand_over.put(item)

        async def main() -> None:
            thread = threading.Thread(target=put)
            thread.start()
            hand_over.bind(asyncio.get_running_loop())
            async with asyncio.timeout(PATIENCE_S):
                while len(taker.taken) < count:
                    await asyncio.sleep(0)
            thread.join()

        asyncio.run(main())
        assert taker.taken == list(range(count))

    def test_one_wake_up_may_bring_many(self) -> None:
        taker = Taker()
        hand_over = HandOver(taker.take)

        async def main() -> None:
            event_loop = asyncio.get_running_loop()
            hand_over.bind(event_loop)
            calls, schedule = list[Any](), event_loop.call_soon_threadsafe
            event_loop.call_soon_threadsafe = lambda *args: calls.append(schedule(*args))  # type: ignore[assignment,func-returns-value,method-assign]
            for item in range(5):
                hand_over.put(item)
            await asyncio.sleep(0)
            assert (taker.taken, len(calls)) == (list(range(5)), 1)

        asyncio.run(main())

    def test_what_comes_while_an_event_loop_is_closed_is_kept_for_the_next(self) -> None:
        taker = Taker()
        hand_over = HandOver(taker.take)

        async def main(last: int) -> None:
            hand_over.bind(asyncio.get_running_loop())
            hand_over.put(last)
            await asyncio.sleep(0)

        hand_over.put(0)
        asyncio.run(main(1))
        hand_over.put(2)
        asyncio.run(main(3))
        assert taker.taken == [0, 1, 2, 3]

    def test_what_stands_behind_an_item_that_fails_comes(self) -> None:
        taker, failures = Taker(), list[Any]()
        hand_over = HandOver(taker.take)

        async def main() -> None:
            event_loop = asyncio.get_running_loop()
            event_loop.set_exception_handler(lambda _, context: failures.append(context))
            hand_over.bind(event_loop)
            taker.fails = True
            for item in range(6):
                hand_over.put(item)
            for _ in range(6):
                await asyncio.sleep(0)

        asyncio.run(main())
        assert (taker.taken, len(failures)) == ([0, 2, 4], 3)

    def test_what_comes_while_items_are_taken_lets_others_have_their_turn(self) -> None:
        class Endless(Taker):
            def take(self, item: int) -> None:
                super().take(item)
                if item < 100:
                    hand_over.put(item + 1)

        taker, turns = Endless(), list[int]()
        hand_over = HandOver(taker.take)

        async def main() -> None:
            hand_over.bind(asyncio.get_running_loop())
            hand_over.put(0)
            while len(taker.taken) < 100:
                await asyncio.sleep(0)
                turns.append(len(taker.taken))

        asyncio.run(main())
        assert len(turns) >= 99

    def test_it_keeps_nobody_alive(self) -> None:
        taker = Taker()
        hand_over, taken = HandOver(taker.take), taker.taken
        del taker
        gc.collect()
        hand_over.put(1)
        asyncio.run(_bind(hand_over))
        assert not taken


async def _bind(hand_over: HandOver[int]) -> None:
    hand_over.bind(asyncio.get_running_loop())
