"""The outputs of one request on their way to the coroutine that waits for them."""

import asyncio
from collections.abc import AsyncIterator, Callable

from pallas_paged.engine.outputs import RequestOutput


class RequestStream(AsyncIterator[RequestOutput]):
    """Yields a request's outputs; the last one has `finished` set, and nothing comes behind it.

    A reader that is slow finds one output at most: deltas that it has not fetched become one delta,
    and of all so far the latest is kept. All of it belongs to the thread of its event loop.

    Attributes:
      request_id: the request's.
      error: what ended it without a last output; also raised to the reader, once what came before
        has been read.
    """

    def __init__(self, request_id: str, *, is_delta: bool, leave: Callable[[str], None]):
        """`leave` is called with the id, once, if the reader goes before the end."""
        self.request_id = request_id
        self.error: BaseException | None = None
        self._is_delta = is_delta
        self._leave = leave
        # What has not been fetched, each with the number of outputs that it was made of: fewer than
        # the one before. To put all into one at once would copy it for every token.
        self._pending: list[tuple[int, RequestOutput]] = []
        self._is_over = False  # nothing more is put in
        self._is_read = False  # the reader has had the end, or has gone
        self._waiter: asyncio.Future[None] | None = None

    @property
    def is_over(self) -> bool:
        """Whether the request has ended, be it that its reader has not read that yet."""
        return self._is_over

    def put(self, output: RequestOutput) -> None:
        """Hands an output to the reader."""
        if self._is_over:
            return
        self._is_over = output.finished
        if self._pending and not self._is_delta:
            self._pending.clear()
        size = 1
        while self._pending and self._pending[-1][0] <= size:
            earlier_size, earlier = self._pending.pop()
            output = earlier.merged_with(output)
            size += earlier_size
        self._pending.append((size, output))
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def fail(self, error: BaseException) -> None:
        """Ends the request with an error."""
        if not self._is_over:
            self.error, self._is_over = error, True
            self._wake()

    async def __anext__(self) -> RequestOutput:
        """Returns the next output; waits for it.

        Raises:
          EngineError: the request ended without a last output.
          RuntimeError: another coroutine waits already.
        """
        while not self._pending:
            if self._is_read:
                raise StopAsyncIteration
            if self.error is not None:
                self._is_read = True
                raise self.error
            if self._waiter is not None:
                raise RuntimeError(f"request {self.request_id!r} has another reader already")
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        _, output = self._pending.pop()
        while self._pending:
            output = self._pending.pop()[1].merged_with(output)
        self._is_read |= output.finished
        return output

    async def aclose(self) -> None:
        """Ends the reading; a request that has not ended is aborted, and its blocks are freed."""
        self.close()

    def close(self) -> None:
        """Does what `aclose` does, where nothing can be awaited."""
        is_early, self._is_read = not self._is_over, True
        self._pending.clear()
        if is_early:
            self._is_over = True
            self._leave(self.request_id)
            self._wake()

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is None or waiter.done() or waiter.get_loop().is_closed():
            return  # nobody waits, or nobody can be woken any more
        waiter.set_result(None)
