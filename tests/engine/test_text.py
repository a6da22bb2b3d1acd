"""Text in and out through `LLM`, over the model that ships with the package."""

import dataclasses
import itertools
import shutil
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest

from pallas_paged.engine import LLM, SamplingParams
from pallas_paged.engine.text.detokenizer import Detokenizer, WindowDetokenizer
from pallas_paged.models.demo import DEMO_MODEL
from tests.engine.serving import assert_idle

PROMPTS = ("def read(path):\n", "class Stack:\n", "import os\n", "for key in")
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(
        DEMO_MODEL,
        dtype="float32",
        max_num_seqs=4,
        max_num_batched_tokens=64,
        num_blocks=64,
        compilation_cache_dir=None,
    )


def generate(llm: LLM, prompts: Any, params: Any = GREEDY) -> list:
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert_idle(llm)
    return outputs


def test_text_is_the_decoded_tokens(llm: LLM) -> None:
    for prompt, output in zip(PROMPTS, generate(llm, PROMPTS), strict=True):
        completion = output.outputs[0]
        assert output.prompt == prompt
        assert output.prompt_token_ids == tuple(llm.tokenizer.encode(prompt))
        whole = llm.tokenizer.decode([*output.prompt_token_ids, *completion.token_ids])
        assert whole == prompt + completion.text


def test_streamed_text_only_grows_and_ends_as_generated(llm: LLM) -> None:
    texts: dict[str, list[str]] = {}
    for output in llm.stream(PROMPTS, GREEDY):
        texts.setdefault(output.prompt, []).append(output.outputs[0].text)
    assert_idle(llm)
    for output in generate(llm, PROMPTS):
        pieces = texts[output.prompt]
        assert len(pieces) == 24
        assert all(b.startswith(a) for a, b in itertools.pairwise(pieces))
        assert pieces[-1] == output.outputs[0].text


def test_a_stop_string_cuts_the_text_and_ends_the_request(llm: LLM) -> None:
    (whole,) = generate(llm, PROMPTS[0])
    text = whole.outputs[0].text
    stop = text[12:15]
    end = text.index(stop)
    (cut,) = generate(llm, PROMPTS[0], dataclasses.replace(GREEDY, stop=[stop, "never there"]))
    assert cut.outputs[0].text == text[:end]
    assert (cut.outputs[0].finish_reason, cut.outputs[0].stop_reason) == ("stop", stop)
    assert len(cut.outputs[0].token_ids) < 24
    params = dataclasses.replace(GREEDY, stop=stop, include_stop_str_in_output=True)
    (kept,) = generate(llm, PROMPTS[0], params)
    assert kept.outputs[0].text == text[: end + len(stop)]
    # Also when the last allowed token is what completes it.
    params = dataclasses.replace(params, max_tokens=len(kept.outputs[0].token_ids))
    (last,) = generate(llm, PROMPTS[0], params)
    assert last.outputs[0] == kept.outputs[0]


def test_a_stop_token_ends_the_request_and_is_not_text(llm: LLM) -> None:
    (whole,) = generate(llm, PROMPTS[1])
    tokens = whole.outputs[0].token_ids
    stop = next(t for i, t in enumerate(tokens) if i >= 5 and t not in tokens[:i])
    at = tokens.index(stop)
    (cut,) = generate(llm, PROMPTS[1], dataclasses.replace(GREEDY, stop_token_ids=[stop]))
    completion = cut.outputs[0]
    assert completion.token_ids == tokens[: at + 1]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    prompt = list(cut.prompt_token_ids)
    assert PROMPTS[1] + completion.text == llm.tokenizer.decode([*prompt, *tokens[:at]])


def test_chat_goes_through_the_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Read a file."}]
    one = llm.chat(messages, GREEDY, use_tqdm=False)
    two = llm.chat([messages, messages], GREEDY, use_tqdm=False)
    assert_idle(llm)
    assert "Read a file." in one[0].prompt
    assert [o.outputs[0].text for o in two] == [one[0].outputs[0].text] * 2
    other = llm.chat(
        messages,
        GREEDY,
        use_tqdm=False,
        chat_template="x = {{ x }}{{ tools[0].name }}",
        tools=[{"name": "f"}],
        chat_template_kwargs={"x": 1},
    )
    assert other[0].prompt == "x = 1f"
    assert other[0].prompt_token_ids == tuple(
        llm.tokenizer.encode("x = 1f", add_special_tokens=False)
    )
    begun = [*messages, {"role": "assistant", "content": "def read("}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    (continued,) = llm.chat(begun, GREEDY, use_tqdm=False, **options)
    assert continued.prompt.endswith("\ndef read(")
    assert llm.chat_prompt(begun, **options)["prompt"] == continued.prompt


def test_conversations_have_priorities(llm: LLM) -> None:
    """They go the way of `generate`'s; this engine has none."""
    with pytest.raises(ValueError, match=r"priority=\[1\] needs scheduling_policy='priority'"):
        llm.chat([{"role": "user", "content": "x"}], GREEDY, priority=[1])


def test_the_tokenizer_is_the_one_of_transformers(llm: LLM) -> None:
    ids = llm.get_tokenizer()("class Stack:\n")["input_ids"]
    assert generate(llm, "class Stack:\n")[0].prompt_token_ids == tuple(ids)


def test_a_bad_conversation_is_named(llm: LLM) -> None:
    good = [{"role": "user", "content": "a"}]
    with pytest.raises(ValueError, match=r"messages\[1\]\[0\]='b' must be a mapping"):
        llm.chat([good, ["b"]], GREEDY)
    with pytest.raises(ValueError, match=r"does not accept these messages\[1\]: TypeError"):
        llm.chat([good, good + good], chat_template="{{ 1 + (messages | length == 1 or 'a') }}")
    assert_idle(llm)


def test_an_aborted_request_keeps_what_it_had(llm: LLM) -> None:
    expected = {o.prompt: o.outputs[0] for o in generate(llm, PROMPTS)}
    last = {}
    params = dataclasses.replace(GREEDY, stop=["z" * 30])  # holds text back
    for output in llm.stream(PROMPTS, params):
        last[output.prompt] = output.outputs[0]
        if output.prompt == PROMPTS[2] and len(output.outputs[0].token_ids) == 5:
            llm.abort(output.request_id)
            llm.abort(output.request_id)
    assert_idle(llm)
    aborted = last.pop(PROMPTS[2])
    assert aborted.finish_reason == "abort"
    whole = expected[PROMPTS[2]]
    assert aborted.token_ids == whole.token_ids[: len(aborted.token_ids)]
    assert aborted.text
    assert whole.text.startswith(aborted.text)
    assert all(completion.text == expected[p].text for p, completion in last.items())


def test_leaving_a_stream_early_aborts_it(llm: LLM) -> None:
    stream = llm.stream(PROMPTS, GREEDY)
    next(stream)
    stream.close()
    assert_idle(llm)
    llm.stream(PROMPTS, GREEDY)  # never iterated over: never queued
    assert_idle(llm)


def test_streams_run_beside_each_other(llm: LLM) -> None:
    expected = {o.prompt: o.outputs[0].text for o in generate(llm, PROMPTS)}
    first, second = llm.stream(PROMPTS[:2], GREEDY), llm.stream(PROMPTS[2], GREEDY)
    seen = {}
    for a, b in zip(first, second, strict=False):
        seen |= {a.prompt: a.outputs[0].text, b.prompt: b.outputs[0].text}
    (inner,) = llm.generate(PROMPTS[3], GREEDY, use_tqdm=False)
    for output in [*first, *second]:
        seen[output.prompt] = output.outputs[0].text
    assert_idle(llm)
    assert seen | {PROMPTS[3]: inner.outputs[0].text} == expected


class Broken:
    """A tokenizer whose decoder fails now and then."""

    def __init__(self, tokenizer: Any, fail_at: int):
        self.tokenizer, self.calls_left = tokenizer, fail_at

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        self.calls_left -= 1
        if self.calls_left == 0:
            raise OSError("no decoder")
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def detokenizer(self, context: Sequence[int], *, skip_special_tokens: bool) -> Detokenizer:
        return WindowDetokenizer(self, context, skip_special_tokens=skip_special_tokens)


def test_an_error_reaches_every_caller_and_the_engine_serves_on(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [o.outputs[0].text for o in generate(llm, PROMPTS)]
    outer = llm.stream(PROMPTS[:2], GREEDY)
    next(outer)
    caches = llm.runner.kv_caches

    def fail(in_flight: object) -> None:
        raise OSError("no device")

    monkeypatch.setattr(llm.runner, "collect", fail)
    with pytest.raises(OSError, match="no device"):
        llm.generate(PROMPTS[2:], dataclasses.replace(GREEDY, max_tokens=2), use_tqdm=False)
    monkeypatch.undo()
    ends = [output.outputs[0] for output in outer if output.finished]
    assert [(end.finish_reason, end.stop_reason) for end in ends] == [
        ("abort", "OSError: no device")
    ] * 2
    assert llm.runner.kv_caches is not caches
    assert_idle(llm)
    assert [o.outputs[0].text for o in generate(llm, PROMPTS)] == expected


@pytest.mark.parametrize("fail_at", [1, 4, 9])
def test_a_fault_in_a_text_ends_its_request_alone(
    llm: LLM, fail_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [o.outputs[0].text for o in generate(llm, PROMPTS)]
    processor = llm.engine._processor
    monkeypatch.setattr(processor, "_tokenizer", Broken(processor._tokenizer, fail_at))
    ends = {output.request_id: output for output in llm.stream(PROMPTS, GREEDY)}
    completions = [output.outputs[0] for output in ends.values()]
    broken = [one for one in completions if one.stop_reason == "OSError: no decoder"]
    assert [one.finish_reason for one in broken] == ["abort"]
    others = [one.text for one in completions if one not in broken]
    assert len(others) == len(PROMPTS) - 1
    assert set(others) <= set(expected)
    assert_idle(llm)


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        (["fine", ""], {}, None),
        (["fine", {"prompt_token_ids": []}], {}, r"prompts\[1\]: the prompt is empty"),
        (["fine", 3], {}, r"prompts\[1\]: a prompt is a string"),
        (["fine", {"text": "x"}], {}, r"prompts\[1\]: a prompt is a string"),
        (["fine", "a\ud800"], {}, r"prompts\[1\]: prompt=.* holds .*ud800. at character 1"),
        (["fine", [1, True]], {}, r"prompts\[1\]: prompt_token_ids=\[1, True\] must"),
        (["fine", [1, 2.5]], {}, r"prompts\[1\]: prompt_token_ids must be a flat list"),
        (["fine", {"prompt": "a", "cache_salt": 3}], {}, r"prompts\[1\]: cache_salt=3 must"),
        (["fine", {"prompt": None}], {}, r"prompts\[1\]: prompt=None must be a string"),
        (["fine", {"prompt_token_ids": [1, 99999]}], {}, "99999, which is outside"),
        (["fine", "x " * 600], {}, "max_model_len=512"),
        ("fine", {"max_tokens": 600}, "max_tokens=600"),
    ],
)
def test_bad_prompts_are_refused_while_others_run(
    llm: LLM, prompts: Any, params: dict, message: str | None
) -> None:
    (expected,) = generate(llm, PROMPTS[0])
    running = llm.stream(PROMPTS[0], GREEDY)
    first = next(running)
    if message is None:  # the tokenizer begins every text with a token of its own
        llm.generate(prompts, GREEDY, use_tqdm=False)
    else:
        with pytest.raises(ValueError, match=message):
            llm.generate(prompts, dataclasses.replace(GREEDY, **params), use_tqdm=False)
    (last,) = [output for output in [first, *running] if output.finished]
    assert last.outputs == expected.outputs
    assert_idle(llm)


def test_token_ids_are_a_prompt(llm: LLM) -> None:
    ids = llm.tokenizer.encode(PROMPTS[0])
    (expected,) = generate(llm, PROMPTS[0])
    for prompt in (ids, np.array(ids), {"prompt_token_ids": np.array(ids, np.int16)}):
        (output,) = generate(llm, prompt)
        assert (output.prompt, output.outputs) == (None, expected.outputs)
    two = generate(llm, [ids, np.array(ids)])
    assert [output.outputs for output in two] == [expected.outputs] * 2


def test_one_params_per_prompt(llm: LLM) -> None:
    with pytest.raises(ValueError, match=r"sampling_params\[0\]=3 must be SamplingParams"):
        llm.generate(PROMPTS[:1], [3])
    with pytest.raises(ValueError, match="sampling_params has 2 entries for 4 prompts"):
        llm.generate(PROMPTS, [GREEDY, GREEDY])
    assert generate(llm, []) == []


def test_another_compilation_folder_is_refused(tmp_path: Any) -> None:
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "one"))
    try:
        with pytest.raises(ValueError, match="one folder per process"):
            LLM(DEMO_MODEL, compilation_cache_dir=str(tmp_path / "two"))
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_a_model_that_is_no_folder_is_what_is_blamed(tmp_path: Any) -> None:
    with pytest.raises(FileNotFoundError, match="org/name"):
        LLM("org/name", compilation_cache_dir=None)
    with pytest.raises(FileNotFoundError, match=r"config.json"):
        LLM(tmp_path, tokenizer="org/name", compilation_cache_dir=None)
    shutil.copy(DEMO_MODEL / "tokenizer.json", tmp_path)
    (tmp_path / "config.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match=r"config.json is not valid JSON: 'utf-8' codec"):
        LLM(tmp_path, compilation_cache_dir=None)
    with pytest.raises(ValueError, match="tokenizer='org/name' must be a folder"):
        LLM(DEMO_MODEL, tokenizer="org/name", compilation_cache_dir=None)
