"""What it saves to read a prefix that many sequences share for several of them at a time.

  python -m benchmarks.cascade --sequences=8,64,256 --prefix=512,4096 --own=256
  python -m benchmarks.cascade --parts=time --heads=9/3 --head_dim=64   # on this machine's device

`bytes` says what a decode step reads of keys and values in a layer, by the sizes alone, with the
number of tokens for which the kernels of `--target` read a prefix at once; "floor" is that many
bytes at `--bandwidth`. `launches` compiles a decode step of Llama-8B's width for that GPU, without
one, and counts what it launches. `time` runs the attention of a layer on the device that is here,
both ways in turns; figures are medians.
"""

import dataclasses
import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import tables
from pallas_paged import deviceless
from pallas_paged.engine.config import EngineConfig
from pallas_paged.engine.core.buckets import Bucket
from pallas_paged.engine.device.step_report import SHAPES, compile_step
from pallas_paged.kv_cache import AttentionMetadata, KVCache, SharedPrefix
from pallas_paged.models import command_line
from pallas_paged.ops.attention.api import attention_implementation, num_together, paged_attention

_PARTS = flags.DEFINE_list("parts", ["bytes", "launches", "time"], "Which tables.")
_SEQUENCES = flags.DEFINE_list("sequences", ["8", "64", "256"], "Sequences of a step; all share.")
_PREFIX = flags.DEFINE_list("prefix", ["128", "1024", "8192"], "Tokens that they share.")
_OWN = flags.DEFINE_integer("own", 256, "Tokens behind these, of each sequence.", lower_bound=1)
_HEADS = flags.DEFINE_string("heads", "32/8", "Query heads / KV heads.")
_HEAD_DIM = flags.DEFINE_integer("head_dim", 128, "Size of a head.", lower_bound=1)
_BLOCK_SIZE = flags.DEFINE_integer("block_size", 16, "Tokens per block.", lower_bound=1)
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "By default float32 on a CPU, else bfloat16."
)
_TARGET = flags.DEFINE_enum("target", "h100", list(deviceless.TARGETS), "The GPU.")
_BANDWIDTH = flags.DEFINE_float("bandwidth", 3.0, "Of it, in TB/s.", lower_bound=0.01)
_REPEATS = flags.DEFINE_integer("repeats", 15, "Calls per figure.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "Also write the figures to this file.")
for _name in ("sequences", "prefix"):
    command_line.integers_only(_name, "64")
command_line.integers_only("heads", "32/8")
flags.register_validator(
    "parts",
    lambda parts: set(parts) <= {"bytes", "launches", "time"},
    "must be some of bytes, launches, time",
)


def heads() -> tuple[int, int]:
    """Returns (Hq, Hk)."""
    num_q_heads, num_kv_heads = map(int, _HEADS.value.split("/"))
    if num_q_heads % num_kv_heads:
        raise ValueError(f"--heads={_HEADS.value}: the first must be a multiple of the second")
    return num_q_heads, num_kv_heads


def sizes() -> list[tuple[int, int]]:
    """Returns (sequences, tokens of the prefix) of each row; whole blocks."""
    lengths, S = list(map(int, _PREFIX.value)), _BLOCK_SIZE.value
    if min(lengths) < S:
        raise ValueError(f"--prefix={_PREFIX.value} must be at least --block_size={S}")
    counts = itertools.product(map(int, _SEQUENCES.value), lengths)
    return [(count, length // S * S) for count, length in counts]


def bytes_row(num_seqs: int, prefix: int) -> dict[str, Any]:
    """Returns what a layer's attention reads, both ways, of a cache as the queries."""
    num_q_heads, num_kv_heads = heads()
    dtype = jnp.dtype(_DTYPE.value or "bfloat16")
    q = jax.ShapeDtypeStruct((num_seqs, num_q_heads, _HEAD_DIM.value), dtype)
    cache = jax.ShapeDtypeStruct((2, num_kv_heads, _BLOCK_SIZE.value, _HEAD_DIM.value), dtype)
    with jax.default_device(deviceless.target_device(_TARGET.value)):
        together = num_together("mosaic_gpu", q, cache)
    token = 2 * num_kv_heads * _HEAD_DIM.value * dtype.itemsize
    plain = num_seqs * (prefix + _OWN.value) * token
    cascade = (-(-num_seqs // together) * prefix + num_seqs * _OWN.value) * token
    return {
        "sequences": num_seqs,
        "prefix": prefix,
        "own": _OWN.value,
        "at once": together,
        "MB, for each": plain / 1e6,
        "MB, at once": cascade / 1e6,
        "of it": cascade / plain,
        "floor us, for each": plain / _BANDWIDTH.value / 1e6,
        "floor us, at once": cascade / _BANDWIDTH.value / 1e6,
    }


def launch_rows() -> list[dict[str, Any]]:
    """Returns what a decode step launches, by two and by one of a model's layers."""
    rows = []
    for name, shares in (("for each", False), ("at once", True)):
        bucket = Bucket(64, 64, 128, True, shares_prefix=shares)
        totals, buffers = [], []
        for num_layers in (1, 2):
            shape = dataclasses.replace(SHAPES["llama-8b"], num_layers=num_layers)
            config = EngineConfig("llama-8b", dtype="bfloat16")
            step = compile_step(shape, config, bucket, _TARGET.value, num_blocks=4000)
            assert step.launches is not None, "it is compiled for a GPU"
            assert step.schedule is not None, "it is compiled for a GPU"
            totals.append(step.launches.total)
            buffers.append(len(step.schedule.command_buffers) + len(step.schedule.outside))
        of_layer = totals[1] - totals[0]
        rows.append(
            {
                "prefix": name,
                "of a layer": of_layer,
                "beside the layers": totals[0] - of_layer,
                "Llama-8B": totals[0] + 31 * of_layer,
                "of the host": buffers[1],
            }
        )
    return rows


def problem(num_seqs: int, prefix: int) -> tuple[jax.Array, KVCache, AttentionMetadata]:
    """Returns the arguments of a decode step whose sequences share a prefix."""
    num_q_heads, num_kv_heads = heads()
    dtype = _DTYPE.value or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    S, shared = _BLOCK_SIZE.value, prefix // _BLOCK_SIZE.value
    own = -(-_OWN.value // S)
    num_blocks = 1 + shared + num_seqs * own
    blocks = 1 + np.random.default_rng(0).permutation(num_blocks - 1).astype(np.int32)
    table = np.concatenate(
        [np.tile(blocks[:shared], (num_seqs, 1)), blocks[shared:].reshape(num_seqs, own)], axis=1
    )
    keys = jax.random.split(jax.random.key(0), 3)
    shape = (num_blocks, num_kv_heads, S, _HEAD_DIM.value)
    k, v = (jax.random.normal(key, shape, dtype) for key in keys[:2])
    q = jax.random.normal(keys[2], (num_seqs, num_q_heads, _HEAD_DIM.value), dtype)
    lens = jnp.full(num_seqs, shared * S + _OWN.value, jnp.int32)
    return q, KVCache(k, v), AttentionMetadata.for_decode(jnp.asarray(table), lens, S)


def time_row(num_seqs: int, prefix: int) -> dict[str, Any]:
    """Returns the time of a layer's attention, both ways, here."""
    q, cache, metadata = problem(num_seqs, prefix)
    count = jnp.int32(prefix // _BLOCK_SIZE.value)
    shared = SharedPrefix(metadata.block_tables[0], count, jnp.ones(num_seqs, bool))

    def attend(q: jax.Array, cache: KVCache, metadata: Any, shared: Any) -> jax.Array:
        step = AttentionMetadata(**metadata, max_query_len=1, shared_prefix=shared)
        return paged_attention(q, cache.k, cache.v, step, promise_in_bounds=True)

    arrays = {name: value for name, value in vars(metadata).items() if isinstance(value, jax.Array)}
    run = jax.jit(attend)
    ways: dict[str, Callable[[], jax.Array]] = {
        "for each": functools.partial(run, q, cache, arrays, None),
        "at once": functools.partial(run, q, cache, arrays, shared),
    }
    results = [np.asarray(way(), np.float32) for way in ways.values()]
    tolerance = 1e-4 if q.dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(results[0], results[1], rtol=tolerance, atol=tolerance)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(_REPEATS.value):
        for name, way in ways.items():
            begin = time.perf_counter()
            way().block_until_ready()
            times[name].append(time.perf_counter() - begin)
    plain, cascade = (statistics.median(times[name]) for name in ways)
    return {
        "sequences": num_seqs,
        "prefix": prefix,
        "own": _OWN.value,
        "us, for each": plain * 1e6,
        "us, at once": cascade * 1e6,
        "of it": cascade / plain,
    }


def main() -> None:
    """Prints the tables."""
    figures: dict[str, list[dict[str, Any]]] = {}
    if "bytes" in _PARTS.value:
        figures["bytes"] = [bytes_row(*size) for size in sizes()]
        title = f"keys and values that a layer's attention reads, by the sizes; {_TARGET.value}"
        tables.show(title, figures["bytes"])
    if "launches" in _PARTS.value:
        figures["launches"] = launch_rows()
        tables.show(f"launches of a decode step, compiled for {_TARGET.value}", figures["launches"])
    if "time" in _PARTS.value:
        q, cache, _ = problem(8, _BLOCK_SIZE.value)
        name = attention_implementation(None, q, cache.k)
        figures["time"] = [time_row(*size) for size in sizes()]
        device = jax.devices()[0].device_kind
        tables.show(f"a layer's attention, {q.dtype}, {name} on {device}", figures["time"])
    if _JSON.value:
        with open(_JSON.value, "w") as file:
            json.dump(figures, file, indent=1)


if __name__ == "__main__":
    command_line.run(main)
