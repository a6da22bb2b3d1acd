"""Forms behind reasoning: what they allow is what the form alone allows."""

import pytest

from pallas_paged.engine.serve.parsers.chat_parser import ChatParser
from pallas_paged.engine.serve.parsers.events import fold
from pallas_paged.engine.serve.parsers.reasoning import ThinkParser
from pallas_paged.engine.serve.parsers.thinking import after_thinking
from pallas_paged.engine.structured_outputs import StructuredOutputsParams
from tests.engine.serve.test_parsers_grammar import Device

CASES = [
    # fields, texts that have the form, texts that have not
    ({"json": {"const": {"ü": "/"}}}, ['{"ü": "/"}', '{ "ü":"/"}'], ["{}", ""]),
    ({"json": {"enum": [1, "</think>"]}}, ["1", '"</think>"'], ["2"]),
    ({"json": {"enum": [[1]]}, "disable_any_whitespace": True}, ["[1]"], ["[ 1]"]),
    ({"json": {"enum": [[1]]}, "whitespace_pattern": "[ ]?"}, ["[ 1]", "[1]"], ["[  1]"]),
    ({"json_object": True}, ["{}", '{"a": []}'], ["[]", "1"]),
    ({"regex": r"a/b\/[/]+|\\x\d"}, ["a/b//", "a/b///", "\\x1"], ["a/b", "\\\\x1"]),
    ({"regex": "(?i)a\nb"}, ["a\nB"], ["ab"]),
    ({"regex": "(?s:.*)"}, ["", "a\nb", "</think>"], []),
    ({"regex": ""}, [""], ["a"]),
    ({"choice": ["a|b", 'c"\\\n', "ü /*"]}, ["a|b", 'c"\\\n', "ü /*"], ["a", "b", ""]),
    ({"grammar": 'start: "}" text  # }\ntext: /[a-c]+/ %json {"const": 1}'}, ["}abc1"], ["}1"]),
    ({"grammar": 'start: thinking answer\nthinking: "x"\nanswer: "y"'}, ["xy"], ["y"]),
]


@pytest.fixture(scope="module", params=[None, False, True], ids=["spelled", "added", "special"])
def device(request):
    return Device(request.param)


@pytest.mark.parametrize(("fields", "good", "bad"), CASES)
@pytest.mark.parametrize("newlines", ["", "\n", "\n\n"])
def test_reasoning_ends_first_and_the_form_follows(fields, good, bad, newlines, device):
    grammar = after_thinking(StructuredOutputsParams(**fields), device.marker_ids).grammar
    begin = f"So <thin\n</b> {{}}</think>{newlines}"
    for text in good:
        if device.marker_ids and "</think>" in text:
            continue  # as a token of its own it is no text
        assert device.accepts_in_full(grammar, begin + text), text
        parser = ChatParser(ThinkParser(starts_inside=True))
        found = fold(parser.feed(begin + text) + parser.finish())
        assert (found.reasoning, found.content) == ("So <thin\n</b> {}", text or None)
    for text in bad:
        assert not device.accepts_in_full(grammar, begin + text), text
    for text in good:
        assert "</think>" in text or not device.accepts_in_full(grammar, text), text
    assert not device.accepts_in_full(grammar, "So")


@pytest.mark.parametrize(
    "fields", [{"regex": "a)(b"}, {"regex": "\\"}, {"grammar": 'start: "a" }'}]
)
def test_what_is_no_form_is_none_behind_reasoning(fields, device):
    grammar = after_thinking(StructuredOutputsParams(**fields), device.marker_ids).grammar
    with pytest.raises(AssertionError):
        device.accepts(grammar, [])
