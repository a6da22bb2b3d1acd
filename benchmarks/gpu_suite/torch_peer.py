"""PyTorch on the same sizes, if it is there: dense attention, and FlexAttention over pages.

In a process of its own, so that only one library holds the GPU's memory. The work of a turn is
captured into a CUDA graph, so that the host's time does not count.
"""

import functools
import importlib.util
import math
import statistics
from collections.abc import Callable
from typing import Any

from benchmarks.gpu_suite.shapes import (
    HEAD_DIM,
    MAX_STEP_TOKENS,
    Shape,
    decode_shapes,
    prefill_shapes,
)
from benchmarks.gpu_suite.stage import Case, Context, Row, Stage, results

L2_BYTES = 60 * 2**20
PAGE_SIZE = 128
"""FlexAttention's own piece of keys; its pages cannot be smaller at full speed."""


def _torch(context: Context) -> Any:
    if importlib.util.find_spec("torch") is None:
        raise NotImplementedError("torch is not installed")
    import torch

    if context.on_gpu and not torch.cuda.is_available():
        raise NotImplementedError(f"torch {torch.__version__} finds no GPU")
    return torch


def _random(torch: Any, context: Context, *shape: int) -> Any:
    device = "cuda" if context.on_gpu else "cpu"
    return torch.randn(shape, dtype=torch.bfloat16, device=device)


def graph_us(torch: Any, context: Context, work: Callable[[], Any], calls: int) -> float | None:
    """Returns the microseconds of one of the `calls` that `work` makes; None without a GPU."""
    if not context.on_gpu:
        work()
        return None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for _ in range(12):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / calls)
    return statistics.median(times[2:])


def sdpa_us(context: Context, shape: Shape) -> float | None:
    """Returns the microseconds of `scaled_dot_product_attention` over contiguous keys."""
    torch = _torch(context)
    copies = max(1, min(64, math.ceil(2 * L2_BYTES / shape.kv_bytes)))
    kv = shape.batch, shape.num_kv_heads, shape.context, HEAD_DIM
    layers = [(_random(torch, context, *kv), _random(torch, context, *kv)) for _ in range(copies)]
    q = _random(torch, context, shape.batch, shape.num_q_heads, shape.queries, HEAD_DIM)

    def work() -> Any:
        out = q
        for k, v in layers:
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=shape.queries > 1, enable_gqa=True
            )
        return out

    return graph_us(torch, context, work, copies)


def flex_us(context: Context, shape: Shape) -> float | None:
    """Returns the microseconds of compiled FlexAttention over shuffled pages of 128 tokens."""
    torch = _torch(context)
    from torch.nn.attention import flex_attention as flex
    from torch.nn.attention.experimental._paged_attention import PagedAttention

    device = "cuda" if context.on_gpu else "cpu"
    per_seq = math.ceil(shape.context / PAGE_SIZE)
    paged = PagedAttention(shape.batch * per_seq, PAGE_SIZE, shape.batch, device=device)
    # Shuffled by hand: `reserve` asks the device for every page.
    pages = torch.randperm(shape.batch * per_seq, device=device).view(shape.batch, per_seq)
    paged.page_table[:, :per_seq] = pages
    paged.physical_to_logical.scatter_(
        1, pages, torch.arange(per_seq, device=device).expand(shape.batch, per_seq)
    )
    paged.capacity[:] = per_seq * PAGE_SIZE
    last = shape.context - 1

    def mask_mod(b: Any, h: Any, q_index: Any, kv_index: Any) -> Any:
        del b, h
        return kv_index <= q_index + (last if shape.queries == 1 else 0)

    logical = flex.create_block_mask(
        mask_mod, shape.batch, None, shape.queries, per_seq * PAGE_SIZE, device=device
    )
    lengths = torch.full((shape.batch,), shape.context, device=device)
    rows = torch.arange(shape.batch, device=device)
    mask = paged.convert_logical_block_mask(logical, rows, lengths)
    score_mod = paged.get_score_mod(None, lengths)
    slots = 1, shape.num_kv_heads, shape.batch * per_seq * PAGE_SIZE, HEAD_DIM
    k, v = _random(torch, context, *slots), _random(torch, context, *slots)
    q = _random(torch, context, shape.batch, shape.num_q_heads, shape.queries, HEAD_DIM)
    attend = torch.compile(flex.flex_attention) if context.on_gpu else flex.flex_attention
    work = functools.partial(attend, q, k, v, score_mod=score_mod, block_mask=mask, enable_gqa=True)
    return graph_us(torch, context, work, 1)


def run(shape: Shape, context: Context) -> Row:
    """Times both; either may fail alone."""
    torch = _torch(context)
    row: Row = {"torch": torch.__version__, "device": "cuda" if context.on_gpu else "cpu"}
    ours = ours_us(context, shape)
    for name, measure in (("sdpa", sdpa_us), ("flex_paged", flex_us)):
        try:
            us = measure(context, shape)
        except Exception as error:
            row |= {f"{name}_us": None, f"{name}_reason": f"{type(error).__name__}: {error}"[:500]}
            continue
        row[f"{name}_us"] = us
        if us is not None and ours is not None:
            row[f"{name}/ours"] = us / ours
    return row


def ours_us(context: Context, shape: Shape) -> float | None:
    """Returns what the earlier stages of this run measured for us, or None."""
    stage = "decode" if shape.queries == 1 else "prefill"
    return results(context.results, stage).get(shape.name, {}).get("us")


def _cases(context: Context) -> list[Case]:
    if not context.on_gpu:
        shapes = [Shape(2, 256, "4/2", 16), Shape(1, 256, "2/2", 16, 256)]
    else:
        prompts = [s for s in prefill_shapes() if s.queries == s.context]
        prompts = [s for s in prompts if s.batch * s.queries <= MAX_STEP_TOKENS]
        shapes = [*decode_shapes()[:10], *prompts[:5], *decode_shapes()[10:], *prompts[5:]]
        # Block size means nothing here.
        seen: dict[Shape, Shape] = {}
        for shape in shapes:
            seen.setdefault(shape._replace(block_size=0), shape)
        shapes = list(seen.values())
    return [Case(shape.name, functools.partial(run, shape)) for shape in shapes]


STAGE = Stage(
    "torch",
    50,
    45,
    _cases,
    ("sdpa_us", "flex_paged_us", "sdpa/ours", "flex_paged/ours"),
    needs_jax=False,
)
