"""Calls of tools found in an answer's text, whatever pieces it comes in."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_paged.engine.serve.parsers.chat_parser import ChatParser
from pallas_paged.engine.serve.parsers.events import (
    ArgumentsDelta,
    CallBegins,
    ContentDelta,
    ReasoningDelta,
    ToolCall,
    fold,
    random_call_id,
)
from pallas_paged.engine.serve.parsers.formats import (
    HERMES,
    LLAMA3_JSON,
    TOOL_PARSERS,
    choose_format,
)
from pallas_paged.engine.serve.parsers.markers import MarkerFilter
from pallas_paged.engine.serve.parsers.reasoning import ThinkParser
from pallas_paged.engine.serve.parsers.tools import ToolParser
from tests.engine.serve.cutting import check_all_cuts, events_of, numbered_ids, pieces_at
from tests.engine.serve.test_parsers_json import objects

TOOLS = ("f", "g")


def chat(tool_format, names=TOOLS, *, think=False, dropped=(), **options):
    tools = ToolParser(tool_format, names, new_id=numbered_ids(), **options)
    return ChatParser(ThinkParser() if think else None, tools, dropped_markers=dropped)


def numbered(calls):
    return [ToolCall(f"call_{i}", name, arguments) for i, (name, arguments) in enumerate(calls)]


def hermes(body):
    return f"<tool_call>\n{body}\n</tool_call>"


F = '{"name": "f", "arguments": {"a": 1}}'
G = '{"name": "g", "arguments": {}}'
F_CALL, G_CALL = ("f", '{"a": 1}'), ("g", "{}")
LLAMA_F, LLAMA_G = F.replace("arguments", "parameters"), G.replace("arguments", "parameters")
TAG = "<|python_tag|>"

CALLS = [
    # format, text, content, calls
    (HERMES, hermes(F), None, [F_CALL]),
    (HERMES, f"\n\n{hermes(F)}\n", None, [F_CALL]),
    (HERMES, f"Hi.\n{hermes(F)}\n{hermes(G)}\nBye.", "Hi.\n\nBye.", [F_CALL, G_CALL]),
    (HERMES, hermes(F) + hermes(G) + hermes(F), None, [F_CALL, G_CALL, F_CALL]),
    (HERMES, f"<tool_call>{F}</tool_call>", None, [F_CALL]),
    (HERMES, f"<tool_call>\n{F}", None, [F_CALL]),  # no closing marker
    (HERMES, f"<tool_call>\n{F}\n</tool", None, [F_CALL]),
    (HERMES, f"<tool_call>\n{F}\n<tool_call>\n{G}", None, [F_CALL, G_CALL]),
    (HERMES, hermes(F[:-1]), None, [F_CALL]),  # no brace
    (HERMES, f"<tool_call>\n{F}\n</b>", "\n</b>", [F_CALL]),
    (HERMES, hermes('{"arguments": {"a": 1}, "name": "f"}'), None, [F_CALL]),
    (HERMES, hermes('{"z": {"x": 0}, "name": "f", "arguments": {"a": 1}, "y": 0}'), None, [F_CALL]),
    (HERMES, hermes('{"name": "f", "name": "g", "arguments": {"a": 1}}'), None, [F_CALL]),
    (HERMES, hermes('{"name": "f"}'), None, [("f", "{}")]),
    (HERMES, hermes('{"na\\u006de": "\\u0066", "arguments": {"a": 1}}'), None, [F_CALL]),
    (
        HERMES,
        hermes('{"name":"f","arguments":{"b": "</tool_call>}", "c": "\\"}{\\\\", "d": "\\u00fc"}}'),
        None,
        [("f", '{"b": "</tool_call>}", "c": "\\"}{\\\\", "d": "\\u00fc"}')],
    ),
    (
        HERMES,
        hermes('{"name": "f", "arguments": {"a": "x\ny\t",\n\t"b": [ {"arguments": {}} ,-1e3]}}'),
        None,
        [("f", '{"a": "x\\ny\\t",\n\t"b": [ {"arguments": {}} ,-1e3]}')],
    ),
    (LLAMA3_JSON, LLAMA_F, None, [F_CALL]),
    (LLAMA3_JSON, F, None, [F_CALL]),
    (LLAMA3_JSON, f" \n{LLAMA_F}\n", None, [F_CALL]),
    (LLAMA3_JSON, TAG + LLAMA_F, None, [F_CALL]),
    (LLAMA3_JSON, f"Hi. {TAG} {LLAMA_F}", "Hi. ", [F_CALL]),
    (LLAMA3_JSON, f"{LLAMA_F}; {LLAMA_G}", None, [F_CALL, G_CALL]),
    (LLAMA3_JSON, f"{TAG}{LLAMA_F};{TAG}{LLAMA_G}; ", None, [F_CALL, G_CALL]),
    (LLAMA3_JSON, f"{LLAMA_F}\n{LLAMA_G}; bye", "; bye", [F_CALL, G_CALL]),
    (LLAMA3_JSON, f'{LLAMA_F}; {{"a": 1}}', '; {"a": 1}', [F_CALL]),
    (LLAMA3_JSON, '{"type": "function", "name": "f", "parameters": {"a": 1}}', None, [F_CALL]),
    (LLAMA3_JSON, '{"parameters": {"a": 1}, "name": "f", "more": 0}', None, [F_CALL]),
    (LLAMA3_JSON, LLAMA_F[:-1], None, [F_CALL]),
    # Given out before they break: the arguments stay.
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": [1', None, [("f", '{"a": [1')]),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": nil}}', "il}}", [("f", '{"a": n')]),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": "\\', None, [("f", '{"a": "\\')]),
    (HERMES, hermes('{"name": "f", "arguments": {"a"'), "</tool_call>", [("f", '{"a"\n')]),
    (LLAMA3_JSON, '{"name": "f", "parameters": {"a": 1,}}', "}}", [("f", '{"a": 1,')]),
    (LLAMA3_JSON, '{"name": "f", "parameters": {"a"; ', "; ", [("f", '{"a"')]),
]  # fmt: skip
NO_CALLS = [
    (HERMES, "Hi."),
    (HERMES, ""),
    (HERMES, "  \n"),
    (HERMES, "\n a <tool_call"),
    (HERMES, " <tool_"),
    (HERMES, "<tool_calls> <tool_call <<tool_call"),
    (HERMES, "</tool_call>"),
    (HERMES, F),
    (HERMES, " <tool_call>"),
    (HERMES, hermes("")),
    (HERMES, hermes("f(1)")),
    (HERMES, hermes("{}")),
    (HERMES, hermes("[]")),
    (HERMES, hermes('{"arguments": {}}')),
    (HERMES, hermes('{"name": 1, "arguments": {}}')),
    (HERMES, hermes('{"name": "", "arguments": {}}')),
    (HERMES, hermes('{"name": {"name": "f"}, "arguments": {}}')),
    (HERMES, hermes('{"name": "h", "arguments": {"b": "<tool_call>{\\"name\\": \\"f\\""}}')),
    (HERMES, hermes(f'{{"name": "h", "arguments": {{"<tool_call>": {F}}}}}')),
    (HERMES, hermes('{"name": "h", "arguments": {"b": "<tool_call>{}"}}')),
    (HERMES, hermes('{"name": "\\ud83d", "arguments": {}}')),
    (HERMES, hermes('{"name": "f", "arguments": [1]}')),
    (HERMES, hermes('{"name": "f", "arguments": "{}"}')),
    (HERMES, hermes('{"name": "f", "arguments": null}')),
    (HERMES, hermes("{'name': 'f', 'arguments': {}}")),
    (HERMES, '<tool_call>\n{"name": "f"'),
    (HERMES, '<tool_call>\n{"name": "f", "arguments": '),
    (HERMES, '<tool_call>\n{"arguments": {"a": 1}, "name": "f'),
    (LLAMA3_JSON, "Hi. " + LLAMA_F),
    (LLAMA3_JSON, TAG),
    (LLAMA3_JSON, "<|python"),
    (LLAMA3_JSON, f'{TAG}search.call(query="a")'),
    (LLAMA3_JSON, '{"name": "f"}'),
    (LLAMA3_JSON, '{"name": "Jo", "parameters": {}}'),
    (LLAMA3_JSON, '{"answer": {"name": "f", "parameters": {}}}'),
    (LLAMA3_JSON, '{"answer": 1, "name": "f", "parameters": {}}'),
    (LLAMA3_JSON, f"[{LLAMA_F}]"),
    (LLAMA3_JSON, '{"type": "function", "name": "f"'),
    (LLAMA3_JSON, f'{{"a": "{TAG}"}}'),
]  # fmt: skip


@pytest.mark.parametrize(("tool_format", "text", "content", "calls"), CALLS)
def test_calls_are_found_wherever_the_text_is_cut(tool_format, text, content, calls):
    found = check_all_cuts(lambda: chat(tool_format), text)
    assert found == (content, None, numbered(calls))


@pytest.mark.parametrize(("tool_format", "text"), NO_CALLS)
def test_what_is_no_call_is_text_in_full(tool_format, text):
    assert check_all_cuts(lambda: chat(tool_format), text) == (text or None, None, [])


def is_over(text):
    """Returns whether no JSON goes on behind a text, in whose strings a call would be text."""
    return bool(text.strip()) and not text.endswith('"name": "f')


@pytest.mark.parametrize(
    ("tool_format", "text"), [(kind, text) for kind, text in NO_CALLS if is_over(text)]
)
def test_a_call_behind_what_is_none_is_found(tool_format, text):
    call = hermes(G) if tool_format is HERMES else TAG + LLAMA_G
    found = check_all_cuts(lambda: chat(tool_format), f"{text} {call}")
    assert found == (f"{text} ", None, numbered([G_CALL]))


def test_any_text_is_a_name_where_no_tools_are_given():
    text = hermes('{"name": "h", "arguments": {}}')
    found = check_all_cuts(lambda: chat(HERMES, names=None), text)
    assert found.tool_calls == numbered([("h", "{}")])
    for name in ("", "\\ud83d", "\\udc00a"):
        text = hermes(f'{{"name": "{name}", "arguments": {{}}}}')
        assert check_all_cuts(lambda: chat(HERMES, names=None), text) == (text, None, [])


@pytest.mark.parametrize(
    ("tool_format", "text", "content"),
    [
        (HERMES, f"Hi.\n{hermes(F)}\n{hermes(G)}\n{hermes('{}')}", f"Hi.\n\n{hermes('{}')}"),
        (HERMES, f"{hermes(F)}\n{hermes(G)}\n", None),
        (LLAMA3_JSON, f"{LLAMA_F}; {LLAMA_G}; {LLAMA_G}", None),
        (LLAMA3_JSON, f"{LLAMA_F}; {LLAMA_G} bye", " bye"),
    ],
)
def test_only_the_first_call_is_given_out_without_parallel_ones(tool_format, text, content):
    found = check_all_cuts(lambda: chat(tool_format, parallel_tool_calls=False), text)
    assert found == (content, None, numbered([F_CALL]))


# --- random texts ---------------------------------------------------------------------------------

cuts = st.lists(st.integers(0, 300), max_size=12)
words = st.text("ab <{}[;\n", max_size=8).filter(lambda text: text.strip(" \n;") != "")


@settings(deadline=None)
@given(st.lists(st.tuples(words, st.sampled_from(TOOLS), objects), max_size=3), words, cuts)
def test_calls_among_text_come_as_they_were_written(calls, last, cuts):
    bodies = [json.dumps({"name": name, "arguments": value}) for _, name, value in calls]
    text = "".join(word + hermes(body) for (word, *_), body in zip(calls, bodies, strict=True))
    found = fold(events_of(chat(HERMES), pieces_at(text + last, cuts)))
    assert found.content == "".join(word for word, *_ in calls) + last
    assert [call.name for call in found.tool_calls] == [name for _, name, _ in calls]
    arguments = [json.dumps(value) for *_, value in calls]
    assert [call.arguments for call in found.tool_calls] == arguments


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(TOOLS), objects), min_size=1, max_size=3), cuts)
def test_llama_calls_come_as_they_were_written(calls, cuts):
    text = "; ".join(json.dumps({"name": name, "parameters": value}) for name, value in calls)
    found = fold(events_of(chat(LLAMA3_JSON), pieces_at(text, cuts)))
    expected = numbered([(name, json.dumps(value)) for name, value in calls])
    assert found == (None, None, expected)


PARTS = [
    *("<tool_call>", "</tool_call>", "<tool", "</", "<", TAG, "<|", F, G, LLAMA_F, LLAMA_G),
    *('{"name": "f", ', '"arguments": {', '"parameters": {', '"a": ', '"', "}", "}}", "[", "]"),
    *("\\", "\\u00", ";", " ", "\n", ",", "1", "true", "<think>", "</think>", "<|im_end|>", "x"),
]


@settings(deadline=None, max_examples=1000)
@given(
    st.lists(st.sampled_from(PARTS), max_size=12),
    cuts,
    st.sampled_from([HERMES, LLAMA3_JSON]),
    st.booleans(),
    st.booleans(),
)
def test_pieces_do_not_matter_and_nothing_is_lost(parts, cuts, tool_format, think, parallel):
    text = "".join(parts)
    dropped = {"<|im_end|>"}

    def parse(pieces):
        parser = chat(tool_format, think=think, dropped=dropped, parallel_tool_calls=parallel)
        return events_of(parser, pieces)

    whole = fold(parse([text]))
    assert fold(parse(pieces_at(text, cuts))) == whole
    assert fold(parse(text)) == whole
    if not think and not whole.tool_calls:
        assert (whole.content or "") == text.replace("<|im_end|>", "")
    if not parallel:
        assert len(whole.tool_calls) <= 1


# --- how early ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tool_format", [HERMES, LLAMA3_JSON])
@settings(deadline=None)
@given(text=st.text("ab <>_|to\n{", max_size=30))
def test_text_that_can_be_no_marker_is_given_out_at_once(tool_format, text):
    parser = chat(tool_format)
    text = "x" + text  # whitespace in front is held back
    given = ""
    for i, character in enumerate(text):
        given += "".join(event.text for event in parser.feed(character))
        suffixes = (text[start : i + 1] for start in range(i + 2))
        assert text[len(given) : i + 1] == next(filter(tool_format.opening.startswith, suffixes))


@pytest.mark.parametrize("tool_format", [HERMES, LLAMA3_JSON])
def test_a_call_begins_with_its_arguments_and_each_character_comes_at_once(tool_format):
    key = tool_format.arguments_keys[0]
    before = f'{{"name": "f", "{key}": '
    opening = "" if tool_format.is_bare else "<tool_call>\n"
    parser = chat(tool_format)
    assert all(parser.feed(character) == [] for character in opening + before)
    arguments = '{"a": "b\\"}", "c": [1, {}], "d": {}}'
    assert parser.feed("{") == [CallBegins(0, "call_0", "f"), ArgumentsDelta(0, "{")]
    for character in arguments[1:]:
        assert parser.feed(character) == [ArgumentsDelta(0, character)]
    assert parser.feed("}") == []
    assert parser.finish() == []


@pytest.mark.parametrize(
    ("tool_format", "text"),
    [
        (LLAMA3_JSON, '{"answer": "'),
        (LLAMA3_JSON, '{"name": "Jo"'),
        (HERMES, '<tool_call>{"name": "h"'),
        (HERMES, '<tool_call>{"name": "f", "arguments": "'),
    ],
)
def test_what_is_known_to_be_no_call_is_given_out_at_once(tool_format, text):
    parser = chat(tool_format)
    assert fold(parser.feed(text)).content == text
    assert parser.feed(" a") == [ContentDelta(" a")]


def test_arguments_in_front_of_the_name_wait_for_it():
    parser = chat(HERMES)
    assert parser.feed('<tool_call>{"arguments": {"a": 1}, "name": "f') == []
    assert parser.feed('"') == [CallBegins(0, "call_0", "f"), ArgumentsDelta(0, '{"a": 1}')]


# --- everything together --------------------------------------------------------------------------


def test_without_parsers_text_passes_through():
    text = f"<think>a</think>\n{hermes(F)}"
    assert check_all_cuts(ChatParser, text) == (text, None, [])
    assert ChatParser().feed("a <") == [ContentDelta("a <")]
    assert ChatParser().feed("") == []


def test_calls_are_found_behind_reasoning_and_not_in_it():
    text = f"<think>\n{hermes(F)}\n</think>\n\n{hermes(G)}<|im_end|>"
    found = check_all_cuts(lambda: chat(HERMES, think=True, dropped=HERMES.end_markers), text)
    assert found == (None, f"{hermes(F)}\n", numbered([G_CALL]))


def test_events_come_in_the_order_of_the_text():
    text = f"<think>a</think>b{hermes(F)}c{hermes(G)}"
    assert events_of(chat(HERMES, think=True), [text]) == [
        ReasoningDelta("a"),
        ContentDelta("b"),
        CallBegins(0, "call_0", "f"),
        ArgumentsDelta(0, F_CALL[1]),
        ContentDelta("c"),
        CallBegins(1, "call_1", "g"),
        ArgumentsDelta(1, G_CALL[1]),
    ]


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("a<|eot_id|>", "a"),
        ("<|eot_id|>a<|eom_id|><|eot_id|>b", "ab"),
        ("a<|eot_<|eot_id|>id|>", "a<|eot_id|>"),
        ("a<|eot_i", "a<|eot_i"),
        ("<<|eot_id|>", "<"),
        ("<|eot_id>", "<|eot_id>"),
    ],
)
def test_end_markers_are_left_out_of_the_text(text, left):
    def make():
        return ChatParser(dropped_markers=["<|eot_id|>", "<|eom_id|>"])

    assert check_all_cuts(make, text).content == left


@settings(deadline=None)
@given(st.sets(st.text("ab", min_size=1, max_size=4), max_size=3), st.text("ab", max_size=12), cuts)
def test_markers_in_each_other_are_left_out_alike_wherever_the_text_is_cut(markers, text, cuts):
    whole = MarkerFilter(markers)
    parts = MarkerFilter(markers)
    expected = whole.feed(text) + whole.finish()
    assert "".join(map(parts.feed, pieces_at(text, cuts))) + parts.finish() == expected


def test_a_marker_that_a_parser_reads_is_not_left_out():
    special = {"<tool_call>", "</tool_call>", "<think>", "</think>", "<|im_end|>"}
    text = f"<think>a</think>{hermes(F)}<|im_end|>"
    found = check_all_cuts(lambda: chat(HERMES, think=True, dropped=special), text)
    assert found == (None, "a", numbered([F_CALL]))


def test_an_empty_marker_is_refused():
    with pytest.raises(ValueError, match="leave '' out"):
        ChatParser(dropped_markers=["", "a"])


def test_ids_are_random():
    ids = {random_call_id() for _ in range(9)}
    assert len(ids) == 9
    assert all(re.fullmatch("call_[0-9a-f]{24}", name) for name in ids)


@pytest.mark.parametrize(
    ("template", "chosen"),
    [
        (None, None),
        ("{{ messages }}", None),
        ('{"name": <function-name>, "arguments": <args>}\n</tool_call> <tool_call>', HERMES),
        ("<tool_call>\n<function=name>", None),
        ("<tool_call>{name}\n<arg_key>", None),
        ("{{ '<|python_tag|>' }}", LLAMA3_JSON),
        ("{% if message.role == 'ipython' %}", LLAMA3_JSON),
        ('{"name": function name, "parameters": dictionary of arguments}', LLAMA3_JSON),
        ('[TOOL_CALLS] {"name": n, "parameters": p}', None),
        ('[{"tool_name": n, "parameters": p}]', None),
    ],
)
def test_the_format_that_a_template_teaches(template, chosen):
    assert choose_format(template) is chosen


def test_the_names_and_markers_of_the_formats():
    assert TOOL_PARSERS == {"hermes": HERMES, "llama3_json": LLAMA3_JSON}
    assert HERMES.markers == ("<tool_call>", "</tool_call>")
    assert LLAMA3_JSON.markers == (TAG,)
    for tool_format in TOOL_PARSERS.values():
        assert not tool_format.end_markers & set(tool_format.markers)
