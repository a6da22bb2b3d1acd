"""Stop strings in streamed text against `str.find` on the whole text."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_paged.engine.text.stop import StopMatcher

letters = st.text("ab", max_size=30)
stop_strings = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)


def expected(text: str, stop: list[str], include: bool) -> tuple[str, str | None]:
    """Returns the text up to the match that completes first, and of equal ones starts first."""
    matches = [(text.find(s) + len(s), text.find(s), s) for s in stop if s in text]
    if not matches:
        return text, None
    end, start, found = min(matches)
    return text[: end if include else start], found


@settings(deadline=None, max_examples=500)
@given(text=letters, cuts=st.lists(st.integers(0, 30)), stop=stop_strings, include=st.booleans())
def test_any_pieces_give_what_the_whole_text_gives(text, cuts, stop, include):
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    matcher = StopMatcher(stop, include_stop_str=include)
    out, taken = "", 0
    for start, end in itertools.pairwise(borders):
        out += matcher.append(text[start:end])
        taken = end
        if matcher.stop_reason is None:
            held = max((len(s) for s in stop), default=1) - 1
            assert out == text[: max(taken - held, 0)]
    out += matcher.finish()
    assert (out, matcher.stop_reason) == expected(text, stop, include)


@settings(deadline=None, max_examples=500)
@given(
    text=letters, cut=st.integers(0, 30), sizes=st.lists(st.integers(1, 5), max_size=9),
    stop=stop_strings, include=st.booleans(),
)  # fmt: skip
def test_none_ends_in_what_is_skipped_but_one_may_begin_there(text, cut, sizes, stop, include):
    matcher, out = StopMatcher(stop, include_stop_str=include), ""
    cut = min(cut, len(text))
    borders = [cut, *(min(cut + end, len(text)) for end in itertools.accumulate(sizes)), len(text)]
    out += matcher.skip(text[: cut // 2]) + matcher.skip(text[cut // 2 : cut])
    for start, end in itertools.pairwise(borders):
        out += matcher.append(text[start:end])
    out += matcher.finish()
    ends = [
        (start + len(s), start, s)
        for s in stop
        for start in range(len(text))
        if text.startswith(s, start) and start + len(s) > cut
    ]
    end, start, found = min(ends, default=(len(text), len(text), None))
    assert (out, matcher.stop_reason) == (text[: end if include else start], found)


@settings(deadline=None)
@given(text=letters, stop=stop_strings)
def test_it_stops_with_the_character_that_completes_a_stop_string(text, stop):
    matcher = StopMatcher(stop)
    for i, character in enumerate(text):
        matcher.append(character)
        assert (matcher.stop_reason is not None) == any(s in text[: i + 1] for s in stop)


def test_nothing_follows_a_stop_string():
    matcher = StopMatcher(["\n\n"])
    assert matcher.append("one\n\ntwo") == "one"
    assert matcher.append("three") == ""
    assert matcher.finish() == ""
    assert matcher.stop_reason == "\n\n"


@pytest.mark.parametrize(
    ("stop", "found", "text"),
    [
        (["cd", "abcde"], "cd", "xxab"),  # completes first, though it starts later
        (["bc", "abc"], "abc", "xx"),  # both complete with c: the one that starts first
        (["abc", "bc"], "abc", "xx"),
    ],
)
def test_which_of_several_counts(stop, found, text):
    matcher = StopMatcher(stop)
    assert matcher.append("xxabcdef") == text
    assert matcher.stop_reason == found


def test_without_stop_strings_nothing_is_held_back():
    assert StopMatcher([]).append("text") == "text"
    assert StopMatcher(["."]).append("text") == "text"
