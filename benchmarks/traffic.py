"""Requests of all kinds at random times: what `benchmarks.warm_traffic` serves."""

from typing import Any

import numpy as np

from pallas_paged.engine import BeamSearchParams, RequestOutputKind, SamplingParams

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 1.0, "top_p": 0.9},
    "top_k": {"temperature": 0.8, "top_k": 20, "min_p": 0.05},
    "penalties": {"temperature": 0.7, "presence_penalty": 0.5, "repetition_penalty": 1.2},
    "bias": {"temperature": 0, "logit_bias": {5: 3.0, 9: -4.0}, "min_tokens": 4},
    "logprobs": {"temperature": 0.5, "logprobs": 3},
    "prompt_logprobs": {"temperature": 0, "prompt_logprobs": 2},
    "several": {"temperature": 1.0, "n": 3},
    "stop": {"temperature": 1.0, "stop": ["\n\n", "return"]},
    "beams": {},
}
"""Parameters of requests, by name."""


def arrivals(rng: np.random.Generator, seconds: float, rate: float) -> list[float]:
    """Returns when requests come: half of them one by one, half in bursts of up to 20."""
    times: list[float] = []
    now = 0.0
    while (now := now + rng.exponential(6 / rate)) < seconds:
        times += [now] * int(rng.integers(1, 6) if rng.random() < 0.9 else rng.integers(10, 21))
    return times


def request(
    rng: np.random.Generator, kind: str, vocab_size: int, max_len: int
) -> tuple[list[int], SamplingParams | BeamSearchParams]:
    """Returns token ids and parameters of a request of `kind`, one that an engine takes."""
    num_tokens = int(min(max_len // 2, 1 + rng.lognormal(3.2, 1.0)))
    prompt = rng.integers(1, vocab_size, num_tokens).tolist()
    if rng.random() < 0.3:
        prompt = [*range(1, 40), *prompt][: max_len // 2]
    max_tokens = int(min(max_len // 4, 1 + rng.lognormal(2.8, 0.8)))
    if kind == "beams":
        return prompt, BeamSearchParams(beam_width=3, max_tokens=min(max_tokens, 20))
    is_whole = rng.random() < 0.5
    options = dict(KINDS[kind])
    if "min_tokens" in options:
        options["min_tokens"] = min(options["min_tokens"], max_tokens)
    return prompt, SamplingParams(
        max_tokens=max_tokens,
        seed=int(rng.integers(2**31)),
        output_kind=RequestOutputKind.FINAL_ONLY if is_whole else RequestOutputKind.DELTA,
        **options,
    )
