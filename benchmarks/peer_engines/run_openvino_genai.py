"""Drives OpenVINO GenAI's continuous batching, for `benchmarks.peers`; optimum-intel exports."""

from collections.abc import Callable

import numpy as np
import openvino as ov
import openvino_genai
from peer_protocol import Answer, Job, main


def convert(job: Job) -> None:
    """Exports the model, weights in float32."""
    from optimum.intel import OVModelForCausalLM  # imports torch, which serving does without

    model = OVModelForCausalLM.from_pretrained(
        job.model, export=True, load_in_8bit=False, compile=False
    )
    model.save_pretrained(job.converted)


def load(job: Job) -> dict[str, Callable[[], Answer]]:
    """Returns what serves the workload."""
    limits = openvino_genai.SchedulerConfig()
    limits.max_num_seqs = job.max_num_seqs
    limits.max_num_batched_tokens = max(256, job.max_num_seqs)
    limits.cache_size = job.kv_cache_gib
    limits.enable_prefix_caching = False
    limits.dynamic_split_fuse = True
    pipeline = openvino_genai.ContinuousBatchingPipeline(
        job.converted,
        limits,
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": "f32",
            "KV_CACHE_PRECISION": "f32",
            "INFERENCE_NUM_THREADS": job.num_threads,
        },
    )
    prompts = [ov.Tensor(np.array([prompt], np.int64)) for prompt in job.prompts]
    params = []
    for count in job.num_output_tokens:
        one = openvino_genai.GenerationConfig()
        one.max_new_tokens = count
        one.ignore_eos = True
        one.do_sample = False
        one.set_eos_token_id(job.config()["vocab_size"])  # it wants one: there is no such token
        params.append(one)

    def run() -> Answer:
        results = pipeline.generate(prompts, params)
        return {"tokens": [list(result.m_generation_ids[0]) for result in results]}

    return {"run": run}


if __name__ == "__main__":
    main(load, convert)
