"""Drives pallas-paged, for `benchmarks.peers`."""

from collections.abc import Callable

from peer_protocol import Answer, Job, main

from pallas_paged.engine import LLM, SamplingParams


def load(job: Job) -> dict[str, Callable[[], Answer]]:
    """Returns what serves the workload."""
    llm = LLM(
        job.model,
        enable_prefix_caching=False,
        max_num_seqs=job.max_num_seqs,
        max_num_batched_tokens=512,
        max_model_len=job.max_model_len,
        kv_cache_memory_bytes=job.kv_cache_gib << 30,
    )
    params = [
        SamplingParams(temperature=0, ignore_eos=True, max_tokens=count, detokenize=False)
        for count in job.num_output_tokens
    ]
    prompts = [{"prompt_token_ids": prompt} for prompt in job.prompts]

    def run() -> Answer:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        llm.runner.programs.wait_for_background()  # what the warm-up began to compile
        return {"tokens": [list(output.outputs[0].token_ids) for output in outputs]}

    return {"run": run}


if __name__ == "__main__":
    main(load)
