"""How many requests may wait for an engine, and when who is refused may come again."""

import collections
import math
import time

from pallas_paged.engine.errors import EngineOverloadedError

_NUM_TIMES = 32
_MAX_RETRY_AFTER_S = 60


class QueueLimit:
    """Refuses requests when as many wait as may.

    Args:
      max_queued_requests: so many may.
    """

    def __init__(self, max_queued_requests: int) -> None:
        """Has seen no request end yet."""
        self._max_queued_requests = max_queued_requests
        self._finish_times: collections.deque[float] = collections.deque(maxlen=_NUM_TIMES)

    def note_finished(self) -> None:
        """Notes that a request has ended now."""
        self._finish_times.append(time.monotonic())

    def check(self, num_waiting: int) -> None:
        """Raises `EngineOverloadedError` if one more than these may not wait."""
        if num_waiting >= self._max_queued_requests:
            raise EngineOverloadedError(
                f"{num_waiting} requests wait already, and max_queued_requests="
                f"{self._max_queued_requests}; try again later",
                self.retry_after_s,
            )

    @property
    def retry_after_s(self) -> int:
        """Seconds in which one more request ends, as the last ones did; from 1 to 60."""
        times = self._finish_times
        if len(times) < 2:
            return 1
        seconds = math.ceil((times[-1] - times[0]) / (len(times) - 1))
        return min(max(1, seconds), _MAX_RETRY_AFTER_S)
