"""Serves a workload from this process: requests arrive on the clock, an `Engine` runs them.

What the throughput and the latency program have in common: their flags, the model, the run, and the
same run again over memory without paging.
"""

import collections
import pathlib
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from absl import flags

from benchmarks import random_models, workloads
from benchmarks.contiguous import ContiguousMemory
from benchmarks.metrics import RequestTimes
from benchmarks.workloads import Workload
from pallas_paged.engine import LLM, RequestOutputKind, SamplingParams
from pallas_paged.engine.build import join
from pallas_paged.engine.core.scheduler import Scheduler
from pallas_paged.engine.engine import Engine
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
    "Also run the workload without paging, every sequence's longest place reserved in one piece: "
    "static (a batch starts when the one before has ended), continuous (the paper's Orca (Max)).",
)
BASELINES = ("static", "continuous")
flags.register_validator(
    "baseline",
    lambda names: len(set(names)) == len(names) and set(names) <= set(BASELINES),
    f"must be a list of {', '.join(BASELINES)}, each at most once",
)


class Run(NamedTuple):
    """What one run of a workload showed.

    Attributes:
      times: of each request.
      duration_s: from the start to the last token.
      mean_running: sequences that held memory, mean over the steps.
      peak_running: their maximum.
      kv_used_share: of the slots that sequences held, the share with a token; mean over steps.
      num_steps: steps dispatched.
      num_preemptions: times a sequence lost its memory.
    """

    times: list[RequestTimes]
    duration_s: float
    mean_running: float
    peak_running: int
    kv_used_share: float
    num_steps: int
    num_preemptions: int

    @property
    def figures(self) -> dict[str, float | int | None]:
        """The counts, under their names in the JSON file."""
        return {
            "mean_running": self.mean_running,
            "peak_running": self.peak_running,
            "kv_used_share": self.kv_used_share,
            "num_steps": self.num_steps,
            "num_preemptions": self.num_preemptions,
        }


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
    llm.runner.programs.compile(bucket for bucket in llm.runner.buckets.all() if not bucket.is_full)
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
        engine, batch_size = baseline_engine(llm)
        static = batch_size if name == "static" else None
        runs[name] = drive(
            engine, workload, arrivals_s, output_kind=output_kind, static_batch_size=static
        )
    return runs


def baseline_engine(llm: LLM) -> tuple[Engine, int]:
    """Returns an engine over `ContiguousMemory`, and how many sequences that has places for.

    Model, pool, programs and limits are those of `llm`, whose own engine must be idle. Call
    `llm.engine.core.reset()` before that one goes on: the device holds other block tables then.
    """
    memory = ContiguousMemory(
        num_blocks=llm.engine.memory.num_usable_blocks + 1,
        block_size=llm.config.block_size,
        max_num_seqs=llm.config.max_num_seqs,
        max_model_len=llm.max_model_len,
    )
    scheduler = Scheduler(
        memory,
        max_num_seqs=llm.config.max_num_seqs,
        max_num_batched_tokens=llm.config.max_num_batched_tokens,
        max_model_len=llm.max_model_len,
        watermark_blocks=0,  # nobody grows beyond what is reserved
        num_scheduler_steps=llm.runner.buckets.num_steps,
    )
    engine = Engine(
        join(
            scheduler,
            memory,
            llm.runner,
            llm.runner.buckets,
            vocab_size=llm.model_config.vocab_size,
            max_model_len=llm.max_model_len,
            seed=llm.config.seed or 0,
            async_scheduling=llm.config.async_scheduling,
        )
    )
    return engine, memory.num_places


def drive(
    engine: Engine,
    workload: Workload,
    arrivals_s: Sequence[float],
    *,
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE,
    static_batch_size: int | None = None,
) -> Run:
    """Runs the workload in real time and returns when each token came.

    Args:
      engine: an idle engine.
      workload: the requests.
      arrivals_s: when each arrives, in seconds from the start, ascending.
      output_kind: whether each token is waited for, or the end of each request alone: then all its
        tokens come at once.
      static_batch_size: hand the engine batches of at most so many requests, of those that have
        arrived, each when the one before has ended; None: hand over each request on arrival.
    """
    requests, arrivals = workload.requests, list(arrivals_s)
    waiting = collections.deque(range(len(requests)))
    token_times: list[list[float]] = [[] for _ in requests]
    failed: set[int] = set()
    running, used = [], []
    core, scheduler = engine.core, engine.core.scheduler
    begin_steps, begin_preemptions = core.num_steps, scheduler.num_preemptions
    begin = time.monotonic()
    while waiting or engine.has_unfinished:
        now = time.monotonic() - begin
        room = len(requests) if static_batch_size is None else static_batch_size
        if static_batch_size is not None and engine.has_unfinished:
            room = 0
        while room and waiting and arrivals[waiting[0]] <= now:
            _add(engine, workload, waiting.popleft(), output_kind)
            room -= 1
        if not engine.has_unfinished:
            time.sleep(max(0.0, arrivals[waiting[0]] - (time.monotonic() - begin)))
            continue
        outputs = engine.step()
        now = time.monotonic() - begin
        for output in outputs:
            index, completion = int(output.request_id), output.outputs[0]
            times = token_times[index]
            times += [now] * (len(completion.token_ids) - len(times))
            if completion.finish_reason == "abort":
                failed.add(index)
        if scheduler.num_running:
            running.append(scheduler.num_running)
            used.append(_used_share(engine))
    engine.check_idle()
    return Run(
        [
            RequestTimes(arrivals[i], tuple(times), len(request.prompt_token_ids), i in failed)
            for i, (request, times) in enumerate(zip(requests, token_times, strict=True))
        ],
        max(times[-1] for times in token_times if times),
        statistics.fmean(running),
        max(running),
        statistics.fmean(used),
        core.num_steps - begin_steps,
        scheduler.num_preemptions - begin_preemptions,
    )


def _add(engine: Engine, workload: Workload, index: int, output_kind: RequestOutputKind) -> None:
    request = workload.requests[index]
    params = SamplingParams(
        temperature=0,
        max_tokens=request.num_output_tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=output_kind,
    )
    engine.add(engine.make_group(request.prompt_token_ids, params, request_id=str(index)))


def _used_share(engine: Engine) -> float:
    """Returns which share of the slots that sequences hold has a token in it."""
    memory = engine.memory
    if isinstance(memory, ContiguousMemory):
        return memory.num_tokens / memory.num_reserved_slots
    return engine.kv_stats().token_share
