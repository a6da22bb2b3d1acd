"""Drives transformers with continuous batching, for `benchmarks.peers`."""

from collections.abc import Callable
from typing import Any

import torch
from peer_protocol import Answer, Job, main
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig


def load(job: Job) -> dict[str, Callable[[], Answer]]:
    """Returns what serves the workload."""
    torch.set_num_threads(job.num_threads)
    model: Any = AutoModelForCausalLM.from_pretrained(
        job.model, dtype=torch.float32, attn_implementation="sdpa"
    )
    greedy = GenerationConfig(do_sample=False, max_new_tokens=max(job.num_output_tokens))
    page_size = 32
    longest = -(-job.max_model_len // page_size)
    limits = ContinuousBatchingConfig(
        page_size=page_size,
        num_blocks=longest * job.max_num_seqs,
        max_batch_tokens=512,
        max_requests_per_batch=job.max_num_seqs,
        allow_block_sharing=False,
    )

    @torch.inference_mode()
    def run() -> Answer:
        with model.continuous_batching_context_manager(
            generation_config=greedy, continuous_batching_config=limits
        ) as manager:
            names = [
                manager.add_request(prompt, max_new_tokens=count, eos_token_id=-1)
                for prompt, count in zip(job.prompts, job.num_output_tokens, strict=True)
            ]
            tokens: dict[str, list[int]] = {}
            while len(tokens) < len(names):
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    if result.error is not None:
                        raise RuntimeError(result.error)
                    tokens[result.request_id] = list(result.generated_tokens)
                elif result is None and not manager.is_running():
                    raise RuntimeError("the generation thread has ended")
        return {"tokens": [tokens[name] for name in names]}

    return {"run": run}


if __name__ == "__main__":
    main(load)
