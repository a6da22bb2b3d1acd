"""How `LLM` is called: by threads, without parameters, with priorities; and what it tells."""

import concurrent.futures
import dataclasses
import json
import shutil
import threading
import time
from pathlib import Path

import pytest

from pallas_paged.engine import LLM, SamplingParams
from pallas_paged.engine.device import programs
from tests.engine.serving import assert_idle, make_llm, reference_requests
from tests.models.references import DATA

NAME = "llama-mha-tied"
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = reference_requests(NAME)[:8]


def small_llm(folder: str | Path = NAME, **options: object) -> LLM:
    return make_llm(str(folder), **{"max_num_seqs": 8, "max_num_batched_tokens": 32} | options)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return small_llm()


def tokens_of(llm: LLM, prompts: list, params: SamplingParams = GREEDY) -> list[tuple[int, ...]]:
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


def test_threads_share_an_engine(llm: LLM) -> None:
    alone = tokens_of(llm, PROMPTS)
    steps = llm.engine.core.num_steps
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        each = list(pool.map(lambda i: tokens_of(llm, PROMPTS[i : i + 2]), (0, 2, 4, 6)))
    assert [tokens for two in each for tokens in two] == alone
    assert llm.engine.core.num_steps - steps < 4 * 12, "they should run in one batch"
    assert_idle(llm)


def test_a_stream_that_nobody_reads_keeps_no_other_thread_waiting(llm: LLM) -> None:
    stream = llm.stream(PROMPTS[0], GREEDY)
    next(stream)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        other = pool.submit(tokens_of, llm, PROMPTS[1:2]).result(timeout=60)
    assert other == tokens_of(llm, PROMPTS[1:2])
    *_, last = stream
    assert [last.outputs[0].token_ids] == tokens_of(llm, PROMPTS[:1])


def test_a_failing_step_reaches_every_thread(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """One gets the error, the others their outputs with it; nobody hangs."""
    started = threading.Barrier(3)
    collect, unfinished = llm.runner.collect, llm.engine.core.scheduler.queues.unfinished

    def failing(in_flight: object) -> object:
        if len(unfinished) == 3:
            raise RuntimeError("the device is gone")
        time.sleep(0.02)  # for a thread that is late
        return collect(in_flight)

    def run(prompt: dict) -> str | None:
        started.wait(timeout=60)
        params = dataclasses.replace(GREEDY, max_tokens=40)
        output = llm.generate(prompt, params, use_tqdm=False)[0].outputs[0]
        assert output.finish_reason == "abort"
        return str(output.stop_reason)

    monkeypatch.setattr(llm.runner, "collect", failing)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(run, prompt) for prompt in PROMPTS[:3]]
        errors = [future.exception(timeout=60) for future in futures]
    monkeypatch.undo()
    assert sum(isinstance(error, RuntimeError) for error in errors) == 1
    reasons = [future.result() for future, error in zip(futures, errors, strict=True) if not error]
    assert reasons == ["RuntimeError: the device is gone"] * 2
    assert_idle(llm)


@pytest.fixture(scope="module")
def advised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose authors say how to sample."""
    folder = tmp_path_factory.mktemp("advised") / NAME
    shutil.copytree(DATA / NAME, folder)
    advice = {"temperature": 0.7, "top_k": 1, "max_new_tokens": 10_000, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(advice))
    return folder


def test_without_parameters_the_models_own_defaults_apply(llm: LLM, advised: Path) -> None:
    other = small_llm(advised)
    defaults = other.get_default_sampling_params()
    assert defaults == SamplingParams(temperature=0.7, top_k=1, max_tokens=10_000)
    (output,) = other.generate(PROMPTS[0], use_tqdm=False)
    longest = other.max_model_len - len(PROMPTS[0]["prompt_token_ids"])
    whole = SamplingParams(temperature=0, max_tokens=longest)
    assert list(output.outputs[0].token_ids) == list(tokens_of(llm, PROMPTS[:1], whole)[0])
    assert llm.get_default_sampling_params() == SamplingParams()
    (advised / "generation_config.json").write_text('{"max_new_tokens": 5, "temperature": 0}')
    assert len(other.generate(PROMPTS[0], use_tqdm=False)[0].outputs[0].token_ids) == 5


def test_defaults_that_cannot_be_used_stop_only_who_asks_for_them(
    llm: LLM, advised: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (advised / "generation_config.json").write_text('{"temperature": -1}')
    monkeypatch.setattr(llm._reader, "_defaults", small_llm(advised).get_default_sampling_params)
    with pytest.raises(ValueError, match=r"generation_config\.json of .*temperature=-1"):
        llm.generate(PROMPTS[0], use_tqdm=False)
    assert tokens_of(llm, PROMPTS[:1])


def test_a_stream_has_priorities() -> None:
    llm = small_llm(max_num_seqs=1, scheduling_policy="priority")
    outputs = llm.stream(PROMPTS[:3], GREEDY, priority=[2, 0, 1])
    finished = [int(o.request_id.split("-")[1]) for o in outputs if o.finished]
    first = min(finished)
    assert [each - first for each in finished] == [1, 2, 0]
    for wrong in ([1, 2], 3, [1, 2, "x"]):
        with pytest.raises(ValueError, match="priority="):
            llm.stream(PROMPTS[:3], GREEDY, priority=wrong)  # type: ignore[arg-type]


def test_metrics_and_a_prefix_cache_that_is_reset(llm: LLM) -> None:
    def figures() -> dict[str, float]:
        return {
            ":".join([metric.name, *list(metric.labels.values())[1:]]): metric.value
            for metric in llm.get_metrics()
        }

    assert llm.reset_prefix_cache()
    before = figures()
    prompt = {"prompt_token_ids": [*range(3, 43)]}
    tokens_of(llm, [prompt, prompt])
    after = {name: value - before[name] for name, value in figures().items()}
    assert after["vllm:prompt_tokens"] == 80
    assert after["vllm:generation_tokens"] == 24
    assert after["vllm:request_success:length"] == 2
    assert after["vllm:prefix_cache_queries"] == 80
    assert after["vllm:num_requests_running"] == 0
    assert llm.kv_stats().num_cached_blocks > 0

    def cached() -> int:
        return llm.generate(prompt, GREEDY, use_tqdm=False)[0].num_cached_tokens

    assert cached() == 32
    assert llm.reset_prefix_cache()
    assert llm.kv_stats().num_cached_blocks == 0
    assert cached() == 0

    stream = llm.stream(prompt, GREEDY)
    next(stream)
    assert not llm.reset_prefix_cache(), "blocks are in use"
    stream.close()
    llm.pin_prefix(prompt)
    assert llm.reset_prefix_cache(), "what is pinned stays"
    assert cached() == 32
    llm.unpin_prefix(prompt)
    assert llm.reset_prefix_cache()
    assert_idle(llm)


def test_requests_are_aborted_one_by_one(llm: LLM) -> None:
    llm.abort("nobody")
    with pytest.raises(ValueError, match=r"request_id=\['request-0'\] must be a string"):
        llm.abort(["request-0"])  # type: ignore[arg-type]


def test_a_slow_compilation_is_said_where_the_user_looks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(programs, "ANNOUNCED_AFTER_S", 0.0)
    llm = small_llm()
    llm.generate(PROMPTS[0], GREEDY)
    assert "request/s, compiling decode 8x8" in capsys.readouterr().err
    lines: list[str] = []
    llm.announce = lines.append
    list(llm.stream(PROMPTS[:1], dataclasses.replace(GREEDY, logprobs=1)))
    assert any(line.startswith("compiling decode") and "full" in line for line in lines)
