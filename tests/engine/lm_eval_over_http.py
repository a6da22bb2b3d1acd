"""Holds what a server answers to lm_eval against an engine in lm_eval's own process.

Run it in the environment of `make eval-check`, from the repository's root, beside a server of the
demo model in float32:

    JAX_PLATFORMS=cpu HF_HUB_OFFLINE=1 .venv-eval/bin/python -m tests.engine.lm_eval_over_http \
        --base_url=http://localhost:8000 --served_model=models/demo

lm_eval's `local-completions` sends tokens to `/v1/completions`, with `echo`, `logprobs=1` and
`max_tokens=1` to score, and reads the log-probabilities of the prompt's tokens.
"""

import argparse

from pallas_paged.engine.evaluation.harness import PallasPagedLM
from tests.engine.lm_eval_cases import CASES, compare, evaluate

MAX_MODEL_LEN = 512


def largest_difference(
    base_url: str, served_model: str, max_model_len: int = MAX_MODEL_LEN
) -> float:
    """Asserts that both give the same answers; returns by how much log-probabilities differ.

    Args:
      base_url: the server's, without `/v1`. It serves the demo model in float32.
      served_model: the name under which it does.
      max_model_len: of the server. A prompt that is scored leaves it room for a token, so that
        `local-completions` reads one token less of long texts than the engine could: the engine
        here has so many less.
    """
    case = CASES["demo"]
    served = {
        "model": served_model,
        "base_url": f"{base_url.rstrip('/')}/v1/completions",
        "tokenizer": case.model,
        "tokenizer_backend": "huggingface",
        "tokenized_requests": True,
        "add_bos_token": True,
        "max_length": max_model_len,
        "max_retries": 1,
    }
    over_http = evaluate(case, "local-completions", model_args=served)
    options = case.model_args | {"max_length": max_model_len - 2, "num_blocks": 400}
    here = evaluate(case, PallasPagedLM(**options))
    margins = [float("inf")] * len(here.responses["local_completions"])
    return compare(over_http, here, margins)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base_url", required=True)
    parser.add_argument("--served_model", default=CASES["demo"].model)
    parser.add_argument("--max_model_len", type=int, default=MAX_MODEL_LEN)
    flags = parser.parse_args()
    largest = largest_difference(flags.base_url, flags.served_model, flags.max_model_len)
    print(f"equal answers; log-probabilities differ by {largest:.1e} at most")


if __name__ == "__main__":
    main()
