"""A few requests from end to end, quick enough for every version of JAX that we support."""

import numpy as np

from pallas_paged.engine import SamplingParams
from tests.engine.serving import assert_idle, make_llm, reference_requests, same_tokens
from tests.models.references import load_reference


def test_a_small_batch_gives_transformers_tokens() -> None:
    name = "llama-gqa-llama3"
    llm = make_llm(name, max_num_seqs=4, max_num_batched_tokens=32, num_blocks=20, block_size=8)
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    outputs = llm.generate(reference_requests(name)[:12], params, use_tqdm=False)
    assert_idle(llm)
    reference = load_reference(name)
    tokens = [output.outputs[0].token_ids for output in outputs]
    same_tokens(tokens, reference.greedy[:12], reference.margins[:12])
    sampled = SamplingParams(temperature=1.0, top_k=20, top_p=0.9, min_p=0.01, seed=3)
    first, second = (
        llm.generate(reference_requests(name)[5], sampled, use_tqdm=False) for _ in "ab"
    )
    assert first[0].outputs[0].token_ids == second[0].outputs[0].token_ids
    assert np.array(first[0].outputs[0].token_ids).max() < llm.model_config.vocab_size
