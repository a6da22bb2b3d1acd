"""Drives vLLM's build for CPUs, for `benchmarks.peers`; compiled, as it is by default."""

import os
from collections.abc import Callable

from peer_protocol import Answer, Job, main


def load(job: Job) -> dict[str, Callable[[], Answer]]:
    """Returns what serves the workload."""
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(job.kv_cache_gib)
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")  # the parent sleeps meanwhile
    os.environ.pop("OMP_NUM_THREADS", None)  # it binds a thread to each core, as it sees fit
    from vllm import LLM, SamplingParams  # reads the environment

    llm = LLM(
        job.model,
        dtype="float32",
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_num_seqs=job.max_num_seqs,
        max_model_len=job.max_model_len,
        disable_log_stats=True,
    )
    params = [
        SamplingParams(temperature=0, ignore_eos=True, max_tokens=count, detokenize=False)
        for count in job.num_output_tokens
    ]
    prompts = [{"prompt_token_ids": prompt} for prompt in job.prompts]

    def run() -> Answer:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return {"tokens": [list(output.outputs[0].token_ids) for output in outputs]}

    return {"run": run}


if __name__ == "__main__":
    main(load)
