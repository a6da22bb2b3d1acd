"""Chooses the replica of a request: one that has its prompt's prefix cached, else the least loaded.

As other routers do, this one remembers which prompts it sent where, and takes that for what is
cached there: vLLM's production stack has a trie of hashed pieces of text for it, SGLang's
cache-aware router and Ray's `PrefixCacheAffinityRouter` trees of text. Here it is hashes of full
blocks of tokens, each chained to the one before: a block is found only behind the same prefix.

A replica's load is the number of its requests that have not ended, as in SGLang's and Ray's: how
many tokens a request will make is not known before, and steps of decoding cost by sequences.
"""

import collections
from collections.abc import Iterable, Sequence

MIN_MATCH_RATE = 0.1
"""Of a prompt's full blocks, the share to find at a replica that is to be preferred for them, as in
Ray's router. SGLang's asks for 0.5. What all prompts begin with is no reason to send all of them to
one replica."""
MAX_AHEAD = 10
"""Requests that a preferred replica may have more than the least loaded one."""
MAX_RATIO = 1.5
"""How many times as many it may have. It is passed over where both bounds are broken, as SGLang's
router does (32 and 1.0001): 10 more are a lot beside 2, and little beside 100."""


def block_hashes(token_ids: Sequence[int], block_size: int, salt: str | None = None) -> list[int]:
    """Returns a hash for each full block of a prompt: of its tokens and of all that is before.

    Args:
      token_ids: the prompt's.
      block_size: tokens of a block, at least 1.
      salt: the request's `cache_salt`; blocks of prompts with different ones are different.
    """
    ids = tuple(token_ids)
    parent, hashes = hash(salt), []
    for end in range(block_size, len(ids) + 1, block_size):
        parent = hash((parent, ids[end - block_size : end]))
        hashes.append(parent)
    return hashes


class PrefixRouter:
    """Remembers which blocks were sent to which replica. The same calls give the same choices.

    Args:
      num_replicas: they are called 0, 1, ...
      max_blocks: the most that are remembered; those that were sent the longest ago are forgotten.
        As many as the replicas' pools hold are enough: what is older is cached no more.

    Attributes:
      num_blocks: of each replica, the remembered blocks.

    Raises:
      ValueError: one of the numbers is below 1.
    """

    def __init__(self, num_replicas: int, max_blocks: int) -> None:
        for name, value in (("num_replicas", num_replicas), ("max_blocks", max_blocks)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self.num_blocks = [0] * num_replicas
        self._max_blocks = max_blocks
        # By hash the replicas that it was sent to, a bit each; the latest block is last.
        self._holders: collections.OrderedDict[int, int] = collections.OrderedDict()

    def choose(self, hashes: Sequence[int], loads: Sequence[int | None]) -> int:
        """Returns the replica for a prompt; remembers nothing.

        Of those that know the longest prefix, it is the least loaded one, unless its load is too
        high or the prefix too short; else the least loaded of all. Of several with this load it
        is the one with the fewest blocks, then the first.

        Args:
          hashes: `block_hashes` of the prompt.
          loads: of each replica; None of one that takes no requests, which is not chosen.

        Raises:
          ValueError: none takes any.
        """
        able = {replica: load for replica, load in enumerate(loads) if load is not None}
        if not able:
            raise ValueError("no replica takes requests")

        def rank(replica: int) -> tuple[int, int, int]:
            return able[replica], self.num_blocks[replica], replica

        idlest = min(able, key=rank)
        holders, num_known = self._longest_prefix(hashes, able.keys())
        if not num_known or num_known < MIN_MATCH_RATE * len(hashes):
            return idlest
        preferred = min(holders, key=rank)
        least, load = able[idlest], able[preferred]
        return idlest if load > least + MAX_AHEAD and load > least * MAX_RATIO else preferred

    def note(self, hashes: Sequence[int], replica: int) -> None:
        """Remembers that a prompt was sent to a replica."""
        bit = 1 << replica
        for one in reversed(hashes):  # a block is forgotten before what it stands behind
            holders = self._holders.pop(one, 0)
            self.num_blocks[replica] += not holders & bit
            self._holders[one] = holders | bit
        while len(self._holders) > self._max_blocks:
            _, holders = self._holders.popitem(last=False)
            for index in range(len(self.num_blocks)):
                self.num_blocks[index] -= holders >> index & 1

    def clear(self) -> None:
        """Forgets all."""
        self._holders.clear()
        self.num_blocks = [0] * len(self.num_blocks)

    def __len__(self) -> int:
        """How many blocks are remembered."""
        return len(self._holders)

    def _longest_prefix(self, hashes: Sequence[int], able: Iterable[int]) -> tuple[list[int], int]:
        """Returns which of these replicas know the most first blocks, and how many."""
        holders, num_known = sum(1 << replica for replica in able), 0
        for one in hashes:
            still = holders & self._holders.get(one, 0)
            if not still:
                break
            holders, num_known = still, num_known + 1
        return [i for i in range(len(self.num_blocks)) if holders >> i & 1], num_known
