"""How fast decode and prefill are, beside the device's ceilings and other ways to attend."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_suite import peers, programs, timing
from benchmarks.gpu_suite.layers import Layers, num_caches, rotations
from benchmarks.gpu_suite.shapes import (
    DECODE_AIMS,
    HEAD_DIM,
    MAX_STEP_TOKENS,
    PREFILL_AIMS,
    Shape,
    decode_shapes,
    prefill_shapes,
)
from benchmarks.gpu_suite.stage import Case, Context, Program, Row, Stage, why_none
from pallas_paged import AttentionMetadata, KVCache, paged_attention

CHECKED_QUERIES = 64
"""Of each sequence, its last ones: XLA's way is too slow for all of a long prompt's."""
TOLERANCE = 4e-2
"""Of bfloat16 results of several layers one after the other, as a share of a row's largest."""
_XLA_TURN_S = 5e-5
"""About what a turn of one of its loops takes; the host is asked in each."""
SLOWEST_XLA_S = 0.06
"""Of a layer; where it takes longer, it is not timed."""


class Attention(NamedTuple):
    """All that is timed at a shape.

    Attributes:
      shape: the step.
      on_gpu: else our kernel is not there, and sizes are toys.
    """

    shape: Shape
    on_gpu: bool

    @property
    def ours(self) -> str:
        """The implementation that is the case's own."""
        return "mosaic_gpu" if self.on_gpu else "xla"

    def peers(self) -> dict[str, Callable[[], Layers]]:
        """Returns others' ways, by name; each may raise `NotImplementedError`."""
        on_gpu, shape = self.on_gpu, self.shape
        others: dict[str, Callable[[], Layers]] = {
            "dense": functools.partial(peers.dense, shape, on_gpu)
        }
        if shape.queries == 1:
            others["jax_paged"] = functools.partial(peers.jax_paged, shape, on_gpu, 16)
            others["jax_paged_few_splits"] = functools.partial(peers.jax_paged, shape, on_gpu, 4)
        return others

    def xla(self) -> Layers:
        """Returns XLA's way.

        Raises:
          NotImplementedError: it would take too long.
        """
        estimate = xla_seconds(self.shape)
        if self.on_gpu and estimate > SLOWEST_XLA_S:
            raise NotImplementedError(f"about {estimate:.2f} s a layer, too long to be timed")
        return paged(self.shape, "xla", self.on_gpu, estimate)

    def check(self) -> timing.Loop:
        """Returns XLA's way, for the last queries, with as many layers as our lesser loop has."""
        shape = self.shape._replace(queries=min(self.shape.queries, CHECKED_QUERIES))
        others = paged(
            shape, "xla", self.on_gpu, xla_seconds(shape), all_queries=self.shape.queries
        )
        few = paged(self.shape, self.ours, self.on_gpu).counts[0]
        return others.loop(few, others.turns)  # for a decode it is one of the two that are timed

    def programs(self) -> tuple[Program, ...]:
        """Returns what the case loads."""
        every: list[timing.Loop] = [*paged(self.shape, self.ours, self.on_gpu).loops, self.check()]
        for peer in (self.xla, *self.peers().values()):
            try:
                every += peer().loops
            except NotImplementedError:
                continue  # the case says so
        drawn = [program for loop in every for program in timing.drawn_by(loop.operands)]
        return timing.unique([*(loop.program for loop in every), *drawn])


def paged(
    shape: Shape,
    implementation: str,
    on_gpu: bool,
    estimate_s: float | None = None,
    shuffled: bool = True,
    all_queries: int | None = None,
) -> Layers:
    """Returns layers of `paged_attention`, each over a cache of its own, as in a model.

    Args:
      shape: the step.
      implementation: of `paged_attention`.
      on_gpu: else layers are few and turns two.
      estimate_s: about the seconds of a layer; None for the GPU's rates.
      shuffled: whether a sequence's blocks lie in random order.
      all_queries: those drawn for each sequence, of which the last `shape.queries` are used.
    """
    rotated = rotations(shape, on_gpu)
    turns_of = max(2, rotated)
    num_blocks = 1 + rotated * shape.batch * shape.blocks_per_seq
    drawn = all_queries or shape.queries
    pool = num_blocks, shape.num_kv_heads, shape.block_size, HEAD_DIM
    caches = [
        timing.normal_cache(2 * i, pool, shape.value_scale)
        for i in range(num_caches(shape, on_gpu))
    ]
    rows = shape.batch * shape.queries, shape.num_q_heads, HEAD_DIM
    tables = turns_of, shape.batch, shape.blocks_per_seq
    host = {
        "tables": timing.block_tables(tables, rotated, first=1, shuffled=shuffled),
        "lens": timing.Host(functools.partial(np.full, tables[:2], shape.context), tables[:2]),
        "starts": timing.Host(
            lambda: np.arange(shape.batch + 1) * shape.queries, (shape.batch + 1,)
        ),
    }
    queries = timing.Normal(99, (turns_of, shape.batch, drawn, *rows[1:]))
    name = f"paged attention {shape.name}, {implementation}"
    if drawn != shape.queries:
        name += f", the last {shape.queries} of {drawn} queries"

    def begin(turn: jax.Array, previous: jax.Array, queries: jax.Array, host: Any) -> Any:
        # Lengths are read anew in each turn, so that the plan is not made before the loop.
        now = turn % turns_of
        unread = jnp.zeros(rows[0], jnp.int32)
        metadata = AttentionMetadata(
            positions=unread,
            slot_mapping=unread,
            block_tables=host["tables"][now],
            seq_lens=host["lens"][now],
            query_start_loc=host["starts"],
            max_query_len=shape.queries,
        )
        q = queries[now][:, drawn - shape.queries :].reshape(rows)
        return timing.next_input(q, previous), metadata

    def attend(q: jax.Array, cache: KVCache, metadata: Any) -> jax.Array:
        # As in the engine, which looks at block ids once.
        return paged_attention(
            q, cache.k, cache.v, metadata, implementation=implementation, promise_in_bounds=True
        )

    operands = timing.zeros(rows), caches, queries, host
    return Layers.of(name, shape, on_gpu, begin, attend, operands, estimate_s)


def xla_seconds(shape: Shape) -> float:
    """Returns about the seconds of a layer in XLA's way on a GPU: its loops' turns."""
    if shape.queries == 1:
        return _XLA_TURN_S * -(-shape.batch // 8) * -(-shape.context // 64)
    tiles = shape.batch * -(-shape.queries // 64)
    return _XLA_TURN_S * tiles * -(-(shape.context - shape.queries // 2) // 128)


def run(attention: Attention, context: Context) -> Row:
    """Times a shape in every way there is; only our own failure is the case's."""
    shape, on_gpu = attention.shape, attention.on_gpu
    ours = paged(shape, attention.ours, on_gpu)
    arrays = timing.make(ours.operands, context)
    measured, results = ours.measure(arrays, context)
    row: Row = {"implementation": attention.ours, "layers": f"{ours.counts[1]}-{ours.counts[0]}"}
    if (shared := len(ours.operands[1])) < ours.counts[1]:
        row["caches"] = f"{ours.counts[1]} layers share {shared}: more do not fit"
    for first, last in results:
        if number := timing.differing(first, last):
            raise ValueError(f"two calls of the same program differ in {number} bytes")
    row |= compare(attention, results[0][0][0], arrays, context)
    row |= measured
    us = row["us"]
    if on_gpu and us is not None and (bandwidth := context.ceiling("copy bandwidth")):
        row["bandwidth_share"] = shape.moved_bytes / (us / 1e6) / bandwidth
    if on_gpu and us is not None and (rate := context.ceiling("matmul rate")):
        row["matmul_share"] = shape.operations / (us / 1e6) / rate

    def in_order() -> Row:
        tables = paged(shape, attention.ours, on_gpu, shuffled=False).operands[3]["tables"]
        host = arrays[3] | {"tables": timing.make(tables, context)}
        return ours.measure((*arrays[:3], host), context)[0]

    row |= _named("in_order", _or_reason(in_order), us)
    row |= _named("xla", _or_reason(lambda: attention.xla().measure(arrays, context)[0]), us)
    del in_order, arrays
    for name, peer in attention.peers().items():
        row |= _named(name, _or_reason(functools.partial(_peer, peer, context)), us)
    return row


def _peer(peer: Callable[[], Layers], context: Context) -> Row:
    layers = peer()
    return layers.measure(timing.make(layers.operands, context), context)[0]


def compare(
    attention: Attention, result: np.ndarray, arrays: tuple[Any, ...], context: Context
) -> Row:
    """Returns the error of our result beside XLA's, or why there is none.

    Raises:
      ValueError: the error is too large; a wrong result gets no time.
    """
    shape, loop = attention.shape, attention.check()
    try:
        zeros, caches, queries, host = timing.make(loop.operands[:1], context), *arrays[1:]
        starts = timing.make(loop.operands[3]["starts"], context)
        program = programs.load(loop.program, context)
        leaves = program(*zeros, caches, queries, host | {"starts": starts})
        (right,) = timing.checked(leaves)
    except Exception as error:
        return {"error": None, "error_reason": why_none(error)}
    heads = shape.num_q_heads, HEAD_DIM
    checked = right.reshape(shape.batch, -1, *heads)
    result = result.reshape(shape.batch, -1, *heads)[:, -checked.shape[1] :]
    apart = relative_error(result, checked)
    if not apart <= TOLERANCE:
        raise ValueError(f"differs from XLA's result by {apart:.3g} of a row, over {TOLERANCE}")
    return {"error": apart}


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Returns the largest difference, as a share of the largest number of its row (last axis)."""
    wide, right = actual.astype(np.float32), expected.astype(np.float32)
    largest = np.max(np.abs(right), axis=-1, keepdims=True) + 1e-30
    return float(np.max(np.abs(wide - right) / largest))


def _or_reason(measure: Callable[[], Row]) -> Row:
    try:
        return measure()
    except Exception as error:
        return {"us": None, "us_reason": why_none(error)}


def _named(name: str, row: Mapping[str, Any], ours_us: float | None) -> Row:
    """Returns a peer's figures under its name."""
    row = {"reason" if key == "us_reason" else key: value for key, value in row.items()}
    named = {f"{name}_{key}": value for key, value in row.items()}
    if row["us"] is not None and ours_us is not None:
        named[f"{name}/ours"] = row["us"] / ours_us
    return named


def why_not(shape: Shape, context: Context) -> str | None:
    """Returns why a shape is not timed at all."""
    if shape.batch * shape.queries > MAX_STEP_TOKENS:
        return f"{shape.batch * shape.queries} tokens in one step, more than {MAX_STEP_TOKENS}"
    limit = jax.devices()[0].memory_stats() if context.on_gpu else None
    pools = num_caches(shape, context.on_gpu) * rotations(shape, context.on_gpu)
    needed = pools * shape.kv_bytes * 1.02 + 8 * (shape.moved_bytes - shape.kv_bytes)
    if limit is not None and needed > limit["bytes_limit"]:
        return f"{needed / 2**30:.0f} GiB needed, {limit['bytes_limit'] / 2**30:.0f} GiB there"
    return None


def _cases(shapes: list[Shape], toys: list[Shape], context: Context) -> list[Case]:
    cases = []
    for shape in shapes if context.on_gpu else toys:
        attention = Attention(shape, context.on_gpu)
        cases.append(
            Case(
                shape.name,
                functools.partial(run, attention),
                functools.partial(why_not, shape),
                attention.programs,
                limit_s=20.0,
                run_s=3.0,
            )
        )
    return cases


_RATIOS = ("in_order/ours", "dense/ours", "xla/ours")
DECODE = Stage(
    "decode",
    45,
    functools.partial(_cases, decode_shapes(), [Shape(2, 40, "4/2", 16)]),
    (
        *("us", "plan_us", "noise", "error", "bandwidth_share"),
        *(*_RATIOS, "jax_paged/ours", "jax_paged_few_splits/ours"),
    ),
    aims=len(DECODE_AIMS),
)
PREFILL = Stage(
    "prefill",
    35,
    functools.partial(_cases, prefill_shapes(), [Shape(2, 32, "4/2", 16, 32)]),
    ("us", "plan_us", "noise", "error", "matmul_share", *_RATIOS),
    aims=len(PREFILL_AIMS),
)
