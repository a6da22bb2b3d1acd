"""Rows of values of which every two meet: what a product of all of them would take too long for."""

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_TRIES = 30
_LAST_TRIES = 1000


def covering(
    factors: Mapping[str, Sequence[Any]], is_allowed: Callable[[dict[str, Any]], bool]
) -> list[dict[str, Any]]:
    """Returns rows of one value of each factor, in which every two values are together once.

    Greedy, and the same every time: each row is made for the first two values that have not met,
    and is the one of some tries in which most meet for the first time.

    Args:
      factors: the values by name.
      is_allowed: whether a row can be; two values that no allowed row was found for are left out.
    """
    rng = random.Random(0)  # random() gives the same numbers in every version of Python

    def choose(values: Sequence[Any]) -> Any:
        return values[int(rng.random() * len(values))]

    missing = dict.fromkeys(
        frozenset({(one, a), (other, b)})
        for one, other in itertools.combinations(factors, 2)
        for a in factors[one]
        for b in factors[other]
    )

    def complete(pair: frozenset[tuple[str, Any]], is_greedy: bool) -> dict[str, Any]:
        row = dict(sorted(pair, key=lambda item: list(factors).index(item[0])))
        others = sorted((name for name in factors if name not in row), key=lambda _: rng.random())
        for name in others:
            gains = {
                value: sum(frozenset({(name, value), item}) in missing for item in row.items())
                for value in factors[name]
            }
            most = max(gains.values()) if is_greedy else 0
            row[name] = choose([value for value in gains if gains[value] >= most])
        return row

    rows = []
    while missing:
        pair = next(iter(missing))
        tries = [complete(pair, is_greedy=True) for _ in range(_TRIES)]
        tries = [row for row in tries if is_allowed(row)]
        if not tries:
            some = (complete(pair, is_greedy=False) for _ in range(_LAST_TRIES))
            tries = list(itertools.islice(filter(is_allowed, some), 1))
        if not tries:
            del missing[pair]
            continue
        row = max(tries, key=lambda row: len(pairs(row) & missing.keys()))
        missing = {pair: None for pair in missing if pair not in pairs(row)}
        rows.append({name: row[name] for name in factors})
    return rows


def pairs(row: Mapping[str, Any]) -> set[frozenset[tuple[str, Any]]]:
    """Returns every two values of a row."""
    return set(map(frozenset, itertools.combinations(row.items(), 2)))
