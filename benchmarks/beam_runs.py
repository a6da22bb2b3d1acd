"""Beam searches of the demo model through the engine, and what their beams share.

Which beams die, and when, is the model's doing, so that nothing but a model can stand for it. The
prompts are pieces of this folder's source text, which is the kind that the demo model has learnt;
their lengths, and those of the outputs, come from a workload.
"""

import pathlib
from collections.abc import Sequence

import numpy as np

from benchmarks.workloads import Request
from pallas_paged.engine import LLM, BeamSearchParams
from pallas_paged.engine.kv.stats import KVStats
from pallas_paged.models.demo import DEMO_MODEL

MAX_MODEL_LEN = 512
SOURCE = "the demo model's beams, through the engine, over Python text; none ends early"


def make_llm(block_size: int, max_num_seqs: int) -> LLM:
    """Returns an engine with room for so many sequences of any length."""
    return LLM(
        DEMO_MODEL,
        block_size=block_size,
        num_blocks=1 + max_num_seqs * -(-MAX_MODEL_LEN // block_size),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max(64, max_num_seqs),
        enable_prefix_caching=False,
        deterministic=True,  # few programs
        compilation_cache_dir=None,
    )


def run(llm: LLM, requests: Sequence[Request], beam_width: int, seed: int) -> list[KVStats]:
    """Returns what the pool holds after each step of beam searches with the requests' lengths."""
    assert llm.tokenizer is not None
    files = sorted(pathlib.Path(__file__).parent.glob("*.py"))
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    rng = np.random.default_rng(seed)
    for request in requests:
        num_tokens = len(request.prompt_token_ids)
        num_chars = 12 * num_tokens  # more than enough, and then cut
        begin = int(rng.integers(0, len(text) - num_chars))
        prompt = llm.tokenizer.encode(text[begin : begin + num_chars])[:num_tokens]
        params = BeamSearchParams(
            beam_width, request.num_output_tokens, ignore_eos=True, detokenize=False
        )
        llm.engine.add(llm.engine.make_group(prompt, params))
    pool = []
    while llm.engine.has_unfinished:
        llm.engine.step()
        pool.append(llm.kv_stats())
    return pool
