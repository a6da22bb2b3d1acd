"""A pool of a tenth of what is needed: every kind of request gets its tokens all the same."""

import dataclasses
from typing import Any

import pytest

from pallas_paged.engine import LLM, BeamSearchParams, SamplingParams
from tests.engine.serving import assert_idle, make_llm, reference_requests

NAME = "llama-gqa-llama3"
BLOCK_SIZE, LENGTH = 4, 40
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
SAMPLED = dataclasses.replace(GREEDY, temperature=1.0, top_p=0.9, seed=3)
KINDS = {
    "greedy": GREEDY,
    "sampled": SAMPLED,
    "several": dataclasses.replace(SAMPLED, n=3),
    "beams": BeamSearchParams(3, 20, ignore_eos=True),
    "prefix": dataclasses.replace(GREEDY, max_tokens=16),
}
PREFIX = list(range(5, 17))


def requests() -> tuple[list[dict[str, list[int]]], list[Any], list[str]]:
    """Returns prompts, parameters and kinds; some of each kind, in turn."""
    short = [p for p in reference_requests(NAME) if 5 < len(p["prompt_token_ids"]) <= 16]
    prompts = [
        {"prompt_token_ids": [*PREFIX, 20 + i]} if kind == "prefix" else short[i % len(short)]
        for i, kind in enumerate([*KINDS] * 5)
    ]
    kinds = [*KINDS] * 5
    return prompts, [KINDS[kind] for kind in kinds], kinds


def run(**options: Any) -> tuple[list[list[tuple[int, ...]]], LLM, dict[str, int]]:
    """Returns all completions, and how many requests of each kind lost their memory."""
    prompts, params, kinds = requests()
    llm = make_llm(
        NAME,
        max_num_seqs=16,
        max_num_batched_tokens=32,
        block_size=BLOCK_SIZE,
        deterministic=True,
        **options,
    )
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert_idle(llm)
    preempted = dict.fromkeys(KINDS, 0)
    for output, kind in zip(outputs, kinds, strict=True):
        preempted[kind] += output.metrics.num_preemptions > 0
    return [[c.token_ids for c in output.outputs] for output in outputs], llm, preempted


@pytest.fixture(scope="module")
def unpressured() -> list[list[tuple[int, ...]]]:
    tokens, _, preempted = run()
    assert not any(preempted.values())
    return tokens


@pytest.mark.parametrize("mode", ["recompute", "swap", "auto"])
def test_a_tenth_of_the_memory_gives_the_same_tokens(
    unpressured: list[list[tuple[int, ...]]], mode: str
) -> None:
    _, params, kinds = requests()
    widths = [3 if isinstance(one, BeamSearchParams) else one.n for one in params]
    needed = sum(widths) * LENGTH // BLOCK_SIZE
    swaps = {"swap_space": 0.01} if mode != "recompute" else {}
    tokens, llm, preempted = run(num_blocks=1 + needed // 10, preemption_mode=mode, **swaps)
    for kind in KINDS:
        of_kind = [place for place, one in enumerate(kinds) if one == kind]
        assert [tokens[i] for i in of_kind] == [unpressured[i] for i in of_kind], kind
    assert all(preempted.values()), preempted
    stats = llm.kv_stats()
    if mode != "auto":  # which does what is faster on this device
        assert (stats.num_swaps > 0) == (mode == "swap")
    assert stats.num_swapped_blocks == stats.num_allocated_blocks == 0


def test_samples_that_were_swapped_out_before_they_parted() -> None:
    """Their last block comes back, and is copied for each of them, before one step."""
    llm = make_llm(
        NAME,
        max_num_seqs=8,
        max_num_batched_tokens=32,
        block_size=BLOCK_SIZE,
        num_blocks=9,
        deterministic=True,
        async_scheduling=False,
        enable_prefix_caching=False,
        preemption_mode="swap",
        swap_space=0.01,
    )
    # Two that grow in the next step, and samples that would copy the third of their blocks then.
    prompts = [{"prompt_token_ids": list(range(5, 5 + length))} for length in (8, 4, 6)]
    params = [dataclasses.replace(GREEDY, max_tokens=4)] * 2
    params.append(dataclasses.replace(SAMPLED, n=3, max_tokens=6))
    (alone,) = llm.generate(prompts[2:], params[2:], use_tqdm=False)
    swap_in, moves = llm.runner.block_programs.swap_in, []
    copy, pairs = llm.runner.block_programs.copy, []
    llm.runner.block_programs.swap_in = lambda *args: moves.append(args) or swap_in(*args)
    llm.runner.block_programs.copy = lambda *args: pairs.append(len(moves)) or copy(*args)
    *_, together = llm.generate(prompts, params, use_tqdm=False)
    assert_idle(llm)
    assert (len(moves), pairs) == (1, [1])
    assert [c.token_ids for c in together.outputs] == [c.token_ids for c in alone.outputs]
