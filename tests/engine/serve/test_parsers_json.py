"""The scanner of JSON objects against Python's own parser."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pallas_paged.engine.serve.parsers.json_scanner import ObjectScanner

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5) | st.sampled_from(["}", '"', "\\", "</tool_call>", "ü", "😀", "\n"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
objects = st.dictionaries(st.text(max_size=3), values, max_size=3)


def scan(text: str) -> tuple[int, ObjectScanner, dict[str, str]]:
    """Returns how many characters are taken, and the text of the last value of each key."""
    scanner, start = ObjectScanner(), 0
    found: list[tuple[str, list[str]]] = []
    while start < len(text) and not scanner.is_done:
        end = scanner.take(text, start)
        if end == start:
            break
        if scanner.is_value:
            if scanner.num_values > len(found):
                found.append((scanner.key, []))
            found[-1][1].append(text[start:end])
        start = end
    return start, scanner, {key: "".join(pieces) for key, pieces in found}


def refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


@settings(deadline=None)
@given(objects, st.sampled_from([None, 1, "\t"]), st.booleans())
def test_an_object_and_its_values_are_found(value, indent, ascii_only):
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    num_taken, scanner, found = scan(text + "more")
    assert (num_taken, scanner.is_done) == (len(text), True)
    assert {key: json.loads(raw) for key, raw in found.items()} == value


@settings(deadline=None, max_examples=500)
@given(
    objects, st.integers(0, 200), st.integers(0, 2), st.text('{}[]",:\\ut0-.eE+1 \n', max_size=2)
)
@example({"a": 0}, 6, 1, "NaN")
@example({"a": 0}, 6, 1, "Infinity")
@example({"a": 0}, 6, 1, "01")
@example({"a": 0}, 6, 1, "1.")
@example({"a": 0}, 6, 1, "-")
@example({"a": 0}, 6, 1, "1e+")
@example({"a": 0}, 6, 1, "1,")
@example({"a": [0]}, 8, 0, ",")
@example({"a": "b"}, 7, 0, "\\u12g4")
def test_a_changed_object_is_one_where_python_says_so(value, place, num_left_out, inserted):
    text = json.dumps(value)
    place = min(place, len(text))
    text = text[:place] + inserted + text[place + num_left_out :]
    num_taken, scanner, _ = scan(text)
    try:
        is_object = isinstance(json.loads(text, strict=False, parse_constant=refuse), dict)
    except ValueError:
        is_object = False
    assert (scanner.is_done and not text[num_taken:].strip(" \t\r\n")) == is_object


@pytest.mark.parametrize(
    ("text", "num_taken"),
    [
        ("[1]", 0), ("x", 0), ("  {", 3), ('{"a" 1}', 5), ('{"a": nil}', 7), ('{"a": tru}', 9),
        ('{"a": 01}', 7), ('{"a": 1.}', 8), ('{"a": -}', 7), ('{"a": 1e}', 8), ('{"a": .5}', 6),
        ('{"a": "\\x"}', 8), ('{"a": "\\u00g0"}', 11), ('{"a": [1,]}', 9), ('{"a": 1,}', 8),
        ('{"a": {1: 2}}', 7), ('{"a": [1}', 8), ("{'a': 1}", 1), ('{"a": 1 2}', 8), ('{,}', 1),
    ],
)  # fmt: skip
def test_where_an_object_breaks(text, num_taken):
    assert scan(text)[0] == num_taken


def test_an_object_may_be_as_deep_as_it_likes():
    text = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"
    assert scan(text)[:1] == (len(text),)
