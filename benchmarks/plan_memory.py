"""What a model's steps take on a GPU that need not be here: memory, and launches per layer.

  python -m benchmarks.plan_memory --model=llama-8b --target=h100
  python -m benchmarks.plan_memory --model=FOLDER --target=a100-80gb --kv_cache_dtype=fp8

Compiles the engine's largest decode and mixed steps for the target, from shapes alone: no GPU, no
weights (a folder needs a `config.json` only). Prints where the GPU's memory goes, the largest pool
that fits beside weights and temporaries, and how many blocks the longest sequence holds while it
decodes, with and without those that leave a sliding window. Matrix products are not tuned without
a GPU, so their temporaries and launches may differ there. Needs the packages that
`pallas_paged.deviceless` names.
"""

import dataclasses
import json
import logging
import re
from importlib import resources

import jax.numpy as jnp
from absl import flags

from pallas_paged.cache_spec import common_window
from pallas_paged.deviceless import TARGETS
from pallas_paged.engine.config import (
    KV_CACHE_DTYPES,
    EngineConfig,
    resolve_kv_cache_dtype,
    round_num_blocks,
)
from pallas_paged.engine.device.pool_size import buckets_for
from pallas_paged.engine.device.step_report import SHAPES, StepReport, compile_step
from pallas_paged.engine.kv.sharing import blocks_for, most_blocks
from pallas_paged.models import command_line, load_config

_MODEL = flags.DEFINE_string("model", "llama-8b", "llama-8b, opt-13b, or a folder.")
_TARGET = flags.DEFINE_enum("target", "h100", TARGETS, "The GPU.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ("bfloat16", "float16"), "Of weights.")
_KV_CACHE_DTYPE = flags.DEFINE_enum(
    "kv_cache_dtype", "auto", ("auto", *KV_CACHE_DTYPES), "Of the KV cache."
)
_MAX_MODEL_LEN = flags.DEFINE_integer("max_model_len", 4096, "Most tokens of a sequence.")
_MAX_NUM_SEQS = flags.DEFINE_integer("max_num_seqs", 64, "Most sequences that run at once.")
_MAX_NUM_BATCHED_TOKENS = flags.DEFINE_integer(
    "max_num_batched_tokens", 512, "Most tokens of a step."
)
_BLOCK_SIZE = flags.DEFINE_integer("block_size", 16, "Tokens in a block.")
_SHARE = flags.DEFINE_float("gpu_memory_utilization", 0.9, "Share of the memory to use.")
_LAYERS = flags.DEFINE_integer("layers", None, "Layers to compile; None is all of the model's.")
_JSON = flags.DEFINE_string("json", None, "File to write the figures to.")


def memory_bytes(target: str) -> int:
    """Returns the memory of the GPU named `target`."""
    text = resources.files("pallas_paged.targets").joinpath(f"{target}.txtpb").read_text()
    found = re.search(r"device_memory_size: (\d+)", text)
    assert found is not None, target
    return int(found[1])


def main() -> None:
    """Prints the plan."""
    # `deviceless` turns JAX's cache off and on for each program, and JAX says so each time.
    logging.getLogger("jax._src.compilation_cache").setLevel(logging.WARNING)
    name = _MODEL.value
    shape = SHAPES[name] if name in SHAPES else load_config(name)
    if _LAYERS.value is not None:
        shape = shape.first_layers(_LAYERS.value)
    config = EngineConfig(
        name,
        dtype=_DTYPE.value,
        kv_cache_dtype=_KV_CACHE_DTYPE.value,
        max_num_seqs=_MAX_NUM_SEQS.value,
        max_num_batched_tokens=_MAX_NUM_BATCHED_TOKENS.value,
        block_size=_BLOCK_SIZE.value,
        max_model_len=_MAX_MODEL_LEN.value,
        gpu_memory_utilization=_SHARE.value,
    )
    max_model_len = min(_MAX_MODEL_LEN.value, shape.max_model_len)
    num_blocks = 1024  # neither launches nor temporaries depend on it
    without = blocks_for(max_model_len, config.block_size)
    largest = buckets_for(config, without, "gpu").largest()
    buckets = [dataclasses.replace(bucket, is_full=False) for bucket in largest]

    def compiled(num_layers: int) -> list[StepReport]:
        return [
            compile_step(
                shape.first_layers(num_layers),
                config,
                bucket,
                _TARGET.value,
                num_blocks=num_blocks,
            )
            for bucket in buckets
        ]

    reports = compiled(shape.num_layers)
    # What a layer launches shows beside a model with one layer less.
    shallow = compiled(shape.num_layers - 1) if shape.num_layers > 1 else [None] * len(reports)
    cache_dtype = resolve_kv_cache_dtype(config, jnp.dtype(config.dtype))
    specs = shape.cache_specs(config.block_size, cache_dtype)
    block_bytes = sum(spec.block_bytes for spec in specs)
    assert block_bytes * num_blocks == reports[0].cache_bytes
    window = common_window(specs)
    kept = most_blocks(max_model_len, window, config.block_size)
    usable = int(memory_bytes(_TARGET.value) * _SHARE.value)
    temporaries = max(report.temporary_bytes for report in reports)
    pool_bytes = usable - reports[0].weight_bytes - temporaries
    pool_blocks = round_num_blocks(max(0, pool_bytes) // block_bytes)
    figures = {
        "model": name,
        "target": _TARGET.value,
        "num_layers": shape.num_layers,
        "usable_bytes": usable,
        "weight_bytes": reports[0].weight_bytes,
        "temporary_bytes": temporaries,
        "block_bytes": block_bytes,
        "num_blocks": pool_blocks,
        "num_tokens": max(0, pool_blocks - 1) * config.block_size,
        "sliding_window": window,
        "blocks_per_sequence": kept,
        "blocks_per_sequence_without_window": without,
        "steps": [dataclasses.asdict(report) for report in reports],
    }
    print(
        f"{name}, {shape.num_layers} layers, on {_TARGET.value}: {_gib(usable)} to use "
        f"({_SHARE.value:.0%}), weights {_gib(reports[0].weight_bytes)}, temporaries "
        f"{_gib(temporaries)}; a pool of {pool_blocks} blocks of {config.block_size} tokens, "
        f"{figures['num_tokens']} tokens, {_gib(pool_blocks * block_bytes)}"
    )
    why = "a layer sees all tokens" if window is None else f"all layers see {window} tokens"
    print(
        f"a sequence of {max_model_len} tokens decodes with {kept} blocks, "
        f"{_gib(kept * block_bytes)}; without giving any back {without}, "
        f"{_gib(without * block_bytes)}: {why}"
    )
    for report, one_less in zip(reports, shallow, strict=True):
        bucket, counts = report.bucket, report.launches
        of_a_layer = ""
        if one_less is not None:
            of_a_layer = f" of which the last layer {counts.total - one_less.launches.total},"
        buffers = report.schedule.command_buffers
        print(
            f"{bucket}: "
            f"{counts.total} launches ({len(counts.kernels)} kernels, {len(counts.products)} "
            f"matrix products, {len(counts.others)} others),{of_a_layer} and "
            f"{len(counts.loops)} loops; command buffers {len(buffers)}, which hold "
            f"{sum(map(len, buffers))} of them; temporaries "
            f"{_gib(report.temporary_bytes)}, weights and caches made anew: {len(report.moves)}"
        )
    if _JSON.value:
        with open(_JSON.value, "w") as file:
            json.dump(figures, file, indent=1)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


if __name__ == "__main__":
    command_line.run(main)
