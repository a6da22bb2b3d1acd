"""A buddy allocator: pieces of powers of two, split and joined in pairs (Knuth, TAOCP 1, 2.5).

It gives out what Orca's KV cache is taken to be cut into (Kwon et al. 2023, section 6.1). Of free
pieces that are large enough the smallest is taken, and of equal ones the first.
"""

import bisect


class Buddies:
    """Free pieces of an arena of `num_units` units.

    An arena whose size is no power of two is made of several that are, largest first.
    """

    def __init__(self, num_units: int) -> None:
        """Starts with everything free."""
        assert num_units > 0
        self.num_units = num_units
        self._free: dict[int, list[int]] = {}
        self._tops: list[int] = []
        begin = 0
        for order in reversed(range(num_units.bit_length())):
            self._free[order] = []
            if num_units >> order & 1:
                self._free[order].append(begin)
                self._tops.append(begin)
                begin += 1 << order

    @property
    def num_free(self) -> int:
        """Free units, in whatever pieces."""
        return sum(len(begins) << order for order, begins in self._free.items())

    def take(self, num_units: int) -> int | None:
        """Takes the smallest piece of at least so many units, and returns where it begins."""
        wanted = order_of(num_units)
        orders = [order for order, begins in self._free.items() if begins and order >= wanted]
        if not orders:
            return None
        order = min(orders)
        begin = self._free[order].pop(0)
        while order > wanted:
            order -= 1
            bisect.insort(self._free[order], begin + (1 << order))
        return begin

    def give_back(self, begin: int, num_units: int) -> None:
        """Frees what `take` returned for so many units, and joins it with free buddies."""
        order = order_of(num_units)
        top = self._top_of(begin)
        while True:
            buddy = top + ((begin - top) ^ (1 << order))
            if buddy not in self._free.get(order, ()) or self._top_of(buddy) != top:
                break  # a piece that was one from the start has no buddy
            self._free[order].remove(buddy)
            begin, order = min(begin, buddy), order + 1
        bisect.insort(self._free[order], begin)

    def _top_of(self, begin: int) -> int:
        return self._tops[bisect.bisect_right(self._tops, begin) - 1]

    def copy(self) -> "Buddies":
        """Returns the same pieces, to try something with."""
        other = Buddies(self.num_units)
        other._free = {order: list(begins) for order, begins in self._free.items()}
        return other


def order_of(num_units: int) -> int:
    """Returns the smallest power of two that so many units fit into, as an exponent."""
    assert num_units > 0
    return (num_units - 1).bit_length()
