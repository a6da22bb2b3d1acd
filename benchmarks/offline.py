"""What the throughput and the latency program have in common: their flags, the model, the runs."""

import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags

from benchmarks import random_models, workloads
from benchmarks.drive import BASELINES, Run, baseline_engine, drive
from benchmarks.workloads import Workload
from pallas_paged.engine import LLM, RequestOutputKind
from pallas_paged.engine.text.tokenizer import load_tokenizer, require_tokenizer
from pallas_paged.engine.watching_flags import watching_options
from pallas_paged.models.demo import DEMO_MODEL

_MODEL = flags.DEFINE_string("model", str(DEMO_MODEL), "Folder with a Hugging Face checkpoint.")
_RANDOM_MODEL = flags.DEFINE_enum(
    "random_model",
    None,
    list(random_models.CONFIGS),
    "Instead of --model: random weights in this shape, nothing read from disk.",
)
_TOKENIZER = flags.DEFINE_string(
    "tokenizer",
    None,
    "Folder of the tokenizer for --dataset; by default the model's, with --random_model the demo "
    "model's.",
)
_DATASET = flags.DEFINE_string("dataset", None, "ShareGPT or Alpaca JSON file, as published.")
_LENGTHS = flags.DEFINE_enum(
    "lengths",
    "sharegpt",
    list(workloads.LENGTHS),
    "Without --dataset: random prompts, lengths from a mixture with the means of this set.",
)
_LENGTH_SCALE = flags.DEFINE_float("length_scale", 1.0, "Factor of the drawn lengths.")
_NUM_REQUESTS = flags.DEFINE_integer("num_requests", 64, "Requests.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of weights, workload and arrivals.", lower_bound=0)
_DTYPE = flags.DEFINE_enum(
    "dtype", "auto", ["auto", "float32", "bfloat16", "float16"], "Type of weights and activations."
)
_MAX_MODEL_LEN = flags.DEFINE_integer(
    "max_model_len", None, "Most tokens of a request; also what the baselines reserve for each."
)
_MAX_NUM_SEQS = flags.DEFINE_integer(
    "max_num_seqs", None, "Most sequences at once; without it LLM's default.", lower_bound=1
)
_MAX_NUM_BATCHED_TOKENS = flags.DEFINE_integer(
    "max_num_batched_tokens",
    None,
    "Most tokens per step; without it LLM's default.",
    lower_bound=1,
)
_BLOCK_SIZE = flags.DEFINE_integer("block_size", 16, "Tokens per block.", lower_bound=1)
_NUM_BLOCKS = flags.DEFINE_integer("num_blocks", None, "Size of the KV pool in blocks.")
_KV_CACHE_MEMORY_BYTES = flags.DEFINE_integer(
    "kv_cache_memory_bytes", None, "Size of the KV pool in bytes."
)
_NUM_SPECULATIVE_TOKENS = flags.DEFINE_integer(
    "num_speculative_tokens",
    None,
    "Guess so many tokens a step: with --draft_model, or else those that followed the last time. "
    "Random weights repeat themselves, and are guessed better than text.",
    lower_bound=1,
)
_DRAFT_MODEL = flags.DEFINE_string(
    "draft_model", None, "Folder of a small model that guesses; needs --num_speculative_tokens."
)
_BASELINE = flags.DEFINE_list(
    "baseline",
    [],
    "Also run the workload without paging, one piece of memory reserved for each sequence: static "
    "(a batch starts when the one before has ended; the longest length), orca-max (the longest "
    "length), orca-pow2 (the output's length rounded up to a power of two), orca-oracle (what it "
    "will need).",
)
flags.register_validator(
    "baseline",
    lambda names: len(set(names)) == len(names) and set(names) <= set(BASELINES),
    f"must be a list of {', '.join(BASELINES)}, each at most once",
)


def make_llm() -> LLM:
    """Returns the flags' model, every program that the workload needs compiled."""
    options = {
        "dtype": _DTYPE.value,
        "seed": _SEED.value,
        "max_model_len": _MAX_MODEL_LEN.value,
        "max_num_seqs": _MAX_NUM_SEQS.value,
        "max_num_batched_tokens": _MAX_NUM_BATCHED_TOKENS.value,
        "block_size": _BLOCK_SIZE.value,
        "num_blocks": _NUM_BLOCKS.value,
        "kv_cache_memory_bytes": _KV_CACHE_MEMORY_BYTES.value,
    } | watching_options()
    if _DRAFT_MODEL.value is not None and _NUM_SPECULATIVE_TOKENS.value is None:
        raise ValueError(f"--draft_model={_DRAFT_MODEL.value} needs --num_speculative_tokens")
    if _NUM_SPECULATIVE_TOKENS.value is not None:
        speculation: dict[str, Any] = {"method": "ngram"}
        if _DRAFT_MODEL.value is not None:
            speculation = {"method": "draft_model", "model": _DRAFT_MODEL.value}
        speculation["num_speculative_tokens"] = _NUM_SPECULATIVE_TOKENS.value
        options["speculative_config"] = speculation
    if _RANDOM_MODEL.value is None:
        llm = LLM(_MODEL.value, **options)
    else:
        with tempfile.TemporaryDirectory() as folder:
            random_models.write_config(_RANDOM_MODEL.value, pathlib.Path(folder))
            llm = LLM(folder, load_format="dummy", **options)
    llm.runner.programs.compile(bucket for bucket in llm.runner.buckets.all() if bucket.is_common)
    return llm


def make_workload(llm: LLM) -> Workload:
    """Returns the flags' requests, for this model."""
    count, max_model_len, seed = _NUM_REQUESTS.value, llm.max_model_len, _SEED.value
    if _DATASET.value is None:
        return workloads.draw(
            _LENGTHS.value,
            count,
            scale=workloads.check_scale(_LENGTH_SCALE.value),
            max_model_len=max_model_len,
            vocab_size=llm.model_config.vocab_size,
            seed=seed,
        )
    model = _MODEL.value if _RANDOM_MODEL.value is None else str(DEMO_MODEL)
    folder = _TOKENIZER.value or model
    tokenizer = require_tokenizer(load_tokenizer(folder), folder)
    if tokenizer.vocab_size > llm.model_config.vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} has {tokenizer.vocab_size} tokens, the model "
            f"{llm.model_config.vocab_size}; choose one that the model knows"
        )
    workload = workloads.load(
        _DATASET.value, count, encode=tokenizer.encode, max_model_len=max_model_len, seed=seed
    )
    return workload._replace(source=f"{workload.source}; tokens of {folder}")


def describe(llm: LLM, workload: Workload) -> str:
    """Returns what is measured on what, in words."""
    model = _MODEL.value if _RANDOM_MODEL.value is None else f"random {_RANDOM_MODEL.value}"
    prompt, output = workload.mean_lengths
    memory = llm.engine.memory
    dtype = jax.tree.leaves(llm.runner.programs.params)[0].dtype
    return (
        f"model: {model}, {dtype}; jax {jax.__version__} on {jax.devices()[0].device_kind}\n"
        f"KV pool: {memory.num_usable_blocks} blocks of {memory.state.block_size} tokens; at most "
        f"{llm.config.max_num_seqs} sequences of {llm.max_model_len} tokens\n"
        f"workload: {len(workload.requests)} requests, {workload.source}\n"
        f"mean tokens: prompt {prompt:.2f}, output {output:.2f}; greedy, EOS ignored, no text made"
    )


def run_all(
    llm: LLM,
    workload: Workload,
    arrivals_s: Sequence[float],
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE,
) -> dict[str, Run]:
    """Returns the run of the paged engine, then those of the flags' baselines, by name."""
    first = workload._replace(requests=workload.requests[:4])
    drive(llm.engine, first, [0.0] * len(first.requests))  # first touches of memory cost extra
    runs = {"paged": drive(llm.engine, workload, arrivals_s, output_kind=output_kind)}
    for name in _BASELINE.value:
        engine, batch_size = baseline_engine(llm, BASELINES[name])
        static = batch_size if name == "static" else None
        runs[name] = drive(
            engine, workload, arrivals_s, output_kind=output_kind, static_batch_size=static
        )
    return runs
