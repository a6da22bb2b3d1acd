"""The detokenizer against decoding everything at once."""

import functools
import re
from collections.abc import Callable, Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from pallas_paged.engine.text import detokenizer
from pallas_paged.engine.text.detokenizer import (
    MAX_PENDING,
    REPLACEMENT,
    Detokenizer,
    StreamDetokenizer,
    WindowDetokenizer,
    prompt_context,
    text_of,
)
from pallas_paged.engine.text.tokenizer import load_tokenizer
from pallas_paged.models.demo import DEMO_MODEL
from tests.engine import small_tokenizers

KINDS = small_tokenizers.KINDS
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
ATOMS = [" ", "  x", "the", "\n", "é", "e\u0301", "你好", "😀", "👨\u200d👩\u200d👧", "🇩🇪"]
texts = st.lists(st.sampled_from(ATOMS)).map("".join) | st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters=REPLACEMENT)
)


class Counting:
    """A tokenizer that counts the tokens it decodes."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.num_decoded = 0
        self.num_calls = 0

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        self.num_decoded += len(token_ids)
        self.num_calls += 1
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)


def both(
    tokenizer: Tokenizer, prompt: Sequence[int] = (), skip_special_tokens: bool = True
) -> list[Detokenizer]:
    """Returns one of either kind, to begin behind a prompt."""
    options = {"skip_special_tokens": skip_special_tokens}
    context = prompt_context(tokenizer, prompt, **options)
    return [kind(tokenizer, context, **options) for kind in (WindowDetokenizer, StreamDetokenizer)]


def pieces(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    prompt: Sequence[int] = (),
    skip_special_tokens: bool = True,
) -> list[str]:
    """Returns what both kinds give for each token, and at the end."""
    window, stream = (
        [*map(one.append, token_ids), one.finish()]
        for one in both(tokenizer, prompt, skip_special_tokens)
    )
    assert window == stream
    return window


def any_ids(kind: Callable[[], Tokenizer]) -> st.SearchStrategy[list[int]]:
    """Ids of all kinds: text, single bytes, special tokens, some that the tokenizer lacks."""
    size = kind().get_vocab_size()
    special = [kind().token_to_id(token) for token in small_tokenizers.SPECIAL]
    return st.lists(st.integers(0, size + 3) | st.sampled_from(special), max_size=60)


@pytest.mark.parametrize(
    "kind",
    [kind for kind in KINDS if kind is not small_tokenizers.byte_fallback],  # see its own test
    ids=lambda kind: kind.__name__,
)
@pytest.mark.parametrize("skip_special_tokens", [True, False])
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_any_tokens_give_what_decoding_all_of_them_gives(kind, skip_special_tokens, data):
    ids = data.draw(any_ids(kind))
    whole = kind().decode(ids, skip_special_tokens=skip_special_tokens)
    assert "".join(pieces(kind(), ids, (), skip_special_tokens)) == whole


@every_kind
@settings(deadline=None, max_examples=100)
@given(text=texts)
def test_text_streams_without_delay_and_never_a_part_of_a_character(kind, text):
    ids = kind().encode(text).ids
    for one in both(kind()):
        streamed = ""
        for i, token in enumerate(ids):
            streamed += one.append(token)
            so_far = kind().decode(ids[: i + 1])
            assert streamed == so_far or so_far.endswith(REPLACEMENT)
            assert REPLACEMENT not in streamed
        assert streamed + one.finish() == kind().decode(ids)


@every_kind
@settings(deadline=None, max_examples=100)
@given(prompt=texts, text=texts, num_special=st.integers(0, 40))
def test_text_continues_the_prompt(kind, prompt, text, num_special):
    prompt_ids = kind().encode(prompt).ids + [kind().token_to_id("<|user|>")] * num_special
    ids = kind().encode(text).ids
    text = "".join(pieces(kind(), ids, prompt_ids))
    assert kind().decode(prompt_ids) + text == kind().decode(prompt_ids + ids)


def test_the_space_before_the_first_word_stays_behind_a_prompt():
    tokenizer = small_tokenizers.metaspace()
    prompt, answer = tokenizer.encode("the fox").ids, tokenizer.encode("the dog").ids
    assert "".join(pieces(tokenizer, answer)) == "the dog"
    assert "".join(pieces(tokenizer, answer, prompt)) == " the dog"


@settings(deadline=None, max_examples=100)
@given(data=st.data(), cut=st.integers(1, 3))
def test_a_prompt_that_ends_inside_a_character_is_left_out(data, cut):
    tokenizer = small_tokenizers.byte_level()
    prompt = [byte_token(byte) for byte in "😀".encode()[:cut]]
    ids = data.draw(any_ids(small_tokenizers.byte_level))
    assert "".join(pieces(tokenizer, ids, prompt)) == tokenizer.decode(ids)


@functools.cache
def byte_token(byte: int) -> int:
    """Returns the byte-level tokenizer's token of one byte.

    GPT-2's alphabet: printable Latin-1 characters stand for themselves, the others for 256 and up.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    character = chr(byte if byte in printable else 256 + others.index(byte))
    return small_tokenizers.byte_level().token_to_id(character)


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=80) | st.lists(st.sampled_from(list("😀你\xff".encode())), max_size=60))
@example(b"\xe4" * 40)
@example(b"\xf0\x9f\x98" * 20)
@example(b"\x80" * 5 + "😀".encode() + b"\x80" * 6 + "😀".encode())
@example(b"\x80" * 6 + "😀".encode() + b"\x80" * 7 + "😀".encode())
@example(b"\x80" * 7 + "😀".encode() + b"\x80" * 5 + "😀".encode())
def test_any_bytes_give_what_decoding_all_of_them_gives(data):
    tokenizer = small_tokenizers.byte_level()
    ids = [byte_token(byte) for byte in data]
    assert tokenizer.decode(ids) == bytes(data).decode(errors="replace")
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_an_incomplete_character_comes_out_at_the_end_only():
    ids = [byte_token(byte) for byte in b"ab" + "😀".encode()[:3]]
    assert pieces(small_tokenizers.byte_level(), ids) == ["a", "b", "", "", "", REPLACEMENT]


def test_a_character_split_by_special_tokens_is_still_one():
    tokenizer = small_tokenizers.byte_level()
    eos = tokenizer.token_to_id("</s>")
    first, *rest = (byte_token(byte) for byte in "é".encode())
    assert pieces(tokenizer, [first, *[eos] * 20, *rest])[-2:] == ["é", ""]


@settings(deadline=None, max_examples=200)
@given(data=st.data(), text=texts)
def test_byte_fallback_keeps_the_text_of_all_but_wrong_bytes(data, text):
    """How many replacement characters stand for wrong bytes depends on what is read at once."""
    tokenizer = small_tokenizers.byte_fallback()
    ids = data.draw(any_ids(small_tokenizers.byte_fallback)) + tokenizer.encode(text).ids
    window, stream = ("".join([*map(one.append, ids), one.finish()]) for one in both(tokenizer))
    parts = [re.sub(f"{REPLACEMENT}+", REPLACEMENT, found) for found in (window, stream)]
    assert parts[0] == parts[1]


def test_byte_fallback_keeps_what_is_out_when_a_wrong_byte_follows():
    tokenizer = small_tokenizers.byte_fallback()
    good = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "你".encode()]
    wrong = tokenizer.token_to_id("<0xFF>")
    assert tokenizer.decode([*good, wrong]) == REPLACEMENT * 4
    assert pieces(tokenizer, [*good, wrong]) == ["", "", "你", "", REPLACEMENT]


RUNS = [b"plain text, ", "你好".encode(), b"\xff", b"a\xff", None]


@pytest.mark.parametrize("data", RUNS)
def test_cost_per_token_does_not_grow(data):
    eos = small_tokenizers.byte_level().token_to_id("</s>")
    ids = [eos] if data is None else [byte_token(byte) for byte in data]
    tokenizer = Counting(small_tokenizers.byte_level())
    window = WindowDetokenizer(tokenizer)
    for i in range(1200):
        window.append(ids[i % len(ids)])
    assert tokenizer.num_decoded < 50 * 1200
    tokenizer.num_decoded = 0
    stream = StreamDetokenizer(tokenizer)
    real, steps = stream._step, []

    def step(counting, token_id):
        steps.append(token_id)
        return real(counting.tokenizer, token_id)

    stream._step = step  # until a window takes over
    for i in range(1200):
        stream.append(ids[i % len(ids)])
        assert len(stream._pending) <= MAX_PENDING
    assert tokenizer.num_decoded < 50 * 1200
    # A run of tokens without text, or of invalid bytes, does not stay in the stream.
    assert len(steps) == {None: 1, b"\xff": MAX_PENDING + 1}.get(data, 1200)


def test_the_stream_reads_all_but_invalid_bytes():
    tokenizer = small_tokenizers.byte_fallback()
    good = tokenizer.encode("the 你好 fox").ids
    wrong = tokenizer.token_to_id("<0xFF>")
    stream = StreamDetokenizer(tokenizer)
    assert "".join(map(stream.append, good)) == "the 你好 fox"
    assert stream._window is None
    you = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "你".encode()]
    dog = tokenizer.encode("dog").ids
    rest = [*map(stream.append, [*you, wrong, *dog])]
    assert stream._window is not None  # the library's stream raises at the dog
    assert "".join(rest) + stream.finish() == f"你{REPLACEMENT} dog"


@pytest.mark.parametrize("read", ["a", "你"], ids=["a token", "a character of three"])
def test_a_window_begins_behind_what_was_read_last(read, monkeypatch):
    contexts = []

    def window(tokenizer, context, **options):
        contexts.append(list(context))
        return WindowDetokenizer(tokenizer, context, **options)

    monkeypatch.setattr(detokenizer, "WindowDetokenizer", window)
    last = [byte_token(byte) for byte in read.encode()]
    stream = StreamDetokenizer(small_tokenizers.byte_level(), [byte_token(b"p"[0])])
    for token in (byte_token(b"b"[0]), *last, *[byte_token(0xFF)] * (MAX_PENDING + 1)):
        stream.append(token)
    assert contexts == [last]


def test_another_error_of_the_stream_is_raised(monkeypatch):
    def fail(self, tokenizer, token_id):
        raise ValueError("no decoder")

    stream = StreamDetokenizer(small_tokenizers.byte_level())
    stream._step = functools.partial(fail, None)
    with pytest.raises(ValueError, match="no decoder"):
        stream.append(5)


@every_kind
@settings(deadline=None, max_examples=100)
@given(prompt=texts, text=texts)
def test_text_at_once_is_what_the_pieces_are(kind, prompt, text):
    tokenizer = kind()
    prompt_ids, ids = tokenizer.encode(prompt).ids, tokenizer.encode(text).ids
    context = prompt_context(tokenizer, prompt_ids, skip_special_tokens=True)
    whole = text_of(tokenizer, context, ids, skip_special_tokens=True)
    assert whole == "".join(pieces(tokenizer, ids, prompt_ids))


@pytest.fixture(scope="module")
def demo() -> Tokenizer:
    tokenizer = load_tokenizer(DEMO_MODEL)
    assert tokenizer is not None
    assert isinstance(tokenizer.detokenizer(), StreamDetokenizer)
    return tokenizer.backend


@settings(deadline=None, max_examples=300)
@given(data=st.data(), skip_special_tokens=st.booleans())
def test_any_tokens_of_the_demo_model(demo, data, skip_special_tokens):
    any_of_demo = st.lists(st.integers(0, demo.get_vocab_size() + 3), max_size=40)
    prompt, ids = data.draw(any_of_demo), data.draw(any_of_demo)
    options = {"skip_special_tokens": skip_special_tokens}
    found = "".join(pieces(demo, ids, prompt, skip_special_tokens))
    before = demo.decode(prompt, **options)
    if before.endswith(REPLACEMENT):  # inside a character, as any tokens may end
        assert found == demo.decode(ids, **options)
    else:
        assert before + found == demo.decode([*prompt, *ids], **options)
    context = prompt_context(demo, prompt, **options)
    assert text_of(demo, context, ids, **options) == found


@every_kind
def test_a_token_is_decoded_about_once(kind):
    ids = kind().encode("the fox jumps over the lazy dog, and the dog sleeps. " * 20).ids
    tokenizer = Counting(kind())
    detokenizer = WindowDetokenizer(tokenizer, ids[:12])
    for token in ids:
        detokenizer.append(token)
    assert tokenizer.num_calls < 1.25 * len(ids)
    assert tokenizer.num_decoded < 10 * len(ids)
