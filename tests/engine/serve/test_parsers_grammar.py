"""Grammars of tool calls under llguidance: what they allow, and that the parser reads that."""

import json

import pytest
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer
from tokenizers import AddedToken
from transformers import AutoTokenizer

from pallas_paged.engine.serve.parsers.chat_parser import ChatParser
from pallas_paged.engine.serve.parsers.events import fold
from pallas_paged.engine.serve.parsers.formats import HERMES, LLAMA3_JSON, TOOL_PARSERS
from pallas_paged.engine.serve.parsers.grammar import grammar_for
from pallas_paged.engine.serve.parsers.reasoning import ThinkParser
from pallas_paged.engine.serve.parsers.tools import ToolParser

ADDED = ("<tool_call>", "</tool_call>", "<|python_tag|>", "</think>")
ODD = "g\"\\\n{} ü😀'"
SCHEMA = {
    "$ref": "#/$defs/place",
    "$defs": {
        "place": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "n": {"type": "integer"}},
            "required": ["city"],
            "additionalProperties": False,
        }
    },
}


def tool(name, **fields):
    return {"type": "function", "function": {"name": name, **fields}}


TOOLS = [tool("f", parameters=SCHEMA), tool(ODD), tool("h", parameters={}, description="a")]
NAMES = ("f", ODD, "h")


class Device:
    """A tokenizer as llguidance has it, with the markers as tokens of their own or spelled."""

    def __init__(self, special):
        tokenizer = AutoTokenizer.from_pretrained("models/demo")
        if special is not None:
            tokenizer.add_tokens([AddedToken(marker, special=special) for marker in ADDED])
        # Tokens in which the object of the arguments ends and something else does too.
        tokenizer.add_tokens(['"}}', "}}\n", '": {"', "}};"])
        self.marker_ids = {
            marker: tokenizer.convert_tokens_to_ids(marker)
            for marker in (ADDED if special is not None else ())
        }
        self.encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
        self.tokenizer = from_tokenizer(tokenizer)

    def accepts(self, grammar, token_ids):
        matcher = LLMatcher(self.tokenizer, LLMatcher.grammar_from_lark(grammar), log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        num_taken = matcher.try_consume_tokens(token_ids)
        return num_taken == len(token_ids) and matcher.is_accepting()

    def accepts_in_full(self, grammar, text):
        """Returns whether a text is allowed, as tokens; and character by character, if spelled."""
        accepted = self.accepts(grammar, self.encode(text))
        if not self.marker_ids:
            spelled = [token for character in text for token in self.encode(character)]
            assert self.accepts(grammar, spelled) == accepted
        return accepted


@pytest.fixture(scope="module", params=[None, False, True], ids=["spelled", "added", "special"])
def device(request):
    return Device(request.param)


def call(tool_format, name, arguments):
    key = tool_format.arguments_keys[0]
    body = f'{{"name": {json.dumps(name, ensure_ascii=False)}, "{key}": {arguments}}}'
    return body if tool_format is LLAMA3_JSON else f"<tool_call>\n{body}\n</tool_call>"


def read(tool_format, text, *, inside=False):
    reasoning = ThinkParser(starts_inside=True) if inside else None
    parser = ChatParser(reasoning, ToolParser(tool_format, NAMES))
    return fold(parser.feed(text) + parser.finish())


ALLOWED = [
    ("f", '{"city": "Paris"}'),
    ("f", '{"city": "}</tool>; {\\"", "n": -3}'),
    (ODD, "{}"),
    (ODD, '{"a": [{"b": null}, 1.5], "c": {}}'),
    ("h", '{"a":1}'),
]
REFUSED = [
    ("f", "{}"),
    ("f", '{"city": 1}'),
    ("f", '{"city": "Paris", "more": 1}'),
    ("h", "[]"),
    ("h", "1"),
    ("k", "{}"),
]
FORMATS = pytest.mark.parametrize("tool_format", TOOL_PARSERS.values(), ids=lambda kind: kind.name)


@FORMATS
def test_one_call_or_several_of_any_tools_are_allowed_and_read(tool_format, device):
    grammar = grammar_for(tool_format, TOOLS, "required", marker_ids=device.marker_ids)
    single = grammar_for(
        tool_format, TOOLS, "required", marker_ids=device.marker_ids, parallel_tool_calls=False
    )
    texts = [call(tool_format, *case) for case in ALLOWED]
    for text, case in zip(texts, ALLOWED, strict=True):
        assert device.accepts_in_full(grammar, text), text
        assert device.accepts_in_full(single, text), text
        found = read(tool_format, text)
        assert (found.content, [found.tool_calls[0][1:]]) == (None, [case])
    text = tool_format.between.join(texts)
    assert device.accepts_in_full(grammar, text)
    assert not device.accepts_in_full(single, text)
    found = read(tool_format, text)
    assert (found.content, [found_call[1:] for found_call in found.tool_calls]) == (None, ALLOWED)


@FORMATS
def test_all_else_is_refused(tool_format, device):
    grammar = grammar_for(tool_format, TOOLS, "required", marker_ids=device.marker_ids)
    good = call(tool_format, *ALLOWED[0])
    texts = [call(tool_format, *case) for case in REFUSED]
    texts += ["", "Hi.", f"Hi. {good}", f"{good} Bye", good[:-1], good + good, good[1:], "{}"]
    for text in texts:
        assert not device.accepts_in_full(grammar, text), text


@FORMATS
def test_a_named_function_is_called_once(tool_format, device):
    choice = {"type": "function", "function": {"name": ODD}}
    grammar = grammar_for(tool_format, TOOLS, choice, marker_ids=device.marker_ids)
    good = call(tool_format, ODD, "{}")
    assert device.accepts_in_full(grammar, good)
    for text in (good + tool_format.between + good, call(tool_format, "h", "{}")):
        assert not device.accepts_in_full(grammar, text)


@FORMATS
@pytest.mark.parametrize("think", ["I <think a\n", "", "</thin <tool_call> {}"])
@pytest.mark.parametrize("newlines", ["", "\n\n"])
def test_reasoning_that_the_prompt_began_ends_first(tool_format, think, newlines, device):
    if device.marker_ids:  # as a token of its own it is no text
        think = think.replace("<tool_call>", "")
    grammar = grammar_for(
        tool_format, TOOLS, "required", marker_ids=device.marker_ids, starts_inside=True
    )
    good = call(tool_format, "h", "{}")
    text = f"{think}</think>{newlines}{good}"
    assert device.accepts_in_full(grammar, text)
    found = read(tool_format, text, inside=True)
    assert (found.content, found.reasoning, len(found.tool_calls)) == (None, think or None, 1)
    for text in (good, f"{think}</think>", f"{think}</think>\n\n\n{good}", f"a</think>b{good}"):
        assert not device.accepts_in_full(grammar, text), text


@pytest.mark.parametrize("special", [False, True])
def test_markers_may_be_tokens_of_their_own_or_spelled(special):
    device = Device(special)
    grammar = grammar_for(HERMES, TOOLS, "required", marker_ids=device.marker_ids)
    text = call(HERMES, "h", "{}")
    assert text.startswith("<tool_call>\n")
    assert device.encode(text)[0] == device.marker_ids["<tool_call>"]
    assert device.accepts(grammar, device.encode(text))
    assert device.accepts(grammar, [token for char in text for token in device.encode(char)])
    # llguidance takes an added token for no text, which is why their ids are asked for.
    spelled_only = grammar_for(HERMES, TOOLS, "required")
    assert not device.accepts(spelled_only, device.encode(text))


def test_a_tag_that_is_a_token_does_not_end_reasoning_spelled_as_well():
    device = Device(True)
    grammar = grammar_for(
        HERMES, TOOLS, "required", marker_ids=device.marker_ids, starts_inside=True
    )
    end = device.encode("</think>" + call(HERMES, "h", "{}"))
    spelled = [token for char in "</think>" for token in device.encode(char)]
    assert device.accepts(grammar, spelled[:-1] + end)
    assert not device.accepts(grammar, spelled + end)


def test_a_tag_of_its_own_may_come_in_front_of_an_object():
    device = Device(True)
    grammar = grammar_for(LLAMA3_JSON, TOOLS, "required", marker_ids=device.marker_ids)
    text = "<|python_tag|>" + call(LLAMA3_JSON, "h", "{}")
    assert device.accepts(grammar, device.encode(text))
    assert len(read(LLAMA3_JSON, text).tool_calls) == 1
    assert not device.accepts(grammar, device.encode("<|python_tag|>" + text))


@pytest.mark.parametrize("choice", [None, "auto", "none"])
def test_a_free_choice_has_no_grammar(choice):
    assert grammar_for(HERMES, TOOLS, choice) is None


@pytest.mark.parametrize("parameters", [None, {}, {"properties": {}}, {"type": "object"}])
def test_parameters_that_say_little_are_any_object(parameters):
    grammar = grammar_for(LLAMA3_JSON, [tool("f", parameters=parameters)], "required")
    device = Device(None)
    assert device.accepts_in_full(grammar, call(LLAMA3_JSON, "f", '{"a": [1]}'))
    assert not device.accepts_in_full(grammar, call(LLAMA3_JSON, "f", "[1]"))


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"properties": {"a": {"type": "strng"}}}, "strng"),
        ({"properties": 3}, "properties must be an object"),
        ({"$ref": "#/nowhere"}, "nowhere"),
        ({"properties": {"a": {"pattern": "("}}}, "unclosed group"),
        ({"not": {}}, "not"),
        ({"properties": {"a": {"const": float("nan")}}}, "not JSON compliant"),
        ({"properties": {"a": {"const": {1}}}}, "not JSON serializable"),
        ({"type": "string"}, 'must be "object"'),
        ("object", "must be a JSON schema of an object"),
        (True, "must be a JSON schema of an object"),
    ],
)
def test_a_schema_that_is_none_is_refused_by_its_place(parameters, reason):
    tools = [TOOLS[0], tool("bad", parameters=parameters)]
    with pytest.raises(ValueError, match=reason) as raised:
        grammar_for(HERMES, tools, "required")
    assert str(raised.value).startswith("tools[1].function.parameters")


@pytest.mark.parametrize(
    ("tools", "choice", "reason"),
    [
        (TOOLS, "any", "tool_choice='any' must be"),
        (TOOLS, {"type": "function"}, "tool_choice=.* must be"),
        (TOOLS, {"function": {"name": "k"}}, "tool_choice=.* needs a tool; tools has 'f', "),
        ([], "required", "tool_choice='required' needs a tool; tools has none"),
        ([{"name": "f"}], "required", r"tools\[0\]=.* must be"),
        ([tool("f"), tool("")], "required", r"tools\[1\].function.name='' must be"),
        ([tool(3)], "required", r"tools\[0\].function.name=3 must be"),
        ([tool("\ud800")], "required", r"tools\[0\].function.name holds"),
    ],
)
def test_what_is_no_tool_or_choice_is_refused(tools, choice, reason):
    with pytest.raises(ValueError, match=reason):
        grammar_for(HERMES, tools, choice)
