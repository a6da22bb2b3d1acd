"""Drives transformers with padded static batches, for `benchmarks.peers`; also the reference.

Requests are taken in their order, as many as may run at once; a batch ends with its longest output.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from peer_protocol import Answer, Job, main
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList


class Margins(LogitsProcessor):
    """Keeps by how much each sequence's first logit is above its second; changes nothing."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Returns `scores`."""
        first, second = scores.topk(2).values.T
        self.steps.append(first - second)
        return scores


def load(job: Job) -> dict[str, Callable[[], Answer]]:
    """Returns what serves the workload, and what gives the reference."""
    torch.set_num_threads(job.num_threads)
    model: Any = AutoModelForCausalLM.from_pretrained(
        job.model, dtype=torch.float32, attn_implementation="sdpa"
    )

    def batches() -> Iterator[slice]:
        for begin in range(0, len(job.prompts), job.max_num_seqs):
            yield slice(begin, begin + job.max_num_seqs)

    def generate(batch: slice, processors: LogitsProcessorList) -> list[list[int]]:
        prompts, counts = job.prompts[batch], job.num_output_tokens[batch]
        longest = max(map(len, prompts))
        # Padding is on the left, any token, masked.
        padded = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
        masks = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        out = model.generate(
            torch.tensor(padded),
            attention_mask=torch.tensor(masks),
            do_sample=False,
            max_new_tokens=max(counts),
            pad_token_id=0,
            logits_processor=processors,
        )
        rows = out[:, longest:].tolist()
        return [row[:count] for row, count in zip(rows, counts, strict=True)]

    @torch.inference_mode()
    def run() -> Answer:
        tokens: list[list[int]] = []
        for batch in batches():
            tokens += generate(batch, LogitsProcessorList())
        return {"tokens": tokens}

    @torch.inference_mode()
    def reference() -> Answer:
        tokens: list[list[int]] = []
        margins: list[list[float]] = []
        for batch in batches():
            kept = Margins()
            tokens += generate(batch, LogitsProcessorList([kept]))
            rows = torch.stack(kept.steps, dim=1).tolist()
            counts = job.num_output_tokens[batch]
            margins += [row[:count] for row, count in zip(rows, counts, strict=True)]
        return {"tokens": tokens, "margins": margins}

    return {"run": run, "reference": reference}


if __name__ == "__main__":
    main(load)
