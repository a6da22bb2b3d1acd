"""Times paged attention beside attention over contiguous keys and values, on JAX's device.

`paged` is `paged_attention`, `contiguous` the same work as two einsums over keys and values that
lie in one piece per sequence, `gather` the plain way to read blocks: gather them all into one
piece, as wide as the table, then attend. Each figure is milliseconds per layer, the median of
`repeats` calls of one program of `layers` layers, every layer with a cache of its own; the variants
take turns, so that a busy machine slows all alike. Ratios are medians of the turns' ratios.

  python -m benchmarks.attention                    # decode, table widths, prefill
  python -m benchmarks.attention --parts=decode --batch=64 --lengths=spread --json=out.json
  python -m benchmarks.attention --parts=tune       # decode with other sizes of pieces
"""

import dataclasses
import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks.attention_cases.arguments import AttentionSpec, build
from benchmarks.tables import show
from pallas_paged import AttentionMetadata, paged_attention
from pallas_paged.models import command_line
from pallas_paged.ops.attention import xla

_PARTS = flags.DEFINE_list("parts", ["decode", "width", "prefill"], "Which tables; also: tune.")
_BATCH = flags.DEFINE_list("batch", ["16", "64"], "Sequences in a decode step.")
command_line.integers_only("batch", "16")
_CONTEXT = flags.DEFINE_list("context", ["256", "1024"], "Tokens per sequence.")
command_line.integers_only("context", "256")
_HEADS = flags.DEFINE_list("heads", ["12/4", "8/8"], "Query heads / KV heads.")
command_line.integers_only("heads", "12/4")
_HEAD_DIM = flags.DEFINE_integer("head_dim", 64, "Size of a head.", lower_bound=1)
_BLOCK_SIZE = flags.DEFINE_integer("block_size", 16, "Tokens per block.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "float16"], "Of everything.")
_LENGTHS = flags.DEFINE_enum(
    "lengths", "equal", ["equal", "spread"], "All --context, or spread evenly from 1 to there."
)
_LAYERS = flags.DEFINE_integer("layers", 4, "Layers in one program.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 30, "Calls per figure.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "Also write the figures to this file.")

Attend = Callable[[jax.Array, jax.Array, jax.Array, AttentionMetadata], jax.Array]


class Variant(NamedTuple):
    """One way to attend, and the keys and values of every layer in the form it takes.

    The metadata is a parameter of the program, not a constant in it.
    """

    attend: Attend
    layers: list[tuple[jax.Array, jax.Array]]
    metadata: AttentionMetadata


def make_spec(batch: int, context: int, heads: str, **options: Any) -> AttentionSpec:
    """Returns a decode step of the flags' sizes, unless `options` say otherwise."""
    num_q_heads, num_kv_heads = map(int, heads.split("/"))
    lens = [context] * batch
    if _LENGTHS.value == "spread":
        lens = np.linspace(1, context, batch).astype(int).tolist()
    return AttentionSpec(
        f"{batch}x{context}",
        tuple(lens),
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_HEAD_DIM.value,
        block_size=_BLOCK_SIZE.value,
        dtype=_DTYPE.value,
        **{"num_rows": batch, "max_blocks": -(-context // _BLOCK_SIZE.value)} | options,
    )


def attend_dense(
    q: jax.Array, k: jax.Array, v: jax.Array, metadata: AttentionMetadata
) -> jax.Array:
    """Attention of one query per sequence over k and v `[B, Hk, C, D]`, which are finite."""
    grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[2]) * q.shape[2] ** -0.5
    logits = jnp.einsum("bhgd,bhcd->bhgc", grouped, k, preferred_element_type=jnp.float32)
    visible = jnp.arange(k.shape[2], dtype=jnp.int32)[None, :] < metadata.seq_lens[:, None]
    logits = jnp.where(visible[:, None, None, :], logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bhgc,bhcd->bhgd", weights, v).reshape(q.shape)


def attend_prompt(
    q: jax.Array, k: jax.Array, v: jax.Array, metadata: AttentionMetadata
) -> jax.Array:
    """Causal attention of one whole prompt over k and v `[1, Hk, C, D]`."""
    del metadata
    grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[2]) * q.shape[2] ** -0.5
    logits = jnp.einsum("thgd,hcd->hgtc", grouped, k[0], preferred_element_type=jnp.float32)
    visible = jnp.tri(q.shape[0], k.shape[2], dtype=bool)
    weights = jax.nn.softmax(jnp.where(visible[None, None], logits, -jnp.inf), axis=-1)
    return jnp.einsum("hgtc,hcd->thgd", weights.astype(v.dtype), v[0]).reshape(q.shape)


def gather(cache: jax.Array, metadata: AttentionMetadata) -> jax.Array:
    """Returns all blocks that the tables name as one piece per sequence, NaN replaced by 0."""
    rows = jnp.moveaxis(cache[metadata.block_tables], 2, 1)
    rows = rows.reshape(rows.shape[0], cache.shape[1], -1, cache.shape[3])
    position = jnp.arange(rows.shape[2], dtype=jnp.int32)
    exists = position[None, :] < metadata.seq_lens[:, None]
    return jnp.where(exists[:, None, :, None], rows, 0)


def attend_gathered(
    q: jax.Array, k_cache: jax.Array, v_cache: jax.Array, metadata: AttentionMetadata
) -> jax.Array:
    """Attention over the gathered blocks."""
    return attend_dense(q, gather(k_cache, metadata), gather(v_cache, metadata), metadata)


def make_variants(
    spec: AttentionSpec, ways: dict[str, Attend], contiguous: Attend | None
) -> tuple[jax.Array, dict[str, Variant]]:
    """Returns queries, and variants that attend to the same numbers in blocks or in one piece."""
    arguments = [build(spec, seed) for seed in range(_LAYERS.value)]
    # The tables are the same in all layers, as in a model: seeds change only the numbers.
    metadata = arguments[0].metadata
    blocks = [(a.k_cache, a.v_cache) for a in arguments]
    variants = {name: Variant(attend, blocks, metadata) for name, attend in ways.items()}
    if contiguous is not None:
        pieces = jax.jit(lambda k, v, m: (gather(k, m), gather(v, m)))
        layers = [pieces(k, v, metadata) for k, v in blocks]
        variants["contiguous"] = Variant(contiguous, layers, metadata)
    return arguments[0].q, variants


def run_layers(
    attend: Attend,
    q: jax.Array,
    layers: list[tuple[jax.Array, jax.Array]],
    metadata: AttentionMetadata,
) -> jax.Array:
    """Attends layer by layer, each with the previous one's result in its queries."""
    for k, v in layers:
        q = q + attend(q, k, v, metadata)
    return q


def time_variants(q: jax.Array, variants: dict[str, Variant]) -> dict[str, list[float]]:
    """Returns each variant's milliseconds per layer and turn; all must give the same result."""
    programs = {
        name: functools.partial(jax.jit(functools.partial(run_layers, attend)), q, layers, metadata)
        for name, (attend, layers, metadata) in variants.items()
    }
    results = [np.asarray(program(), np.float32) for program in programs.values()]
    tolerance = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 2e-1}[_DTYPE.value]
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], rtol=tolerance, atol=tolerance)
    turns: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(_REPEATS.value):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program())
            turns[name].append((time.perf_counter() - start) * 1e3 / _LAYERS.value)
    return turns


def ratio(turns: dict[str, list[float]], name: str, base: str) -> float:
    """Returns the median over the turns of one variant's time divided by another's."""
    pairs = zip(turns[name], turns[base], strict=True)
    return statistics.median(time / other for time, other in pairs)


def decode_row(batch: int, context: int, heads: str) -> dict[str, Any]:
    """One row of the decode table."""
    ways: dict[str, Attend] = {"paged": paged_attention, "gather": attend_gathered}
    turns = time_variants(*make_variants(make_spec(batch, context, heads), ways, attend_dense))
    return {
        "batch": batch,
        "context": context,
        "heads": heads,
        **{f"{name}_ms": statistics.median(times) for name, times in turns.items()},
        "paged/contiguous": ratio(turns, "paged", "contiguous"),
        "gather/paged": ratio(turns, "gather", "paged"),
    }


def width_row(batch: int, context: int, heads: str, widths: list[int]) -> dict[str, Any]:
    """The cost of one step with tables for ever longer sequences; the first width just fits."""
    variants: dict[str, Variant] = {}
    for width in widths:
        spec = make_spec(batch, context, heads, max_blocks=width // _BLOCK_SIZE.value)
        q, made = make_variants(spec, {f"tables for {width}": paged_attention}, None)
        variants |= made
    turns = time_variants(q, variants)
    first, last = f"tables for {widths[0]}", f"tables for {widths[-1]}"
    return {
        "batch": batch,
        "context": context,
        "heads": heads,
        **{f"{name}_ms": statistics.median(times) for name, times in turns.items()},
        "last/first": ratio(turns, last, first),
    }


def prefill_row(context: int, heads: str) -> dict[str, Any]:
    """One prompt beside causal attention over contiguous keys that computes the whole square."""
    spec = make_spec(1, context, heads, query_lens=(context,), num_tokens=context)
    turns = time_variants(*make_variants(spec, {"paged": paged_attention}, attend_prompt))
    return {
        "prompt": context,
        "heads": heads,
        **{f"{name}_ms": statistics.median(times) for name, times in turns.items()},
        "paged/contiguous": ratio(turns, "paged", "contiguous"),
    }


def tune_rows(batch: int, context: int, heads: str) -> list[dict[str, Any]]:
    """Decode with other numbers of rows and tokens per turn, each beside the defaults."""
    options: dict[str, Any] = {"sliding_window": None, "logits_soft_cap": None}
    options |= {"alibi_slopes": None, "sinks": None, "scale": _HEAD_DIM.value**-0.5}

    def tuned(tuning: xla.Tuning) -> Attend:
        return lambda *args: xla.paged_attention(*args, **options, tuning=tuning)[0]

    tunings = {
        f"rows {rows}, tokens {tokens}": xla.Tuning(
            decode_rows=rows, decode_chunk=tokens, decode_bytes=1 << 30
        )
        for rows, tokens in itertools.product((4, 8, 16, 32), (32, 64, 128, 256))
    }
    ways = {"defaults": tuned(xla.Tuning())} | {name: tuned(t) for name, t in tunings.items()}
    turns = time_variants(*make_variants(make_spec(batch, context, heads), ways, None))
    step = {"batch": batch, "context": context, "heads": heads}
    return [
        step
        | dataclasses.asdict(tunings.get(name, xla.Tuning()))
        | {
            "name": name,
            "ms": statistics.median(times),
            "/defaults": ratio(turns, name, "defaults"),
        }
        for name, times in turns.items()
    ]


def main() -> None:
    """Times what the flags name and prints it."""
    batches, contexts = list(map(int, _BATCH.value)), list(map(int, _CONTEXT.value))
    steps = list(itertools.product(batches, contexts, _HEADS.value))
    tables: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "decode": lambda: [decode_row(*step) for step in steps],
        "width": lambda: [
            width_row(batches[0], contexts[0], heads, [contexts[0], 4096, 32768])
            for heads in _HEADS.value
        ],
        "prefill": lambda: [
            prefill_row(*step) for step in itertools.product(contexts, _HEADS.value)
        ],
        "tune": lambda: [row for step in steps for row in tune_rows(*step)],
    }
    unknown = set(_PARTS.value) - set(tables)
    if unknown:
        raise ValueError(f"--parts={sorted(unknown)} must be among {list(tables)}")
    device = jax.devices()[0].device_kind
    print(
        f"jax {jax.__version__} on {device}, {_DTYPE.value}, head_dim {_HEAD_DIM.value}, "
        f"blocks of {_BLOCK_SIZE.value}, lengths {_LENGTHS.value}; ms per layer"
    )
    results = {part: tables[part]() for part in _PARTS.value}
    for part, rows in results.items():
        show(part, rows)
    if _JSON.value:
        with open(_JSON.value, "w") as file:
            json.dump({"jax": jax.__version__, "device": device, **results}, file, indent=2)


if __name__ == "__main__":
    command_line.run(main)
