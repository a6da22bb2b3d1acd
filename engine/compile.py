"""Compiles an engine's programs for a device that need not be here, and writes a bundle of them.

  python -m pallas_paged.engine.compile --model=FOLDER --target=h100 --output=BUNDLE
  python -m pallas_paged.engine.compile --model=llama-8b --target=l4 --kv_cache_dtype=fp8 --plan

`LLM(FOLDER, bundle="BUNDLE")` on such a device, with the same versions of JAX and of this package,
then compiles nothing; options that it is not given are those given here. A bundle for other
versions, another model or another device is not used, and a warning says what differs. Its files
are pickles, which run whatever is in them: load no bundle that you do not trust.

Only `config.json` is read of the model. Without --num_blocks the pool is as large as the GPU's
memory allows beside weights and temporaries, if JAX may use as much: here and in the engine's
environment XLA_CLIENT_MEM_FRACTION says so, which is 0.9 in programs of ours. --full also compiles
the steps with penalties and log-probabilities, which an engine otherwise compiles when somebody
asks for them; --token_logprobs those that give each token's log-probability and nothing else, in
whose place the engine otherwise takes those of --full. Matrix products are cuBLAS's: nothing can be
timed. For a GPU this needs the packages that `pallas_paged.deviceless` names; the target cpu is
this machine's own CPU.

--plan writes no bundle: it prints where the memory goes, the pool that fits, and what each step
takes and launches. --largest does so for the largest decode and mixed step alone. With
--tensor_parallel_size=N all of that is for each of N devices of one machine, which need not be here
either, and for each step it prints what they exchange, beside the least that the way in which they
share the model needs.
"""

import dataclasses
import json
import logging
import pathlib
import time
from typing import Any

from absl import flags

from pallas_paged.cache_spec import common_window
from pallas_paged.deviceless import TARGETS
from pallas_paged.dispatch import KNOWN_IMPLEMENTATIONS
from pallas_paged.engine.compiling import (
    HOST,
    Prepared,
    Progress,
    compile_bundle,
    prepare,
    report_steps,
    steps_of,
)
from pallas_paged.engine.config import DTYPES, KV_CACHE_DTYPES, LOGPROBS_MODES, EngineConfig
from pallas_paged.engine.core.buckets import Bucket
from pallas_paged.engine.device import bundle as bundles
from pallas_paged.engine.device.exchanges import Exchanges, by_kind, least
from pallas_paged.engine.device.step_report import SHAPES, StepReport
from pallas_paged.engine.kv.sharing import blocks_for, most_blocks
from pallas_paged.models import ModelConfig, command_line, load_config

_MODEL = flags.DEFINE_string(
    "model", None, f"A model's folder; or one of {', '.join(SHAPES)}, to plan with.", required=True
)
_TARGET = flags.DEFINE_enum("target", None, (*TARGETS, HOST), "The device.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Folder for the bundle; a bundle is replaced.")
_PLAN = flags.DEFINE_bool("plan", False, "Print what the steps take, and write no bundle.")
_LARGEST = flags.DEFINE_bool("largest", False, "With --plan: the largest steps only.")
_JSON = flags.DEFINE_string("json", None, "With --plan: file to write the figures to.")
_FULL = flags.DEFINE_bool("full", False, "Also the steps with penalties and log-probabilities.")
_LAYERS = flags.DEFINE_integer("layers", None, "Only so many of the model's layers.", lower_bound=1)
# What the engine's own options of these names are.
_DTYPE = flags.DEFINE_enum("dtype", "auto", DTYPES, "Of weights; auto is the checkpoint's.")
_KV_CACHE_DTYPE = flags.DEFINE_enum(
    "kv_cache_dtype", "auto", ("auto", *KV_CACHE_DTYPES), "Of the KV cache."
)
_MAX_MODEL_LEN = flags.DEFINE_integer(
    "max_model_len", None, "Most tokens of a sequence; by default the model's limit."
)
_MAX_NUM_SEQS = flags.DEFINE_integer(
    "max_num_seqs", EngineConfig.max_num_seqs, "Most sequences that run at once."
)
_MAX_NUM_BATCHED_TOKENS = flags.DEFINE_integer(
    "max_num_batched_tokens", EngineConfig.max_num_batched_tokens, "Most tokens of a step."
)
_BLOCK_SIZE = flags.DEFINE_integer("block_size", EngineConfig.block_size, "Tokens in a block.")
_NUM_BLOCKS = flags.DEFINE_integer("num_blocks", None, "Size of the KV pool in blocks.")
_KV_CACHE_MEMORY_BYTES = flags.DEFINE_integer("kv_cache_memory_bytes", None, "The same in bytes.")
_SHARE = flags.DEFINE_float(
    "gpu_memory_utilization", EngineConfig.gpu_memory_utilization, "Share of the memory to use."
)
_MAX_LOGPROBS = flags.DEFINE_integer(
    "max_logprobs", EngineConfig.max_logprobs, "Most log-probabilities per token."
)
_LOGPROBS_MODE = flags.DEFINE_enum(
    "logprobs_mode", EngineConfig.logprobs_mode, LOGPROBS_MODES, "What they are taken from."
)
_ATTENTION = flags.DEFINE_enum(
    "attention_implementation", None, KNOWN_IMPLEMENTATIONS, "Chosen by the device if not given."
)
_CACHE = flags.DEFINE_enum(
    "cache_implementation", None, KNOWN_IMPLEMENTATIONS, "Of what writes and copies blocks."
)
_NUM_SCHEDULER_STEPS = flags.DEFINE_integer(
    "num_scheduler_steps", None, "Most decode steps in one program; by default the device's."
)
_TENSOR_PARALLEL_SIZE = flags.DEFINE_integer(
    "tensor_parallel_size",
    EngineConfig.tensor_parallel_size,
    "Devices of one machine that share the model.",
    lower_bound=1,
)
_TOKEN_LOGPROBS = flags.DEFINE_bool(
    "token_logprobs", False, "Also plain steps that give tokens' log-probabilities, logprobs=0."
)
_DETERMINISTIC = flags.DEFINE_bool("deterministic", False, "Every step in one fixed shape.")
_SWAP_SPACE = flags.DEFINE_float("swap_space", 0.0, "GiB of host memory for preempted requests.")


def main() -> None:
    """Writes a bundle, or prints the plan."""
    logging.getLogger("pallas_paged").setLevel(logging.WARNING)
    logging.getLogger("pallas_paged.dispatch").setLevel(logging.DEBUG)  # why what is chosen
    # The cache is turned off and on, and JAX says so each time.
    logging.getLogger("jax._src.compilation_cache").setLevel(logging.WARNING)
    output = None if _OUTPUT.value is None else pathlib.Path(_OUTPUT.value)
    if (output is None) != _PLAN.value:
        raise ValueError("give either --output, the folder for the bundle, or --plan")
    if output is not None:
        if _LARGEST.value or _JSON.value:
            raise ValueError("--largest and --json go with --plan")
        bundles.check_replaceable(output)
    shape, dtype = _model()
    config = EngineConfig(
        _MODEL.value,
        dtype=dtype,
        kv_cache_dtype=_KV_CACHE_DTYPE.value,
        max_model_len=_MAX_MODEL_LEN.value,
        max_num_seqs=_MAX_NUM_SEQS.value,
        max_num_batched_tokens=_MAX_NUM_BATCHED_TOKENS.value,
        block_size=_BLOCK_SIZE.value,
        num_blocks=_NUM_BLOCKS.value,
        kv_cache_memory_bytes=_KV_CACHE_MEMORY_BYTES.value,
        gpu_memory_utilization=_SHARE.value,
        max_logprobs=_MAX_LOGPROBS.value,
        logprobs_mode=_LOGPROBS_MODE.value,
        attention_implementation=_ATTENTION.value,
        cache_implementation=_CACHE.value,
        num_scheduler_steps=_NUM_SCHEDULER_STEPS.value,
        token_logprobs=bool(_TOKEN_LOGPROBS.value),
        deterministic=_DETERMINISTIC.value,
        swap_space=_SWAP_SPACE.value,
        tensor_parallel_size=_TENSOR_PARALLEL_SIZE.value,
    )
    begin = time.perf_counter()
    print("sizing the pool ...", flush=True)
    prepared = prepare(shape, config, _TARGET.value)
    device = prepared.programs.placement.device.device_kind
    print(f"attention: {prepared.attention}, writes: {prepared.writes}, on {device}")
    print(f"{prepared.plan}; sized in {time.perf_counter() - begin:.1f} s", flush=True)
    if output is None:
        _print_plan(prepared)
    else:
        _write(prepared, output, begin)


def _model() -> tuple[ModelConfig, str]:
    """Returns the shape of the model and the dtype that its weights are to have."""
    name, dtype = _MODEL.value, _DTYPE.value
    if name in SHAPES:
        shape = SHAPES[name]
        dtype = "bfloat16" if dtype == "auto" else dtype
    else:
        shape = load_config(name)
    if _LAYERS.value is not None:
        shape = shape.first_layers(_LAYERS.value)
    return shape, dtype


def _write(prepared: Prepared, output: pathlib.Path, begin: float) -> None:
    """Writes the bundle, and prints a line for each program and a last one."""

    def tell(done: Progress) -> None:
        print(f"{done.name}: {done.seconds:.1f} s, {_mib(done.num_bytes)}", flush=True)

    manifest = compile_bundle(prepared, output, full=bool(_FULL.value), tell=tell)
    size = sum(path.stat().st_size for path in output.iterdir())
    print(
        f"{len(manifest.programs)} programs in {time.perf_counter() - begin:.1f} s, {_mib(size)} "
        f"in {output}, for a pool of {manifest.num_blocks} blocks"
    )


def _print_plan(prepared: Prepared) -> None:
    """Prints what sequences and steps take, and writes the figures where they are asked for."""
    plan = prepared.plan
    max_model_len = prepared.config.max_model_len
    assert max_model_len is not None
    without = blocks_for(max_model_len, plan.block_size)
    window = common_window(prepared.specs)
    kept = most_blocks(max_model_len, window, plan.block_size)
    why = "a layer sees all tokens" if window is None else f"all layers see {window} tokens"
    print(
        f"a sequence of {max_model_len} tokens decodes with {kept} blocks, "
        f"{_mib(kept * plan.block_bytes)}; without giving any back {without}, "
        f"{_mib(without * plan.block_bytes)}: {why}"
    )
    steps = []
    for report in report_steps(prepared, _buckets(prepared)):
        found, needed = _exchanges(prepared, report)
        print(_line(report, found, needed), flush=True)
        steps.append(_figures(report, found, needed))
    if _JSON.value:
        figures = {
            "model": _MODEL.value,
            "target": _TARGET.value,
            "num_layers": prepared.shape.num_layers,
            "kv_head_copies": prepared.shape.kv_head_copies,
            **dataclasses.asdict(plan),
            "num_tokens": (plan.num_blocks - 1) * plan.block_size,
            "sliding_window": window,
            "blocks_per_sequence": kept,
            "blocks_per_sequence_without_window": without,
            "steps": steps,
        }
        with open(_JSON.value, "w") as file:
            json.dump(figures, file, indent=1)


def _buckets(prepared: Prepared) -> list[Bucket]:
    """Returns the steps to plan."""
    every = steps_of(prepared, full=bool(_FULL.value))
    if not _LARGEST.value:
        return every
    asked = [bucket for bucket in every if bucket.is_full == _FULL.value]
    kinds = [[bucket for bucket in asked if bucket.is_decode == kind] for kind in (True, False)]
    return [max(kind) for kind in kinds if kind]


def _exchanges(
    prepared: Prepared, report: StepReport
) -> tuple[tuple[Exchanges, ...], tuple[Exchanges, ...]]:
    """Returns what a step's devices exchange, and the least."""
    config, bucket = prepared.config, report.bucket
    needed = least(
        prepared.shape,
        config.dtype,
        bucket,
        config.tensor_parallel_size,
        deterministic=config.deterministic,
    )
    return by_kind(report.collectives, bucket.num_steps), needed


def _figures(
    report: StepReport, found: tuple[Exchanges, ...], needed: tuple[Exchanges, ...]
) -> dict[str, Any]:
    """Returns what a step takes as it is written to the file."""
    return {
        **dataclasses.asdict(report),
        "collectives": [one._asdict() for one in report.collectives],
        "exchanges": list(map(dataclasses.asdict, found)),
        "least_exchanges": list(map(dataclasses.asdict, needed)),
    }


def _line(report: StepReport, found: tuple[Exchanges, ...], needed: tuple[Exchanges, ...]) -> str:
    """Returns what a step takes, in words."""
    parts = [f"peak {_mib(report.peak_bytes)}", f"temporaries {_mib(report.temporary_bytes)}"]
    if report.launches is not None and report.schedule is not None:
        counts, buffers = report.launches, report.schedule.command_buffers
        parts.append(
            f"{counts.total} launches ({len(counts.kernels)} kernels, {len(counts.products)} "
            f"matrix products, {len(counts.others)} others) and {len(counts.loops)} loops; command "
            f"buffers {len(buffers)}, which hold {sum(map(len, buffers))} of them"
        )
    parts.append(f"weights and caches made anew: {len(report.moves)}")
    if found or needed:
        fewest = "the least" if found == needed else f"at least {_list(needed)}"
        parts.append(f"collectives: {_list(found)}: {fewest}")
    return f"{report.bucket}: {'; '.join(parts)}"


def _list(exchanges: tuple[Exchanges, ...]) -> str:
    return ", ".join(map(str, exchanges)) or "none"


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"


if __name__ == "__main__":
    command_line.run(main)
