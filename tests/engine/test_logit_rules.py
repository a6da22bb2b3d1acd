"""Every field that changes logits against NumPy: alone, and beside requests that use none of it."""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pytest

from pallas_paged.engine import SamplingParams
from pallas_paged.engine.core import logit_rules
from pallas_paged.engine.core.logit_rules import resolve
from pallas_paged.engine.engine import Engine
from pallas_paged.engine.text import bad_words
from pallas_paged.engine.text.detokenizer import Detokenizer, WindowDetokenizer
from pallas_paged.engine.text.tokenizer import load_tokenizer
from tests.engine import small_tokenizers
from tests.engine.bigram_model import (
    EOS,
    VOCAB_SIZE,
    expected,
    make_engine,
    make_table,
    run,
)

TABLE = make_table()
BASE = SamplingParams(temperature=0.8, max_tokens=24, seed=5, ignore_eos=True)


class Letters:
    """A tokenizer of single letters and a few words: "a" is 1; "xyz" and " xyz" are one token."""

    words: ClassVar = {"xyz": 21, " xyz": 22, " ": 23}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        ids = []
        while text:
            word = next((w for w in self.words if text.startswith(w)), None)
            ids.append(self.words[word] if word else ord(text[0]) - ord("a") + 1)
            text = text[len(word or text[0]) :]
        return ids

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        texts = {id: word for word, id in self.words.items()} | {0: "<eos>"}
        return "".join(texts.get(id) or chr(ord("a") + id - 1) for id in token_ids)

    def detokenizer(self, context: Sequence[int], *, skip_special_tokens: bool) -> Detokenizer:
        return WindowDetokenizer(self, context, skip_special_tokens=skip_special_tokens)

    def decode_token(self, token_id: int) -> str:
        return self.decode([token_id], skip_special_tokens=False)


def bad_sequences(params: SamplingParams) -> list[list[int]]:
    return [
        Letters().encode(text) for word in params.bad_words or () for text in (word, f" {word}")
    ]


FIELDS: dict[str, dict[str, object]] = {
    "repetition_penalty": {"repetition_penalty": 1.7},
    "repetition_penalty below 1": {"repetition_penalty": 0.6},
    "a huge repetition_penalty": {"repetition_penalty": 1e20},
    "a tiny repetition_penalty": {"repetition_penalty": 1.2e-38},
    "presence_penalty": {"presence_penalty": 1.3},
    "negative presence_penalty": {"presence_penalty": -2.0},
    "frequency_penalty": {"frequency_penalty": 0.7},
    "negative frequency_penalty": {"frequency_penalty": -0.4},
    "logit_bias": {"logit_bias": {3: 2.5, 7: -100, 11: 1.0}},
    "allowed_token_ids": {"allowed_token_ids": [2, 3, 5, 7, 11, 13]},
    "bad_words of one token": {"bad_words": ["xyz", *"bdfhjl"]},
    "bad_words of several tokens": {"bad_words": ["ab", "bc", "abc", "tgd", "ot", "xyza"]},
    "min_tokens": {"min_tokens": 7, "ignore_eos": False, "logit_bias": {EOS: 50}},
    "min_tokens and stop_token_ids": {"min_tokens": 9, "stop_token_ids": list(range(4, 20))},
    "everything": {
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "logit_bias": {2: 3.0, 3: 3.0, EOS: 9.0},
        "allowed_token_ids": list(range(15)),
        "bad_words": ["c", "bb", "gbg"],
        "min_tokens": 11,
        "stop_token_ids": [6],
        "ignore_eos": False,
    },
}


@pytest.fixture(scope="module")
def engine() -> Engine:
    """A pool that is soon full: of 4 sequences some are preempted."""
    return make_engine(TABLE, num_blocks=27, tokenizer=Letters())


def prompts(count: int) -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(1, VOCAB_SIZE, rng.integers(1, 20)).tolist() for _ in range(count)]


def params_of(fields: dict[str, object], **more: object) -> SamplingParams:
    return dataclasses.replace(BASE, **fields, **more)


def check(engine: Engine, requests: list[tuple[list[int], SamplingParams]]) -> int:
    outputs = run(engine, [p for p, _ in requests], [params for _, params in requests])
    for output, (prompt, params) in zip(outputs, requests, strict=True):
        wanted = expected(TABLE, prompt, params, bad_sequences(params))
        assert list(output.outputs[0].token_ids) == wanted, params
    return sum(output.metrics.num_preemptions for output in outputs)


@pytest.mark.parametrize("name", FIELDS)
def test_alone(engine: Engine, name: str) -> None:
    params = params_of(FIELDS[name])
    changed = 0
    for prompt in prompts(3):
        check(engine, [(prompt, params)])
        changed += expected(TABLE, prompt, params, bad_sequences(params)) != expected(
            TABLE, prompt, BASE
        )
    assert changed, "the rule must matter"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_mixed_with_requests_that_use_nothing(engine: Engine, temperature: float) -> None:
    """Every second request is plain, and its tokens are those of the plain program."""
    every = prompts(2 * len(FIELDS))
    requests = [(p, dataclasses.replace(BASE, temperature=temperature)) for p in every]
    alone = [run(engine, [p], [one])[0].outputs[0].token_ids for p, one in requests[::2]]
    for i, fields in enumerate(FIELDS.values()):
        requests[2 * i + 1] = every[2 * i + 1], params_of(fields | {"temperature": temperature})
    assert check(engine, requests) > 5
    together = run(engine, every, [params for _, params in requests])[::2]
    assert [output.outputs[0].token_ids for output in together] == alone


@pytest.mark.parametrize("async_scheduling", [True, False])
def test_many_requests_of_all_kinds(engine: Engine, async_scheduling: bool) -> None:
    """Rows change their owners, sequences their rows, and few entries fit into one edit."""
    rng = np.random.default_rng(0)
    kinds = [{}, *FIELDS.values()]
    requests = [
        (
            prompt,
            params_of(
                kinds[rng.integers(len(kinds))]
                | {"temperature": float(rng.choice([0.0, 0.7])), "max_tokens": 24},
                logprobs=[None, 3][rng.integers(2)],
            ),
        )
        for prompt in prompts(60)
    ]
    engine.core._async_scheduling = async_scheduling
    assert check(engine, requests) > 5
    engine.core._async_scheduling = True


@pytest.mark.parametrize("async_scheduling", [True, False])
def test_a_row_may_be_written_anew_before_any_token(
    engine: Engine, async_scheduling: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a preemption into another row, whether the host knows the last token or not."""
    monkeypatch.setattr(engine.core, "_async_scheduling", async_scheduling)
    params = params_of({"frequency_penalty": 0.7, "repetition_penalty": 1.3, "bad_words": ["ab"]})
    for prompt in prompts(3):
        group = engine.make_group(prompt, params)
        engine.add(group)
        while engine.has_unfinished:
            engine.step()
            engine.core._planner._row_edits._held.clear()
        wanted = expected(TABLE, prompt, params, bad_sequences(params))
        assert group.sequences[0].output_token_ids == wanted


def test_rules_that_come_to_exclude_everything_end_only_their_request(engine: Engine) -> None:
    only_a = params_of({"allowed_token_ids": [1], "bad_words": ["aaa"]})
    first, second = run(engine, [[5], [6]], [only_a, BASE])
    assert first.outputs[0].token_ids == (1, 1)
    assert first.outputs[0].finish_reason == "abort"
    assert first.outputs[0].stop_reason.startswith("no token is left: allowed_token_ids")
    assert list(second.outputs[0].token_ids) == expected(TABLE, [6], BASE)


def test_a_stop_string_counts_only_after_min_tokens(engine: Engine) -> None:
    fields = {"allowed_token_ids": [1], "stop": "a", "ignore_eos": False}
    for min_tokens in (0, 1, 5, 24):
        (output,) = run(engine, [[5]], [params_of(fields, min_tokens=min_tokens)])
        (completion,) = output.outputs
        assert len(completion.token_ids) == min(min_tokens + 1, 24)
        assert completion.text == "a" * min_tokens
        assert completion.finish_reason == ("stop" if min_tokens < 24 else "length")


REFUSED = [
    ({"logit_bias": {24: 1}}, "logit_bias holds 24, which is outside the vocabulary of 24"),
    ({"allowed_token_ids": [1, 30]}, "allowed_token_ids holds 30, which is outside"),
    ({"allowed_token_ids": [1], "bad_words": ["a"]}, "bad_words=.*excludes all of allowed_token"),
    (
        {"allowed_token_ids": [0, 4], "min_tokens": 1, "ignore_eos": False, "stop_token_ids": [4]},
        "min_tokens=1 excludes the tokens that end the request, and allowed_token_ids",
    ),
    ({"min_tokens": 60, "max_tokens": None}, "min_tokens=60 is more than the 54 tokens that fit"),
    ({"logprobs": 21}, "logprobs=21 is more than the engine's max_logprobs=20"),
    ({"logprobs": -1}, "logprobs=-1 is more than the engine's max_logprobs=20"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_what_cannot_be_is_refused_by_name(
    engine: Engine, fields: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        engine.make_group([1] * 10, params_of(fields))


def test_bad_words_need_a_tokenizer(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_parts", dataclasses.replace(engine._parts, tokenizer=None))
    with pytest.raises(ValueError, match=r"bad_words=.*needs a tokenizer; .*logit_bias of -100"):
        engine.make_group([1], params_of({"bad_words": ["a"]}))


def resolved(
    params: SamplingParams, tokenizer: Any, *, vocab_size: int, ending_ids: Sequence[int] = ()
) -> logit_rules.LogitRules | None:
    bad = bad_words.bad_sequences(params.bad_words, tokenizer, vocab_size)
    return resolve(params, bad_sequences=bad, vocab_size=vocab_size, ending_ids=ending_ids)


def sequences(tokenizer: Any, word: str) -> set[str]:
    """Returns what the rules for one bad word exclude, as texts of tokens joined by |."""
    params = SamplingParams(bad_words=[word])
    rules = resolved(params, tokenizer, vocab_size=tokenizer.vocab_size)
    assert rules is not None
    assert set(rules.values.values()) <= {-math.inf}
    found = [*((token,) for token in rules.values), *rules.bad_sequences]
    return {"|".join(tokenizer.implementation.convert_ids_to_tokens(ids)) for ids in found}


WORDS = [
    (small_tokenizers.byte_level, "\n", {"Ċ"}),
    (small_tokenizers.byte_level, " ", {"Ġ"}),
    (small_tokenizers.byte_level, "  x", {"Ġ|Ġ|x"}),
    (small_tokenizers.byte_level, " x", {"Ġ|x"}),
    (small_tokenizers.byte_level, "x", {"x", "Ġ|x"}),
    (small_tokenizers.byte_level, ",", {",", "Ġ|,"}),
    # What is put in front of a text is not there behind a word.
    (small_tokenizers.metaspace, " ", {"▁"}),
    (small_tokenizers.metaspace, "the", {"▁the"}),
    (small_tokenizers.metaspace, ",", {"▁|,", ","}),
    (small_tokenizers.byte_fallback, "\n", {"▁|\n", "\n"}),
    (small_tokenizers.byte_fallback, ",", {"▁|,", ","}),
]


@pytest.mark.parametrize(("kind", "word", "expected"), WORDS)
def test_a_bad_word_bans_itself_and_no_other(
    kind: Any, word: str, expected: set[str], tmp_path: pathlib.Path
) -> None:
    kind().save(str(tmp_path / "tokenizer.json"))
    assert sequences(load_tokenizer(tmp_path), word) == expected


def test_tokens_that_the_model_lacks_need_no_ban(tmp_path: pathlib.Path) -> None:
    small_tokenizers.byte_level().save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    the = tokenizer.encode("the", add_special_tokens=False)
    params = SamplingParams(bad_words=["the"])
    assert resolved(params, tokenizer, vocab_size=min(the)) is None
    assert resolved(params, tokenizer, vocab_size=330) is not None


@pytest.mark.parametrize("name", [None, *FIELDS])
def test_the_cost_does_not_depend_on_the_vocabulary(
    name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise AssertionError("the vocabulary is not to be listed")

    monkeypatch.setattr(logit_rules, "range", refuse, raising=False)
    params = BASE if name is None else params_of(FIELDS[name])
    monkeypatch.setattr(bad_words, "range", refuse, raising=False)
    rules = resolved(params, Letters(), vocab_size=24, ending_ids=[EOS])
    assert (rules is None) == (name is None)


def test_everything_may_be_excluded_without_a_list() -> None:
    every = Letters()
    words = [every.decode([token], skip_special_tokens=False) for token in range(1, 24)]
    params = SamplingParams(bad_words=words, min_tokens=1)
    assert resolved(params, every, vocab_size=24) is not None
    with pytest.raises(ValueError, match=r"min_tokens=1 excludes .* the vocabulary has no other"):
        resolved(params, every, vocab_size=24, ending_ids=[EOS])
    with pytest.raises(ValueError, match="excludes all of the vocabulary"):
        resolved(params, Zero(), vocab_size=1)


class Zero:
    """Everything is token 0."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [0]
