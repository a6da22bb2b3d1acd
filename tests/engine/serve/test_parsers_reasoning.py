"""Reasoning and answers divided, whatever pieces the text comes in."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_paged.engine.serve.parsers.chat_parser import ChatParser
from pallas_paged.engine.serve.parsers.events import ContentDelta, ReasoningDelta, fold
from pallas_paged.engine.serve.parsers.reasoning import (
    REASONING_PARSERS,
    ThinkParser,
    starts_inside,
)
from tests.engine.serve.cutting import check_all_cuts, events_of, pieces_at

CASES = [
    # starts inside, text, reasoning, content
    (False, "<think>\nWhy?\n</think>\n\nSo.", "Why?\n", "So."),
    (False, " \n<think>Why?</think> So.", "Why?", " So."),
    (False, "So.", None, "So."),
    (False, "", None, None),
    (False, "  \n", None, "  \n"),
    (False, "  So.\n", None, "  So.\n"),
    (False, "<think>\nWhy", "Why", None),
    (False, "<think>", None, None),
    (False, "<think>Why?</thi", "Why?</thi", None),
    (False, "<thi", None, "<thi"),
    (False, "<thinking>", None, "<thinking>"),
    (False, "<think>\n\n</think>\n\nSo.", None, "So."),
    (False, "<think></think>", None, None),
    (False, "So <think>why?</think>.", None, "So <think>why?</think>."),
    (False, "So</think>.", None, "So</think>."),
    (False, "<think>a</think>\nb<think>c</think>d", "a", "b<think>c</think>d"),
    (False, "<think>a <think> </b> </</think>\n\n\nb\n", "a <think> </b> </", "b\n"),
    (True, "Why?</think>\n\nSo.", "Why?", "So."),
    (True, "\nWhy?</think>So.", "Why?", "So."),
    (True, "\n<think>\nWhy?</think>So.", "Why?", "So."),
    (True, "\n\n</think>\n\nSo.", None, "So."),
    (True, "</think>", None, None),
    (True, "Why", "Why", None),
    (True, "\n  Why", "  Why", None),
    (True, "\n<thi", "<thi", None),
    (True, "\n\n", None, None),
    (True, "Why?</think", "Why?</think", None),
]


@pytest.mark.parametrize(("inside", "text", "reasoning", "content"), CASES)
def test_a_text_is_divided_wherever_it_is_cut(inside, text, reasoning, content):
    found = check_all_cuts(lambda: ChatParser(ThinkParser(starts_inside=inside)), text)
    assert found == (content, reasoning, [])


def divided(text, inside):
    """Returns content and reasoning of a whole text."""
    opening = re.match(r"\s*<think>", text)
    if opening is None and not inside:
        return text or None, None
    block, _, content = text[opening.end() if opening else 0 :].partition("</think>")
    return content.lstrip("\n") or None, block.lstrip("\n") or None


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.sampled_from(["<think>", "</think>", "<", "</", "think>", "\n", " ", "a"])),
    st.lists(st.integers(0, 60), max_size=9),
    st.booleans(),
)
def test_pieces_do_not_matter(parts, cuts, inside):
    text = "".join(parts)
    for pieces in ([text], text, pieces_at(text, cuts)):
        found = fold(events_of(ChatParser(ThinkParser(starts_inside=inside)), pieces))
        assert found == (*divided(text, inside), [])


def test_text_is_given_out_at_once_where_it_can_be_no_tag():
    parser = ThinkParser()
    assert parser.feed("<think>") == []
    assert parser.feed("\n") == []
    assert parser.feed("Wh") == [ReasoningDelta("Wh")]
    assert parser.feed("y <") == [ReasoningDelta("y ")]
    assert parser.feed("/b>") == [ReasoningDelta("</b>")]
    assert parser.feed("\n") == [ReasoningDelta("\n")]
    assert parser.feed("</think>\n") == []
    assert parser.feed("\nSo <") == [ContentDelta("So <")]
    assert parser.finish() == []


@pytest.mark.parametrize(
    ("prompt", "inside"),
    [
        ("<|im_start|>assistant\n<think>\n", True),
        ("<|Assistant|><think>", True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("<|im_start|>assistant\n", False),
        ("<|im_start|>user\n<think><|im_end|>\n<|im_start|>assistant\n", False),
        ("", False),
    ],
)
def test_whether_an_answer_begins_inside(prompt, inside):
    assert starts_inside(prompt) is inside


def test_the_names_of_the_parsers():
    assert set(REASONING_PARSERS) == {"think", "deepseek_r1", "qwen3"}
