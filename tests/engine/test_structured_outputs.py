"""Outputs under a grammar: always what it asks for, whatever else the engine is at."""

import dataclasses
import functools
import itertools
import json
import logging
import re
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import llguidance
import numpy as np
import pytest
from scipy import special

from pallas_paged.engine import (
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
)
from pallas_paged.engine.core.grammar import NUM_MASKS
from pallas_paged.engine.core.matching import mask_edits
from pallas_paged.engine.core.request import SequenceGroup
from pallas_paged.engine.core.scheduled import ScheduledSequence
from pallas_paged.engine.core.speculation import (
    DraftModelSettings,
    ModelProposer,
    NgramProposer,
    NgramSettings,
)
from pallas_paged.engine.device.row_state import LogitInputs, RowState, apply_rules, edit_masks
from pallas_paged.engine.engine import Engine
from pallas_paged.engine.text.grammars import Grammars, TokenMatcher
from pallas_paged.engine.text.tokenizer import Tokenizer, load_tokenizer
from pallas_paged.models.demo import DEMO_MODEL
from tests.engine import mock_model, small_tokenizers
from tests.engine.bigram_model import make_engine, run
from tests.engine.serving import assert_idle, make_llm, nothing_compiles
from tests.engine.test_plan import ByBytes

VOCAB_SIZE = 340
"""Ten more than the tokenizer has, and these are the likeliest."""
EOS = (1, 2)
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["é", 1]}},
    "required": ["n", "b"],
    "additionalProperties": False,
}
CHOICES = ("ab", "abc", "Größe 😀", "你好", "a|b", "{1}")


def table(seed: int = 0) -> np.ndarray:
    logits = np.random.default_rng(seed).standard_normal((VOCAB_SIZE, VOCAB_SIZE)) * 2
    logits[:, 330:] += 20
    return logits.astype(np.float32)


TABLE = table()


def is_of_schema(text: str) -> bool:
    value = json.loads(text)
    return set(value) == {"n", "b"} and 0 <= value["n"] <= 99 and value["b"] in ("é", 1)


def matches(pattern: str) -> Callable[[str], bool]:
    return lambda text: re.fullmatch(pattern, text) is not None


KINDS: dict[str, tuple[StructuredOutputsParams, Callable[[str], bool]]] = {
    "json": (StructuredOutputsParams(json=SCHEMA, disable_any_whitespace=True), is_of_schema),
    "json with whitespace": (
        StructuredOutputsParams(json=json.dumps(SCHEMA), whitespace_pattern=r"[ \n]?"),
        is_of_schema,
    ),
    "json_object": (
        StructuredOutputsParams(json_object=True, disable_any_whitespace=True),
        lambda text: isinstance(json.loads(text), dict),
    ),
    "regex": (StructuredOutputsParams(regex=r"[a-c]{2}-\d{1,3}"), matches(r"[a-c]{2}-\d{1,3}")),
    "regex of much": (StructuredOutputsParams(regex=r"(.|\n){3,9}"), lambda text: True),
    "choice": (StructuredOutputsParams(choice=CHOICES), CHOICES.__contains__),
    "grammar": (
        StructuredOutputsParams(grammar='start: pair ("," pair)*\npair: /[xy]/ "=" ("1" | "é")'),
        matches(r"[xy]=[1é](,[xy]=[1é])*"),
    ),
}
BASE = SamplingParams(temperature=1.5, max_tokens=30)
PLAIN = dataclasses.replace(BASE, max_tokens=20, ignore_eos=True, detokenize=False)


def under(name: str, seed: int = 0, **fields: Any) -> SamplingParams:
    return dataclasses.replace(BASE, structured_outputs=KINDS[name][0], seed=seed, **fields)


def check(output: RequestOutput, name: str, max_tokens: int = BASE.max_tokens or 0) -> None:
    """Asserts that all completions of a request are whole, or as long as they may be."""
    for completion in output.outputs:
        if completion.finish_reason == "length":
            assert len(completion.token_ids) == max_tokens
            continue
        assert (completion.finish_reason, completion.stop_reason) == ("stop", None)
        assert KINDS[name][1](completion.text), completion.text
        assert len(completion.token_ids) <= max_tokens


def load(kind: Callable[[], Any], folder: Path) -> Tokenizer:
    kind().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(small_tokenizers.byte_level, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def make(tokenizer: Tokenizer) -> Callable[..., Engine]:
    fixed = {"tokenizer": tokenizer, "eos_token_ids": EOS, "num_blocks": 25}
    return lambda **options: make_engine(TABLE, **fixed | options)


@pytest.fixture(scope="module")
def engine(make: Callable[..., Engine]) -> Engine:
    return make()


def prompts(count: int) -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(3, 330, rng.integers(1, 25)).tolist() for _ in range(count)]


def tokens_of(outputs: Sequence[RequestOutput]) -> list[list[tuple[int, ...]]]:
    return [[one.token_ids for one in output.outputs] for output in outputs]


# ---- what comes out -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_outputs_are_what_was_asked_for(engine: Engine, name: str) -> None:
    asked = [under(name, seed) for seed in range(24)]
    outputs = run(engine, prompts(24), asked)
    for output in outputs:
        check(output, name)
    ends = [output.outputs[0].finish_reason for output in outputs]
    assert ends.count("stop") > (1 if name == "json_object" else 8)
    assert len({output.outputs[0].text for output in outputs}) > 3
    assert max(max(output.outputs[0].token_ids) for output in outputs) < 330


MIXED = [
    (name, under(name, seed, n=1 + seed % 2, **fields))
    for seed, fields in enumerate(
        [{}, {"frequency_penalty": 0.5}, {"logprobs": 2}, {"logit_bias": {40: 3.0}, "top_k": 40}]
    )
    for name in KINDS
]


@functools.cache
def alone(engine: Engine) -> list[list[tuple[int, ...]]]:
    """Returns the tokens of all requests of `MIXED`, each of which ran alone."""
    asked = zip(prompts(len(MIXED)), MIXED, strict=True)
    return [tokens_of(run(engine, [prompt], [one]))[0] for prompt, (_, one) in asked]


OPTIONS: dict[str, dict[str, Any]] = {
    "preempted and computed again": {},
    "preempted and swapped": {"num_host_blocks": 40},
    "one step after the other": {"async_scheduling": False},
    "prefixes cached": {"enable_prefix_caching": True},
    "several steps at once": {"num_scheduler_steps": 4},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_in_any_company_everybody_gets_what_they_get_alone(
    engine: Engine, make: Callable[..., Engine], options: dict[str, Any]
) -> None:
    other = make(**options)
    plain = [dataclasses.replace(PLAIN, seed=seed) for seed in range(len(MIXED) // 2)]
    plain[1] = dataclasses.replace(plain[1], repetition_penalty=1.3, n=2)
    plain[2] = dataclasses.replace(plain[2], ignore_eos=False, temperature=0)
    asked = prompts(len(MIXED))
    expected = [tokens_of(run(engine, [p], [one]))[0] for p, one in zip(asked, plain, strict=False)]
    both = [one for _, one in MIXED] + plain
    order = np.random.default_rng(1).permutation(len(both))
    outputs = run(other, [(asked + asked)[i] for i in order], [both[i] for i in order])
    by_place = dict(zip(order.tolist(), outputs, strict=True))
    for place, (name, _) in enumerate(MIXED):
        check(by_place[place], name)
    assert tokens_of([by_place[place] for place in range(len(both))]) == alone(engine) + expected
    assert sum(output.metrics.num_preemptions for output in outputs) > 1


PROPOSERS = {
    "ngram": lambda: (NgramProposer(NgramSettings(3, min_gain=0.5)), None),
    "draft": lambda: (ModelProposer(DraftModelSettings(3, "", min_gain=0.5)), table(1)),
}


@pytest.mark.parametrize("how", PROPOSERS)
def test_tokens_are_guessed_of_others_alone(
    make: Callable[..., Engine], engine: Engine, how: str
) -> None:
    """And a grammar never lets go of the host, however little is gained by guesses."""
    proposer, draft = PROPOSERS[how]()
    other = make(proposer=proposer, draft=draft)
    long = StructuredOutputsParams(regex="[ab]{80}")
    asked = [
        dataclasses.replace(BASE, structured_outputs=long, max_tokens=40, seed=7),
        dataclasses.replace(PLAIN, temperature=0, max_tokens=40),
        under("json", 3),
        dataclasses.replace(PLAIN, seed=2, max_tokens=40),
    ]
    groups = [other.make_group(p, one) for p, one in zip(prompts(4), asked, strict=True)]
    assert [group.waits_for_host for group in groups] == [True] * 4
    assert [group.speculates for group in groups] == [False, True, False, True]
    outputs = run(other, prompts(4), asked)
    assert proposer.num_drafts > 0
    assert tokens_of(outputs) == [
        tokens_of(run(engine, [p], [one]))[0] for p, one in zip(prompts(4), asked, strict=True)
    ]


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_no_text_is_lost_at_the_end(engine: Engine, kind: RequestOutputKind) -> None:
    wanted = StructuredOutputsParams(choice=["Größe 😀", "你好"])
    asked = dataclasses.replace(BASE, structured_outputs=wanted, output_kind=kind, seed=1)
    engine.add(engine.make_group([5], asked))
    texts = []
    while engine.has_unfinished:
        texts += [output.outputs[0].text for output in engine.step()]
    whole = "".join(texts) if kind is RequestOutputKind.DELTA else texts[-1]
    assert whole in wanted.choice


def test_logprobs_are_the_models_own(engine: Engine) -> None:
    (output,) = run(engine, [[9, 4]], [under("json", logprobs=2)])
    completion, before = output.outputs[0], 4
    for token, found in zip(completion.token_ids, completion.logprobs, strict=True):
        row = special.log_softmax(TABLE[before])
        assert found[token].logprob == pytest.approx(row[token], abs=1e-4)
        assert found[token].rank > 2  # the likeliest are no tokens of the tokenizer
        assert set(np.argsort(-row)[:2].tolist()) <= set(found)
        before = token


def test_processed_logprobs_are_of_what_the_grammar_lets_follow(
    make: Callable[..., Engine],
) -> None:
    engine = make(logprobs_mode="processed", max_logprobs=-1)
    (output,) = run(engine, [[9, 4]], [under("regex", logprobs=-1)])
    completion, before, text = output.outputs[0], 4, ""
    beginning = re.compile("[a-c]{0,2}|[a-c]{2}-[\\d\N{REPLACEMENT CHARACTER}]*")  # parts of digits
    for token, found in zip(completion.token_ids, completion.logprobs, strict=True):
        left = [other for other, one in found.items() if np.isfinite(one.logprob)]
        assert token in left
        texts = [text + found[other].decoded_token for other in left if other not in EOS]
        assert all(map(beginning.fullmatch, texts))
        expected = special.log_softmax(TABLE[before][left].astype(np.float64) / 1.5)
        values = [found[other].logprob for other in left]
        np.testing.assert_allclose(values, expected, atol=1e-4)
        before, text = token, text + found[token].decoded_token
    assert completion.finish_reason == "stop"


def test_a_real_model_under_preemption_both_ways() -> None:
    llm = make_llm(
        DEMO_MODEL,
        num_blocks=30,
        block_size=4,
        max_num_seqs=6,
        max_num_batched_tokens=16,
        max_model_len=96,
        preemption_mode="swap",
        swap_space=0.01,
        deterministic=True,
    )
    count, found = 0, []
    llm.engine.core.scheduler._choose_recovery = lambda group: (
        "swap" if group.arrival % 2 else "recompute"
    )
    asked = [
        dataclasses.replace(one, max_tokens=40, seed=seed)
        for seed in range(3)
        for one in (under("json with whitespace"), under("choice", n=2), PLAIN)
    ]
    texts = ["def main(argv: list[str]) -> None:\n    print("] * len(asked)
    for chosen in ([[i] for i in range(len(asked))], [range(len(asked))]):
        outputs = []
        for places in chosen:
            params = [asked[i] for i in places]
            outputs += llm.generate([texts[i] for i in places], params, use_tqdm=False)
            assert_idle(llm)
        count = sum(output.metrics.num_preemptions for output in outputs)
        found.append(tokens_of(outputs))
        for output, one in zip(outputs, asked, strict=True):
            if one.structured_outputs is not None:
                name = "choice" if one.n == 2 else "json with whitespace"
                check(output, name, max_tokens=40)
    assert count > 3
    assert llm.kv_stats().num_swaps > 0
    assert found[0] == found[1]


# ---- how it ends ---------------------------------------------------------------------------------


def one_output(engine: Engine, params: SamplingParams) -> Any:
    (output,) = run(engine, [[7, 8, 9]], [params])
    return output.outputs[0]


def asking(seed: int = 0, **fields: Any) -> SamplingParams:
    wanted = StructuredOutputsParams(**fields)
    return dataclasses.replace(BASE, structured_outputs=wanted, seed=seed)


def test_it_ends_with_the_token_behind_which_nothing_may_follow(engine: Engine) -> None:
    for seed in range(5):
        completion = one_output(engine, asking(seed, regex="a?bc"))
        assert completion.text in ("bc", "abc")
        assert not set(EOS) & set(completion.token_ids)
        ended = one_output(engine, asking(seed, regex="ab{0,2}"))
        is_full = ended.text == "abb"
        assert (ended.token_ids[-1] in EOS) != is_full
        assert ended.finish_reason == "stop"


def test_each_eos_token_ends_it_exactly_where_it_may_end(engine: Engine) -> None:
    last = {one_output(engine, asking(seed, regex="a*")).token_ids[-1] for seed in range(16)}
    assert last == set(EOS)


def test_a_token_too_few_is_an_end_by_length(engine: Engine) -> None:
    wanted = asking(regex="[0-9]{9}")
    completion = one_output(engine, dataclasses.replace(wanted, max_tokens=4))
    assert completion.finish_reason == "length"
    assert matches("[0-9]{4,8}")(completion.text)
    one = one_output(engine, dataclasses.replace(asking(choice=["a"]), max_tokens=1))
    assert (one.text, one.finish_reason) == ("a", "stop")


def test_without_an_eos_token_it_ends_when_it_is_whole(make: Callable[..., Engine]) -> None:
    engine = make(eos_token_ids=())
    for seed in range(5):
        completion = one_output(engine, asking(seed, json=SCHEMA, disable_any_whitespace=True))
        assert completion.finish_reason == "stop"
        assert is_of_schema(completion.text)
    nothing = one_output(engine, asking(regex=""))
    assert (nothing.text, nothing.token_ids, nothing.finish_reason) == ("", (), "stop")
    assert one_output(engine, asking(regex="a*")).finish_reason == "length"


def test_an_eos_token_that_is_text_ends_nothing_before_the_end(
    make: Callable[..., Engine], tokenizer: Tokenizer
) -> None:
    (b,) = tokenizer.encode("b", add_special_tokens=False)
    engine = make(eos_token_ids=(1, b))
    for seed in range(8):
        completion = one_output(engine, asking(seed, regex="(a[bc]){2}"))
        assert matches("acac")(completion.text)
        assert completion.finish_reason == "stop"


def test_rules_that_leave_no_token_end_that_request_alone(
    engine: Engine, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    a, x = (tokenizer.encode(text, add_special_tokens=False)[0] for text in "ax")
    no_way = dataclasses.replace(asking(regex="a[bc]"), allowed_token_ids=[a, x])
    whole = dataclasses.replace(asking(regex="aa*"), allowed_token_ids=[a], max_tokens=3)
    bad = dataclasses.replace(asking(regex="a[bc]"), bad_words=["b", "c"])
    ended = dataclasses.replace(asking(regex="x?a"), allowed_token_ids=[a])
    with caplog.at_level(logging.ERROR):
        outputs = run(engine, prompts(5), [no_way, whole, bad, ended, under("json")])
    completions = [output.outputs[0] for output in outputs]
    for place in (0, 2):
        assert completions[place].finish_reason == "abort"
        assert "structured_outputs exclude all" in completions[place].stop_reason
        assert completions[place].text == "a"
    assert (completions[1].text, completions[1].finish_reason) == ("aaa", "length")
    assert (completions[3].text, completions[3].finish_reason) == ("a", "stop")
    check(outputs[4], "json")
    assert len(caplog.records) == 2


def test_rules_that_leave_nothing_but_a_whole_output_end_it(
    make: Callable[..., Engine], tokenizer: Tokenizer
) -> None:
    (a,) = tokenizer.encode("a", add_special_tokens=False)
    once = dataclasses.replace(
        asking(regex="a[bc]?"), allowed_token_ids=[a], output_kind=RequestOutputKind.FINAL_ONLY
    )
    completion = one_output(make(), once)
    assert (completion.text, completion.finish_reason) == ("a", "stop")


def test_a_token_that_the_grammar_refuses_ends_that_request_alone(
    make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Which must not happen: here the masks are wrong."""
    find = Grammars.find_masks
    monkeypatch.setattr(Grammars, "find_masks", lambda self, found: find(self, found) | -1)
    plain = dataclasses.replace(PLAIN, seed=1)
    engine = make()
    with caplog.at_level(logging.ERROR):
        outputs = run(engine, prompts(2), [under("json"), plain])
    (completion,) = outputs[0].outputs
    assert completion.finish_reason == "abort"
    assert completion.stop_reason.startswith("structured_outputs: ")
    assert outputs[1].outputs[0].finish_reason == "length"
    assert len(caplog.records) == 1


def test_an_eos_token_that_came_too_early_is_a_fault(tokenizer: Tokenizer) -> None:
    grammar = Grammars(tokenizer, VOCAB_SIZE, EOS).compile(StructuredOutputsParams(regex="ab?"))
    assert grammar is not None
    early, late = grammar.start(), grammar.start()
    early.take([EOS[0]])
    assert early.fault is not None
    assert "unfinished" in early.fault
    late.take(tokenizer.encode("a", add_special_tokens=False))
    assert (late.is_over, late.may_end) == (False, True)
    late.take([EOS[1]])
    assert (late.is_over, late.fault, late.num_taken) == (True, None, 2)


@pytest.mark.parametrize("text", ["<|user|>", "é<|eos|>é", "a<|user|><|assistant|>.", "b<|use"])
def test_forced_text_may_spell_a_token_that_is_no_text(text: str) -> None:
    tokenizer = load_tokenizer(DEMO_MODEL)
    assert tokenizer is not None
    grammars = Grammars(tokenizer, 2048, (1,))
    grammar = grammars.compile(StructuredOutputsParams(choice=[text]))
    assert grammar is not None
    matcher, tokens = grammar.start(), []
    while not matcher.may_end:
        (words,) = grammars.find_masks([matcher])
        allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
        tokens.append(int(allowed[0]))
        matcher.take(tokens[-1:])
        assert matcher.fault is None
    assert tokenizer.decode(tokens) == text


def test_a_limit_that_is_met_on_the_way_ends_that_request_alone(engine: Engine) -> None:
    many = " | ".join(f'"b{i}"' for i in range(3000))
    completion = one_output(engine, asking(grammar=f'start: "a" x\nx: {many}'))
    assert completion.finish_reason == "abort"
    assert "Current row has 300" in completion.stop_reason
    assert one_output(engine, asking(choice=["yes"])).text == "yes"


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "needs exactly one of json, json_object, regex, choice, grammar, and has none"),
        ({"regex": "a", "choice": ["a"]}, "and has regex and choice"),
        ({"json_object": 1}, "json_object=1 must be True or False"),
        ({"json": 5}, "json=5 must be a JSON schema"),
        ({"json": "[1]"}, "is no JSON schema: a schema is an object"),
        ({"json": "{"}, "is no JSON schema: Expecting"),
        ({"json": {"a": {1, 2}}}, "is no JSON schema: Object of type set"),
        ({"json": {"minimum": float("nan")}}, "is no JSON schema: Out of range"),
        ({"json": {"title": "x" * 70_000}}, "json has 700.. characters, and 65536 are the most"),
        ({"regex": 3}, "regex=3 must be a string"),
        ({"regex": "\ud800"}, "regex holds '.ud800'"),
        ({"regex": "a" * 8193}, "regex has 8193 characters, and 8192 are the most"),
        ({"choice": []}, "choice=.. must have at least one string"),
        ({"choice": "ab"}, "choice='ab' must be a list of strings"),
        ({"choice": ["a", ""]}, "none of them empty"),
        ({"grammar": ""}, "grammar='' has no rule"),
        ({"regex": "a", "whitespace_pattern": " "}, "is for json and json_object, not for regex"),
        ({"choice": ["a"], "disable_any_whitespace": True}, "is for json and json_object"),
        ({"json_object": True, "whitespace_pattern": "x*"}, "must be made of blanks"),
        ({"json_object": True, "whitespace_pattern": "[ -~]"}, "must be made of blanks"),
        ({"json_object": True, "whitespace_pattern": "4"}, "must be made of blanks"),
        (
            {"json_object": True, "whitespace_pattern": " ", "disable_any_whitespace": True},
            "excludes disable_any_whitespace=True",
        ),
    ],
)
def test_fields_that_cannot_be(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        StructuredOutputsParams(**fields)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stop", "x"),
        ("stop_token_ids", [3]),
        ("include_stop_str_in_output", True),
        ("ignore_eos", True),
        ("min_tokens", 1),
    ],
)
def test_what_would_cut_an_output_is_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field}=.* excludes structured_outputs"):
        dataclasses.replace(under("json"), **{field: value})


def test_it_must_be_structured_outputs_params() -> None:
    with pytest.raises(ValueError, match=r"structured_outputs=.* must be StructuredOutputsParams"):
        SamplingParams(structured_outputs={"regex": "a"})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"regex": "a("}, r"structured_outputs: regex='a\(' cannot be used: .*unclosed group"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": "(?<=a)b"}, "regex=.*look-around"),
        ({"json": {"type": "strin"}}, "structured_outputs: json=.* Invalid type: strin"),
        ({"json": {"not": {"type": "string"}}}, "Unimplemented keys"),
        ({"json": {"$ref": "#"}}, "json=.* cannot be used"),
        ({"grammar": "start: other"}, 'grammar=.* unknown name: "other"'),
        ({"grammar": "a"}, "grammar='a' cannot be used"),
        ({"grammar": "start: " + "(" * 999}, "too deeply nested"),
    ],
)
def test_what_llguidance_refuses_is_refused_at_arrival(
    engine: Engine, fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        engine.make_group([3], asking(**fields))
    assert len(str(caught.value)) < 500
    engine.check_idle()


def test_a_long_chain_of_rules_does_not_overflow_the_stack(engine: Engine) -> None:
    names = ["start", *(f"r{i}" for i in range(4500))]
    rules = [f"{one}:{other}" for one, other in itertools.pairwise(names)]
    assert one_output(engine, asking(grammar="\n".join([*rules, f'{names[-1]}:"a"']))).text == "a"


def test_grammars_need_a_fast_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    wanted = StructuredOutputsParams(choice=["a"])
    with pytest.raises(ValueError, match=r"structured_outputs \(choice\) need a tokenizer .* none"):
        Grammars(None, VOCAB_SIZE, EOS).compile(wanted)
    slow = load(small_tokenizers.byte_level, tmp_path)
    slow.backend = None
    with pytest.raises(ValueError, match="slow one; use a folder with"):
        Grammars(slow, VOCAB_SIZE, EOS).compile(wanted)
    with pytest.raises(ValueError, match=r"does not know how to use that of .*WordPiece"):
        Grammars(load(small_tokenizers.word_piece, tmp_path), VOCAB_SIZE, EOS).compile(wanted)


def test_another_kind_of_tokenizer_and_one_larger_than_the_model(tmp_path: Path) -> None:
    tokenizer = load(small_tokenizers.byte_fallback, tmp_path)
    assert tokenizer.vocab_size > 320
    engine = make_engine(TABLE[:320, :320], tokenizer=tokenizer, eos_token_ids=(2,))
    wanted = ["The fox", "Größe", "你好"]
    for seed in range(6):
        completion = one_output(engine, asking(seed, choice=wanted))
        assert completion.text in wanted
        assert max(completion.token_ids) < 320


# ---- parts ---------------------------------------------------------------------------------------


def test_equal_grammars_are_compiled_once_and_few_are_kept(tokenizer: Tokenizer) -> None:
    grammars = Grammars(tokenizer, VOCAB_SIZE, EOS)
    texts = json.dumps(SCHEMA), json.dumps(SCHEMA, indent=2)
    first, second, third = (
        grammars.compile(StructuredOutputsParams(json=one)) for one in (SCHEMA, *texts)
    )
    assert first is second is third
    assert grammars.compile(StructuredOutputsParams(json=SCHEMA, disable_any_whitespace=True))
    assert grammars.compiled.cache_info().misses == 2
    for number in range(140):
        grammars.compile(StructuredOutputsParams(regex=f"{number}"))
    assert grammars.compiled.cache_info().currsize == 128


class OneToken:
    """A matcher behind whose first token nothing may follow."""

    fault = None

    def __init__(self) -> None:
        self.num_taken = 0

    @property
    def is_over(self) -> bool:
        return self.num_taken > 0

    may_end = is_over

    def take(self, token_ids: Sequence[int]) -> None:
        self.num_taken += len(token_ids)


def rules_of_one_token() -> Any:
    return types.SimpleNamespace(grammar=types.SimpleNamespace(start=OneToken))


@pytest.mark.parametrize("loses_its_row", [False, True])
def test_the_token_that_ends_it_may_come_after_a_preemption(loses_its_row: bool) -> None:
    scheduler = mock_model.make_engine().scheduler
    group = SequenceGroup("whole", (1, 2), 9, logit_rules=rules_of_one_token())
    scheduler.add(group)
    step = scheduler.schedule()
    assert step is not None
    assert scheduler.schedule() is None  # it waits for the host
    if loses_its_row:
        scheduler._preempt(group)
    committed = scheduler.commit(step, [5])
    assert committed.others == group.sequences
    assert group.is_finished
    assert (group.sequences[0].finish_reason, group.sequences[0].stop_reason) == ("stop", None)
    assert not scheduler.has_unfinished
    scheduler.check_invariants()


def test_a_fault_that_a_mask_brings_leaves_no_token(tokenizer: Tokenizer) -> None:
    grammars = Grammars(tokenizer, VOCAB_SIZE, EOS)
    grammar = grammars.compile(StructuredOutputsParams(regex="[ab]c?"))
    assert grammar is not None
    make, limits = llguidance.LLMatcher, llguidance.LLParserLimits(max_lexer_states=3)
    state = make(
        grammars._vocabulary.tokenizer,
        make.grammar_from_regex("[a-z]{3,80}x?"),
        log_level=0,
        limits=limits,
    )
    limited, refused, fine = TokenMatcher(state, frozenset(EOS)), grammar.start(), grammar.start()
    refused.take(tokenizer.encode("x", add_special_tokens=False))
    masks = grammars.find_masks([limited, refused, fine])
    assert masks.any(axis=1).tolist() == [False, False, True]
    assert limited.fault is not None
    assert "too many states" in limited.fault
    assert refused.fault is not None
    assert fine.fault is None


def test_masks_fit_into_edits_of_one_size() -> None:
    """More of them than one edit holds; rows that do not sample, or have no grammar, get none."""
    rules = rules_of_one_token()
    scheduled = []
    for number in range(3 * NUM_MASKS):
        mine = rules if number % 3 else None
        group = SequenceGroup(f"{number}", (1, 2), 9, logit_rules=mine)
        samples = number % 5 > 0
        scheduled.append(ScheduledSequence(group.sequences[0], 100 + number, 0, 2, samples, False))
    rows = [one.row for number, one in enumerate(scheduled) if number % 3 and number % 5]
    masks = np.random.default_rng(0).integers(-(2**31), 2**31, (len(rows), 4)).astype(np.int32)
    edits = mask_edits(scheduled, 999, lambda matchers: masks)
    assert {edit.shape for edit in edits} == {(NUM_MASKS, 5)}
    whole = np.concatenate(edits)
    assert len(edits) == 2
    assert whole[: len(rows), 0].tolist() == rows
    assert (whole[len(rows) :, 0] == 999).all()
    np.testing.assert_array_equal(whole[: len(rows), 1:], masks)
    assert mask_edits(scheduled[:1], 999, lambda matchers: masks) == []


def test_masks_on_the_device() -> None:
    """Behind bias and penalties; of rows that use none, no bit of theirs is looked at."""
    rng, (B, R, V) = np.random.default_rng(0), (4, 6, 75)
    logits = rng.standard_normal((B, V)).astype(np.float32)
    is_left = rng.random((R + 1, 96)) < 0.3
    words = np.packbits(is_left, axis=1, bitorder="little").view(np.int32)
    edit = np.concatenate([np.arange(R + 1, dtype=np.int32)[:, None], words], axis=1)
    state = RowState.zeros(R, V)
    masks = edit_masks(state.masks, jnp.asarray(edit))
    state = state._replace(counts=state.counts + 2, bias=state.bias + 1, masks=masks)
    rows, used = np.array([2, 5, 0, R]), np.array([1, 0, 1, 0])
    ones, floats = jnp.ones(B, jnp.int32), jnp.full(B, 1.5, jnp.float32)
    inputs = LogitInputs(jnp.asarray(rows), ones, ones, jnp.asarray(used), floats, floats, floats)
    none = inputs._replace(uses_mask=0 * ones)
    bare = np.asarray(apply_rules(jnp.asarray(logits), state, none, looks=True))
    found = np.asarray(apply_rules(jnp.asarray(logits), state, inputs, looks=True))
    expected = np.where(is_left[rows, :V] | (used == 0)[:, None], bare, -np.inf)
    np.testing.assert_array_equal(found, expected)


def test_masks_travel_as_bytes(make: Callable[..., Engine], engine: Engine) -> None:
    other = make()
    device = other.core.executor = ByBytes(other.core.executor)
    asked = [under(name, seed) for seed, name in enumerate(KINDS)]
    found = run(other, prompts(len(asked)), asked)
    assert tokens_of(found) == tokens_of(run(engine, prompts(len(asked)), asked))
    assert sum(len(plan.mask_edits) for plan in device.plans) > 10


def test_steps_without_a_grammar_have_no_masks_and_are_plain(make: Callable[..., Engine]) -> None:
    other = make()
    device = other.core.executor = ByBytes(other.core.executor)
    run(other, prompts(3), [PLAIN] * 3)
    assert not any(plan.bucket.is_full or plan.mask_edits for plan in device.plans)


def test_nothing_compiles_after_warm_up(make: Callable[..., Engine]) -> None:
    engine = make()
    engine.core.executor.warm_up()
    asked = [one for _, one in MIXED] + [PLAIN] * 4
    with nothing_compiles(engine.core.executor):
        run(engine, prompts(len(asked)), asked)
