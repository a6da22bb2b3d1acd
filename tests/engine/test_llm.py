"""Requests from end to end: the same tokens whatever the batch, the pool and the buckets."""

import dataclasses
import gc
import weakref
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_paged.engine import LLM, SamplingParams
from tests.engine.serving import (
    assert_idle,
    make_llm,
    nothing_compiles,
    reference_requests,
    same_tokens,
)
from tests.models.references import load_reference

ONE_PER_FAMILY = ("llama-gqa-llama3", "opt-postnorm-projected")
GREEDY = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)


def generate(llm: LLM, prompts: Sequence, params) -> list[tuple[int, ...]]:
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert_idle(llm)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module", params=ONE_PER_FAMILY)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def llm(name: str) -> LLM:
    max_num_seqs = 32 if name == ONE_PER_FAMILY[0] else 8  # fewer buckets for the second
    return make_llm(name, max_num_seqs=max_num_seqs, max_num_batched_tokens=64, block_size=8)


def test_a_batch_gives_transformers_tokens(llm: LLM, name: str) -> None:
    reference, prompts = load_reference(name), reference_requests(name)
    assert len(prompts) == 32
    tokens = generate(llm, prompts, GREEDY)
    same_tokens(tokens, reference.greedy, reference.margins)


def test_each_request_alone_gives_the_same(llm: LLM, name: str) -> None:
    reference, prompts = load_reference(name), reference_requests(name)
    tokens = [generate(llm, [prompt], GREEDY)[0] for prompt in prompts[:12]]
    same_tokens(tokens, reference.greedy[:12], reference.margins[:12])


@pytest.fixture(scope="module")
def tight(name: str) -> LLM:
    """A pool that holds hardly more than the longest request: everybody is preempted, often."""
    return make_llm(
        name,
        max_num_seqs=16,
        max_num_batched_tokens=48,
        block_size=4,
        num_blocks=31,
        deterministic=True,  # one program
    )


def test_preemption_changes_nothing(tight: LLM, name: str) -> None:
    reference, prompts = load_reference(name), reference_requests(name)
    outputs = tight.generate(prompts, GREEDY, use_tqdm=False)
    assert_idle(tight)
    assert sum(output.metrics.num_preemptions for output in outputs) > 16
    same_tokens([o.outputs[0].token_ids for o in outputs], reference.greedy, reference.margins)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31])
def test_row_bucket_boundaries(llm: LLM, name: str, count: int) -> None:
    reference, prompts = load_reference(name), reference_requests(name)
    tokens = generate(llm, prompts[-count:], dataclasses.replace(GREEDY, max_tokens=6))
    same_tokens(tokens, reference.greedy[-count:, :6], reference.margins[-count:, :6])


@pytest.mark.parametrize("length", [31, 32, 33, 63, 64, 65])
def test_token_bucket_boundaries(llm: LLM, name: str, length: int) -> None:
    """A prompt of `length` tokens fills a token bucket, and its neighbours' decodes ride along."""
    reference = load_reference(name)
    index = list(map(len, reference.prompts)).index(length)
    prompts = reference_requests(name)
    for batch in ([index], [0, index], [index, 1, 2]):
        tokens = generate(
            llm, [prompts[i] for i in batch], dataclasses.replace(GREEDY, max_tokens=4)
        )
        same_tokens(tokens, reference.greedy[batch, :4], reference.margins[batch, :4])


def sampled(seeds: Sequence[int], **options) -> list[SamplingParams]:
    return [
        SamplingParams(temperature=1.0, max_tokens=16, seed=seed, ignore_eos=True, **options)
        for seed in seeds
    ]


def test_a_seed_gives_the_same_tokens_alone_batched_and_preempted(
    llm: LLM, tight: LLM, name: str
) -> None:
    prompts = reference_requests(name)[:12]
    params = sampled(range(12), top_p=0.9)
    batched = generate(llm, prompts, params)
    alone = [generate(llm, [p], [one])[0] for p, one in zip(prompts, params, strict=True)]
    preempted = tight.generate(prompts, params, use_tqdm=False)
    assert sum(output.metrics.num_preemptions for output in preempted) > 0
    # Float32 logits differ by about 1e-6 between batches: one draw in a million may differ.
    assert alone == batched
    assert [output.outputs[0].token_ids for output in preempted] == batched


def test_different_seeds_give_different_tokens(llm: LLM, name: str) -> None:
    prompt = reference_requests(name)[3]
    hot = [dataclasses.replace(params, temperature=3.0) for params in sampled(range(8))]
    assert len(set(generate(llm, [prompt] * 8, hot))) == 8
    unseeded = dataclasses.replace(hot[0], seed=None)
    assert len(set(generate(llm, [prompt] * 8, unseeded))) == 8


def test_deterministic_is_bitwise(tight: LLM, name: str) -> None:
    assert len(tight.runner.buckets.all()) == 3  # one shape: plain, with log-probabilities, full
    prompts = reference_requests(name)[:10]
    params = [GREEDY] * 5 + sampled(range(5), top_p=0.9)
    batched = tight.generate(prompts, params, use_tqdm=False)
    assert sum(output.metrics.num_preemptions for output in batched) > 0
    alone = [generate(tight, [p], [one])[0] for p, one in zip(prompts, params, strict=True)]
    assert alone == [output.outputs[0].token_ids for output in batched]


@pytest.fixture
def traced(llm: LLM) -> Iterator[LLM]:
    """Fails when a program is traced or compiled while the test runs; full steps see elsewhere."""
    llm.runner.programs.compile(bucket for bucket in llm.runner.buckets.all() if bucket.is_common)
    with nothing_compiles(llm.runner):
        yield llm


def test_nothing_compiles_after_warm_up(traced: LLM, name: str) -> None:
    rng = np.random.default_rng(0)
    vocab_size = traced.model_config.vocab_size
    prompts = [
        {"prompt_token_ids": rng.integers(4, vocab_size, rng.integers(1, 90)).tolist()}
        for _ in range(200)
    ]
    params = [
        SamplingParams(
            temperature=float(rng.choice([0.0, 0.7, 1.0])),
            top_p=float(rng.choice([0.9, 1.0])),
            top_k=int(rng.choice([0, 5])),
            max_tokens=int(rng.integers(1, 30)),
        )
        for _ in prompts
    ]
    assert len(generate(traced, prompts, params)) == 200


def test_each_step_takes_over_the_caches(llm: LLM, name: str) -> None:
    """Donation is real: no array of the step before survives a step."""
    stream = llm.stream(reference_requests(name)[:3], GREEDY)
    next(stream)
    before = jax.tree.leaves(llm.runner.kv_caches)
    num_steps = llm.engine.core.num_steps
    while llm.engine.core.num_steps == num_steps:
        next(stream)
    llm.runner.block_until_ready()
    assert all(array.is_deleted() for array in before)
    pointers = [cache.k.unsafe_buffer_pointer() for cache in llm.runner.kv_caches]
    for _ in stream:
        pass
    assert [cache.k.unsafe_buffer_pointer() for cache in llm.runner.kv_caches] == pointers


def test_an_engine_goes_when_its_owner_does(name: str) -> None:
    llm = make_llm(name, max_num_seqs=2, max_num_batched_tokens=32)
    llm.generate(reference_requests(name)[:1], GREEDY, use_tqdm=False)
    gone = weakref.ref(llm)
    del llm
    gc.collect()
    assert gone() is None


def test_a_request_whose_logits_are_nan_ends_alone() -> None:
    """One request reads a poisoned embedding; its neighbours are well."""
    name = "llama-gqa-llama3"
    llm = make_llm(
        name, max_num_seqs=4, max_num_batched_tokens=64, num_blocks=30, deterministic=True
    )
    reference, poisoned = load_reference(name), 77
    clean = [i for i, row in enumerate(reference.prompts) if poisoned not in row]
    clean = [i for i in clean if poisoned not in reference.greedy[i]][:12]
    prompts: list = [{"prompt_token_ids": reference.prompts[i].tolist()} for i in clean]
    params = llm.runner.programs.params
    embedding = params["model"]["embed_tokens"]["weight"]
    embedding.set_value(embedding.get_value().at[poisoned].set(jnp.nan))
    llm.runner.programs.params = params
    bad = {"prompt_token_ids": [5, poisoned, 9]}
    outputs = llm.generate([*prompts[:6], bad, *prompts[6:]], GREEDY, use_tqdm=False)
    assert_idle(llm)
    (failed,) = outputs.pop(6).outputs
    assert (failed.finish_reason, failed.stop_reason) == ("abort", "logits are not finite")
    assert failed.token_ids == ()
    tokens = [output.outputs[0].token_ids for output in outputs]
    same_tokens(tokens, reference.greedy[clean], reference.margins[clean])


@pytest.mark.parametrize(
    ("name", "kv_cache_dtype", "dtype"),
    [("llama-gqa-llama3", "fp8", "float8_e4m3fn"), ("opt-prenorm", "int8", "int8")],
)
def test_a_quantised_cache_from_end_to_end(name: str, kv_cache_dtype: str, dtype: str) -> None:
    """Most requests begin with float32's token; the bounds on logits are tested with the models."""
    reference, prompts = load_reference(name), reference_requests(name)
    llm = make_llm(
        name,
        kv_cache_dtype=kv_cache_dtype,
        max_num_seqs=32,
        max_num_batched_tokens=64,
        deterministic=True,  # one program
    )
    cache = llm.runner.kv_caches[0]
    assert (cache.k.dtype, cache.v.dtype) == (dtype, dtype)
    assert cache.k_scale.shape == cache.v_scale.shape == cache.k.shape[:3]
    tokens = generate(llm, prompts, dataclasses.replace(GREEDY, max_tokens=4))
    equal = np.array(tokens)[:, 0] == reference.greedy[:, 0]
    assert equal.mean() > 0.8
    scales = np.asarray(llm.runner.kv_caches[-1].k_scale)
    assert (scales > 0).any()
    assert np.isfinite(scales[1:]).all()


@pytest.mark.parametrize("option", ["attention_implementation", "cache_implementation"])
def test_a_kernel_that_the_device_cannot_run_is_refused(option: str) -> None:
    with pytest.raises(NotImplementedError, match="'mosaic_gpu' cannot do this"):
        make_llm(ONE_PER_FAMILY[0], **{option: "mosaic_gpu"})
