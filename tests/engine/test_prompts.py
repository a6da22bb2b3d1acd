"""From what callers call prompts to tokens."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_paged.engine import BeamSearchParams, SamplingParams
from pallas_paged.engine.text.prompts import (
    PromptReader,
    broadcast_params,
    cache_salt,
    split_conversations,
    split_prompts,
)


class Letters:
    """A tokenizer: "a" is 1."""

    path = "letters"

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [0] * add_special_tokens + [ord(letter) - 96 for letter in text]

    def decode_token(self, token: int) -> str:
        return chr(token + 96)

    def render_chat(self, messages: Any, name: str, **options: Any) -> str:
        return "".join(message["content"] for message in messages)


READER = PromptReader(Letters(), "model", vocab_size=20)  # type: ignore[arg-type]
HELLO = {"role": "user", "content": "hello"}


def read(prompts: Any) -> list[tuple[str | None, list[int]]]:
    found = [READER.read(prompt) for prompt in split_prompts(prompts)]
    return [(text, list(ids)) for text, ids in found]


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("ab", [("ab", [0, 1, 2])]),
        (["ab", "c"], [("ab", [0, 1, 2]), ("c", [0, 3])]),
        (("ab", "c"), [("ab", [0, 1, 2]), ("c", [0, 3])]),
        ((p for p in ("ab", "c")), [("ab", [0, 1, 2]), ("c", [0, 3])]),
        (np.array(["ab", "c"]), [("ab", [0, 1, 2]), ("c", [0, 3])]),
        ([1, 2, 3], [(None, [1, 2, 3])]),
        ((1, 2, 3), [(None, [1, 2, 3])]),
        (np.array([1, 2, 3], np.int32), [(None, [1, 2, 3])]),
        (list(np.array([1, 2, 3])), [(None, [1, 2, 3])]),
        ([[1, 2], [3]], [(None, [1, 2]), (None, [3])]),
        (np.array([[1, 2], [3, 4]]), [(None, [1, 2]), (None, [3, 4])]),
        ([np.array([1, 2]), (3,)], [(None, [1, 2]), (None, [3])]),
        (["a", [1], {"prompt": "b"}], [("a", [0, 1]), (None, [1]), ("b", [0, 2])]),
        ({"prompt_token_ids": [1], "prompt": "label"}, [("label", [1])]),
        ({"prompt_token_ids": np.array([1]), "cache_salt": "s"}, [(None, [1])]),
        (jnp.array([1, 2, 3]), [(None, [1, 2, 3])]),
        ([jnp.array([1, 2]), [3]], [(None, [1, 2]), (None, [3])]),
        ([], []),
    ],
)
def test_what_a_prompt_may_be(prompts, expected):
    assert read(prompts) == expected


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (None, "prompts=None must be a string"),
        (3, "prompts=3 must be a string"),
        (b"abc", "prompts=b'abc' must be a string"),
        (np.array(3), "prompts=array"),
        ([None], "a prompt is a string, .* not None"),
        ([b"abc"], "a prompt is a string, .* not b'abc'"),
        ([{}], "a prompt is a string, .* not {}"),
        ({"text": "x"}, "a prompt is a string"),
        ({"prompt": None}, "prompt=None must be a string"),
        ({"prompt": 3, "prompt_token_ids": [1]}, "prompt=3 must be a string"),
        ("a\ud800", r"prompt='a\\ud800' holds '\\ud800' at character 1, half of a surrogate pair"),
        *(
            ({"prompt_token_ids": ids}, "prompt_token_ids.* must be a flat list of integers")
            for ids in (3, None, "ab", [1, False], [1, 2.5], [[1], [2, 3]], [[1]], {1: 2}, [2**70])
        ),
        ([True, False], "prompt_token_ids=.* True and False are none"),
        ([1, True], "prompt_token_ids=.* True and False are none"),
        ([np.True_], "prompt_token_ids=.* True and False are none"),
        (np.array([True]), "prompt_token_ids=.* True and False are none"),
        ([1, "a"], "prompt_token_ids must be a flat list of integers"),
        ([1, 20], "prompt_token_ids holds 20, which is outside the vocabulary of 20"),
        ([[1], []], "the prompt is empty"),
        (
            "abz",
            "prompt='abz' holds 'z', which is token 26 of the tokenizer in letters, and .* 20;",
        ),
    ],
)
def test_what_is_no_prompt_is_refused(prompts, message):
    with pytest.raises(ValueError, match=message):
        read(prompts)


def test_a_conversation_is_a_prompt():
    assert READER.from_chat([HELLO]) == {"prompt": "hello", "prompt_token_ids": [8, 5, 12, 12, 15]}
    with pytest.raises(ValueError, match="prompt='zoo' holds 'z', which is token 26"):
        READER.from_chat([{"role": "user", "content": "zoo"}])


def test_without_a_tokenizer_only_tokens_are_read():
    reader = PromptReader(None, "model", 20)
    assert reader.read([1, 2]) == (None, (1, 2))
    for wants_one in (lambda: reader.read("a"), lambda: reader.from_chat([HELLO])):
        with pytest.raises(ValueError, match="model has no tokenizer files"):
            wants_one()


@pytest.mark.parametrize(
    ("messages", "names"),
    [
        ([HELLO], ["messages"]),
        ((HELLO, HELLO), ["messages"]),
        ([[HELLO], [HELLO, HELLO]], ["messages[0]", "messages[1]"]),
        ([], []),
    ],
)
def test_conversations_have_names(messages, names):
    assert [name for name, _ in split_conversations(messages)] == names


@pytest.mark.parametrize("messages", [None, "hello", HELLO, 3, (m for m in [HELLO])])
def test_what_is_no_conversation_is_refused(messages):
    with pytest.raises(ValueError, match=r"messages=.* must be a list of messages"):
        split_conversations(messages)


@pytest.mark.parametrize(
    ("salt", "message"),
    [(3, "cache_salt=3 must be a string"), ("\ud800", r"cache_salt=.* half of a surrogate pair")],
)
def test_a_salt_is_text(salt, message):
    assert cache_salt({"prompt": "a", "cache_salt": "s"}) == "s"
    assert cache_salt("a") is cache_salt([1]) is cache_salt({"prompt": "a"}) is None
    with pytest.raises(ValueError, match=message):
        cache_salt({"prompt": "a", "cache_salt": salt})


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (3, "sampling_params=3 must be SamplingParams, BeamSearchParams, a list"),
        ("greedy", "sampling_params='greedy' must be"),
        ({"temperature": 0}, "sampling_params={'temperature': 0} must be"),
        ([SamplingParams(), None], r"sampling_params\[1\]=None must be SamplingParams or"),
        ([SamplingParams()], "sampling_params has 1 entries for 2 prompts"),
    ],
)
def test_params_of_the_wrong_kind_are_refused(params, message):
    with pytest.raises(ValueError, match=message):
        broadcast_params(params, 2)


def test_params_are_for_all_or_one_each():
    one, other = SamplingParams(), BeamSearchParams(beam_width=2, max_tokens=3)
    assert broadcast_params(None, 2) == [one, one]
    assert broadcast_params(other, 2) == [other, other]
    assert broadcast_params((one, other), 2) == [one, other]
