"""Texts in pieces, and what parsers make of them."""

import itertools
from collections.abc import Callable, Iterator, Sequence

from pallas_paged.engine.serve.parsers.chat_parser import ChatParser
from pallas_paged.engine.serve.parsers.events import Event, ParsedMessage, fold


def pieces_at(text: str, cuts: Sequence[int]) -> list[str]:
    borders = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(borders)]


def in_two(text: str) -> Iterator[list[str]]:
    for cut in range(len(text) + 1):
        yield [text[:cut], text[cut:]]


def events_of(parser: ChatParser, pieces: Sequence[str]) -> list[Event]:
    events = [event for piece in pieces for event in parser.feed(piece)]
    return events + parser.finish()


def check_all_cuts(make: Callable[[], ChatParser], text: str) -> ParsedMessage:
    """Returns what a text is, which is the same in pieces."""
    whole = fold(events_of(make(), [text]))
    with_empty_ones = [piece for character in text for piece in (character, "")]
    for pieces in [*in_two(text), list(text), with_empty_ones]:
        assert fold(events_of(make(), pieces)) == whole, pieces
    return whole


def numbered_ids() -> Callable[[], str]:
    count = itertools.count()
    return lambda: f"call_{next(count)}"
