"""How fast PyTorch is on the same sizes, if it is there.

In a process of its own, so that only one library holds the GPU's memory. The work of a turn is
captured into a CUDA graph, so that the host's time does not count. What is timed was held against
dense attention in float32 before: a peer that computes something else is none.
"""

import functools
import importlib.util
import math
import statistics
from collections.abc import Callable
from typing import Any

from benchmarks.gpu_suite import torch_attention
from benchmarks.gpu_suite.shapes import DECODE_AIMS, HEAD_DIM, PREFILL_AIMS, Shape
from benchmarks.gpu_suite.stage import Case, Context, Row, Stage, results, why_none
from benchmarks.gpu_suite.torch_attention import COMPILED, PEERS, Peer, Setting

L2_BYTES = 60 * 2**20
MAX_LAYERS = 64
TOLERANCE = 1e-2
"""Of the norm of a query's output: three times what bfloat16 leaves, and less than what one token
of 4096 contributes."""
GRAPH_S, MAX_GRAPH_CALLS = 1e-3, 64
"""A graph is about so long, that its own start does not count, unless it has so many calls."""
GUESS_BYTES_PER_S, GUESS_FLOPS, GUESS_LAUNCH_S = 3e12, 5e14, 5e-6
"""Only to choose how many calls a graph has."""
SHAPES = (
    *DECODE_AIMS,
    PREFILL_AIMS[0],
    Shape(8, 2048, "32/8", 16),
    PREFILL_AIMS[2],
    Shape(256, 2048, "32/8", 16),
    Shape(64, 2048, "32/32", 16),
    Shape(1, 2048, "32/8", 16, 2048),
)
"""The most important first. Of prompts that differ in the size of a block only, one: nothing that
is timed here in prefill knows of it."""
_ENVIRONMENT = (
    ("JAX_PLATFORMS", "cpu"),  # one library has the GPU's memory
    ("TORCHINDUCTOR_COMPILE_THREADS", "1"),  # else each process has as many more as there are cores
)
TOYS = (
    Shape(2, 200, "4/2", 16),
    Shape(1, 256, "2/2", 16, 256),
    Shape(1, 200, "4/2", 16, 64),
)


def _torch(context: Context) -> Any:
    if importlib.util.find_spec("torch") is None:
        raise NotImplementedError("torch is not installed")
    import torch

    if context.on_gpu and not torch.cuda.is_available():
        raise NotImplementedError(f"torch {torch.__version__} finds no GPU")
    return torch


def _device(context: Context) -> str:
    return "cuda" if context.on_gpu else "cpu"


def graph_us(torch: Any, work: Callable[[], Any], calls: int) -> float:
    """Returns the microseconds of one of the `calls` that `work` makes on the GPU."""
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


def relative_error(torch: Any, shape: Shape, peer: Peer) -> float:
    """Returns how far a peer's outputs are from dense attention in float32.

    The norm of the difference over that of the output; the worst of a few queries, NaN if one is.
    """
    out, group = peer.attend(0), shape.num_q_heads // shape.num_kv_heads
    errors = []
    for seq in sorted({0, shape.batch - 1}):
        k, v = (x.float() for x in peer.keys(seq))  # [Hk, context, D]
        for row in sorted({0, shape.queries // 2, shape.queries - 1}):
            seen = shape.context - shape.queries + row + 1
            q = peer.q[seq, :, row].float().view(shape.num_kv_heads, group, HEAD_DIM)
            scores = q @ k[:, :seen].transpose(1, 2) / math.sqrt(HEAD_DIM)
            exact = (torch.softmax(scores, -1) @ v[:, :seen]).view(shape.num_q_heads, HEAD_DIM)
            difference = out[seq, :, row].float() - exact
            errors.append((difference.norm(dim=-1) / exact.norm(dim=-1)).max())
    return float(torch.stack(errors).max())


def layers_and_turns(shape: Shape) -> tuple[int, int]:
    """Returns how many layers miss the cache, and how often a graph goes through them."""
    layers = max(1, min(MAX_LAYERS, math.ceil(2 * L2_BYTES / shape.kv_bytes)))
    moving, computing = shape.moved_bytes / GUESS_BYTES_PER_S, shape.operations / GUESS_FLOPS
    estimate_s = layers * max(moving, computing, GUESS_LAUNCH_S)
    return layers, max(1, min(MAX_GRAPH_CALLS // layers, round(GRAPH_S / estimate_s)))


def measure(torch: Any, context: Context, shape: Shape, name: str) -> Row:
    """Returns a peer's error, and the microseconds of its fastest variant; none without a GPU.

    One wrong variant, and there is a reason and no time.
    """
    layers, turns = layers_and_turns(shape) if context.on_gpu else (2, 1)
    variants = PEERS[name](Setting(torch, _device(context), shape, layers))
    row: Row = {f"{name}_us": None}
    errors = {variant: relative_error(torch, shape, peer) for variant, peer in variants.items()}
    for variant, error in errors.items():
        if not error <= TOLERANCE:
            reason = f"wrong: {error:.2g} of the output's norm off {variant}".strip()
            return row | {f"{name}_error": error, f"{name}_reason": reason}
    row[f"{name}_error"] = max(errors.values())
    if not context.on_gpu:
        return row

    def work(peer: Peer) -> None:
        for _ in range(turns):
            for layer in range(layers):
                peer.attend(layer)

    times = {
        variant: graph_us(torch, functools.partial(work, peer), layers * turns)
        for variant, peer in variants.items()
    }
    fastest = min(times, key=lambda variant: times[variant])
    row[f"{name}_us"] = times[fastest]
    return row | ({f"{name}_variant": fastest} if fastest else {})


def run(shape: Shape, context: Context) -> Row:
    """Checks and times all peers; each may fail alone."""
    torch = _torch(context)
    row: Row = {"torch": torch.__version__, "device": _device(context)}
    ours = ours_us(context, shape)
    for name in PEERS:
        try:
            row |= measure(torch, context, shape, name)
        except Exception as error:
            row |= {f"{name}_us": None, f"{name}_reason": why_none(error)}
        us = row[f"{name}_us"]
        if us is not None and ours is not None:
            row[f"{name}/ours"] = us / ours
    return row


def warm(shape: Shape, context: Context) -> None:
    """Compiles what a case needs by attending once, untimed, with one layer's keys and values.

    What torch and Triton compile stays in their caches on the disk (TORCHINDUCTOR_CACHE_DIR,
    TRITON_CACHE_DIR), where the process that runs the case finds it; what fails here has its reason
    there. Needs as much memory as one layer.
    """
    torch = _torch(context)
    for name in COMPILED:
        try:
            for peer in PEERS[name](Setting(torch, _device(context), shape, 1)).values():
                peer.attend(0)
            if context.on_gpu:
                torch.cuda.synchronize()
        except Exception as error:
            print(f"{shape.name}, {name}: {why_none(error)}")


def ours_us(context: Context, shape: Shape) -> float | None:
    """Returns what the earlier stages of this run measured for us, or None."""
    stage = "decode" if shape.queries == 1 else "prefill"
    return results(context.results, stage).get(shape.name, {}).get("us")


def shapes(context: Context) -> tuple[Shape, ...]:
    """Returns what there is a case of, the most important first."""
    return SHAPES if context.on_gpu else TOYS


def why_not(shape: Shape, context: Context) -> str | None:
    """Returns why a shape is not run at all: not even one layer's keys and values fit."""
    torch = _torch(context)
    return torch_attention.too_large(torch, _device(context), shape.moved_bytes)


def _cases(context: Context) -> list[Case]:
    return [
        Case(
            shape.name,
            functools.partial(run, shape),
            functools.partial(why_not, shape),
            prepare=functools.partial(warm, shape),
            limit_s=45.0,
            run_s=4.0,
            prepare_s=30.0,
            environment=_ENVIRONMENT,
        )
        for shape in shapes(context)
    ]


STAGE = Stage(
    "torch",
    45,
    _cases,
    (*(f"{name}_us" for name in PEERS), *(f"{name}/ours" for name in PEERS)),
    aims=len(DECODE_AIMS),
)
