"""Tokens per second of groups of samples, as GRPO takes them: ways to ask for them, in turns.

  python -m benchmarks.rollouts                                    # the demo model, some minutes
  python -m benchmarks.rollouts --model=FOLDER --samples=8,64 --num_prompts=4 --prompt_len=1000

Every prompt is continued --samples times by --output_len tokens, at temperature 1 and past any EOS.
`n` is one request per prompt with n samples. `requests` are as many requests as samples: those that
come together find each other's prompt (prefix caching). In `unshared` they do not: each computes
its prompt, and has blocks of its own for it. Where Google's Tunix is installed, and the model is a
Llama, `tunix` is its own sampler (`tunix.generate.sampler`), on the same weights in the same type,
with a cache of exactly the length that is needed. It runs all samples at once; how many the engine
runs at once, --max_num_seqs says.

All ways take turns in every round, each round with other prompts, and the engine has nothing cached
when a way begins. For each way: tokens generated per second and the ratio to `n` of the same round
(medians), and the seconds of the first run, which compiles and is not counted.
"""

import importlib.metadata
import importlib.util
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from benchmarks import tables
from pallas_paged.engine import LLM, SamplingParams
from pallas_paged.models import command_line, load_config
from pallas_paged.models.demo import DEMO_MODEL
from pallas_paged.models.llama import LlamaConfig

_MODEL = flags.DEFINE_string("model", str(DEMO_MODEL), "Folder with a checkpoint.")
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Type of weights and activations."
)
_SAMPLES = flags.DEFINE_list("samples", ["8", "16", "32", "64"], "Samples of each prompt.")
command_line.integers_only("samples", "64")
_NUM_PROMPTS = flags.DEFINE_integer("num_prompts", 2, "Prompts at once.", lower_bound=1)
_PROMPT_LEN = flags.DEFINE_integer("prompt_len", 384, "Tokens of a prompt.", lower_bound=1)
_OUTPUT_LEN = flags.DEFINE_integer("output_len", 64, "Tokens to generate.", lower_bound=2)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns of everything.", lower_bound=1)
_MAX_NUM_SEQS = flags.DEFINE_integer("max_num_seqs", 64, "Sequences at once.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "Also write the figures to this file.")

Prompts = list[list[int]]
Way = Callable[[Prompts, int, int], list[int]]
"""(prompts, samples of each, seed) -> how many tokens each sample has."""


def engine_ways(llm: LLM) -> dict[str, Way]:
    """Returns the ways to ask an engine, by name."""

    def run(prompts: Prompts, count: int, seed: int, *, copies: int, **fields: Any) -> list[int]:
        requests = [{"prompt_token_ids": prompt} for prompt in prompts for _ in range(copies)]
        params = [
            SamplingParams(
                n=count // copies,
                seed=seed + index,
                max_tokens=_OUTPUT_LEN.value,
                ignore_eos=True,
                detokenize=False,
                **fields,
            )
            for index in range(len(requests))
        ]
        assert llm.reset_prefix_cache()
        outputs = llm.generate(requests, params, use_tqdm=False)
        return [len(each.token_ids) for output in outputs for each in output.outputs]

    alone = {"skip_reading_prefix_cache": True, "skip_writing_prefix_cache": True}
    return {
        "n": lambda prompts, count, seed: run(prompts, count, seed, copies=1),
        "requests": lambda prompts, count, seed: run(prompts, count, seed, copies=count),
        "unshared": lambda prompts, count, seed: run(prompts, count, seed, copies=count, **alone),
    }


class Numbers:
    """A tokenizer for Tunix whose texts are the numbers of tokens; no token is EOS or padding."""

    def __init__(self, vocab_size: int):
        self._vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        """Returns the numbers in a text."""
        return list(map(int, text.split()))

    def decode(self, token_ids: list[int]) -> str:
        """Returns the text of numbers."""
        return " ".join(map(str, token_ids))

    def bos_id(self) -> int:
        """Returns 0, by which Tunix puts no token in front."""
        return 0

    def eos_id(self) -> int:
        """Returns what no token is."""
        return self._vocab_size

    def pad_id(self) -> int:
        """Returns what no token is; all prompts have one length."""
        return self._vocab_size


def tunix_ways(folder: str, dtype: str) -> dict[str, Way]:
    """Returns Tunix's sampler of a model, or nothing where it is not installed."""
    shape = load_config(folder)
    if importlib.util.find_spec("tunix") is None or not isinstance(shape, LlamaConfig):
        return {}
    from tunix.generate import sampler
    from tunix.models.llama3 import model, params

    config = model.ModelConfig(
        num_layers=shape.num_layers,
        vocab_size=shape.vocab_size,
        embed_dim=shape.hidden_size,
        hidden_dim=shape.intermediate_size,
        num_heads=shape.num_q_heads,
        head_dim=shape.head_dim,
        num_kv_heads=shape.num_kv_heads,
        rope_theta=round(shape.rope.rope_theta),
        norm_eps=shape.rms_norm_eps,
        weight_tying=shape.tie_word_embeddings,
    )
    length = _PROMPT_LEN.value + _OUTPUT_LEN.value
    cache = sampler.CacheConfig(length, shape.num_layers, shape.num_kv_heads, shape.head_dim)
    network = params.create_model_from_safe_tensors(folder, config, dtype=jax.numpy.dtype(dtype))
    sample = sampler.Sampler(network, Numbers(shape.vocab_size), cache)

    def run(prompts: Prompts, count: int, seed: int) -> list[int]:
        texts = [" ".join(map(str, prompt)) for prompt in prompts for _ in range(count)]
        output = sample(
            texts,
            max_generation_steps=_OUTPUT_LEN.value,
            max_prompt_length=_PROMPT_LEN.value,
            temperature=1.0,
            top_p=1.0,
            seed=seed,
        )
        return [len(tokens) for tokens in output.tokens]

    return {"tunix": run}


def time_ways(
    ways: Mapping[str, Way], count: int, vocab_size: int
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Returns the seconds of each way's first run, and the tokens per second of its others."""
    rng = np.random.default_rng(count)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    first: dict[str, float] = {}

    def timed(way: Way, prompts: Prompts, seed: int) -> float:
        begin = time.perf_counter()
        lengths = way(prompts, count, seed)
        seconds = time.perf_counter() - begin
        assert lengths == [_OUTPUT_LEN.value] * (len(prompts) * count), lengths
        return seconds

    num_tokens = _NUM_PROMPTS.value * count * _OUTPUT_LEN.value
    for number in tqdm(range(_ROUNDS.value + 1), f"{count} samples", disable=None):
        prompts = rng.integers(vocab_size, size=(_NUM_PROMPTS.value, _PROMPT_LEN.value)).tolist()
        for name, way in ways.items():
            seconds = timed(way, prompts, number)
            if number:
                rates[name].append(num_tokens / seconds)
            else:
                first[name] = seconds
    return first, rates


def main() -> None:
    """Prints the table."""
    counts = list(map(int, _SAMPLES.value))
    llm = LLM(
        _MODEL.value,
        dtype=_DTYPE.value,
        max_model_len=_PROMPT_LEN.value + _OUTPUT_LEN.value,
        max_num_seqs=_MAX_NUM_SEQS.value,
    )
    if max(counts) > _MAX_NUM_SEQS.value:
        raise ValueError(
            f"--samples={max(counts)} of a request are more than --max_num_seqs="
            f"{_MAX_NUM_SEQS.value}"
        )
    begin = time.perf_counter()
    llm.runner.programs.compile(bucket for bucket in llm.runner.buckets.all() if not bucket.is_full)
    compile_s = time.perf_counter() - begin
    ways = engine_ways(llm) | tunix_ways(_MODEL.value, _DTYPE.value)
    rows = []
    for count in counts:
        first, rates = time_ways(ways, count, llm.model_config.vocab_size)
        for name, mine in rates.items():
            pairs = zip(mine, rates["n"], strict=True)
            rows.append(
                {
                    "samples": count,
                    "way": name,
                    "tokens/s": statistics.median(mine),
                    "least": min(mine),
                    "most": max(mine),
                    "ratio": statistics.median(one / other for one, other in pairs),
                    "first run, s": first[name],
                }
            )
    tunix = importlib.metadata.version("google-tunix") if "tunix" in ways else "not compared"
    model, device = pathlib.Path(_MODEL.value).name, jax.devices()[0].device_kind
    title = (
        f"{_NUM_PROMPTS.value} prompts of {_PROMPT_LEN.value} tokens, {_OUTPUT_LEN.value} more for "
        f"each sample, {_ROUNDS.value} rounds\n"
        f"{model}, {_DTYPE.value}; jax {jax.__version__} on {device}; "
        f"tunix {tunix}; at most {_MAX_NUM_SEQS.value} sequences at once; the engine compiled for "
        f"{compile_s:.1f} s before"
    )
    tables.show(title, rows)
    if _JSON.value:
        found = {"title": title, "rows": rows}
        pathlib.Path(_JSON.value).write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    command_line.run(main)
