"""Holds the Triton kernel against dense attention, and looks at what it is compiled to.

  python -m benchmarks.gpu_suite.check_triton_paged                      # run it
  python -m benchmarks.gpu_suite.check_triton_paged --compile_for=90     # registers and spills

Needs torch, triton, numpy and absl-py, and not jax. Without a GPU the first interprets the kernel,
in float16 (tested with torch 2.11 and triton 3.6, whose interpreter needs numpy < 2.4, and with
torch 2.13 and triton 3.9); with one it runs as compiled, in bfloat16. The second needs no GPU: it
compiles every variant and size for that architecture (90 is an H100 or H200). Ends with 1 if an
output is wrong, or if registers are spilled.
"""

import importlib.util
import itertools
import math
import os
import re
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

from absl import app, flags

from benchmarks.gpu_suite import triton_paged
from benchmarks.gpu_suite.triton_paged import CONFIGS, HEAD_DIMS, MAX_GROUP, PAGE_SIZES, Config

_COMPILE_FOR = flags.DEFINE_integer("compile_for", None, "Compile for this architecture, e.g. 90.")
TOLERANCE = {"cpu": 1e-3, "cuda": 1e-2}
"""Of an output's norm: float16 on a CPU, bfloat16 on a GPU."""


class Sizes(NamedTuple):
    """A case; as its shapes are named elsewhere."""

    num_kv_heads: int
    group: int
    head_dim: int
    page_size: int
    splits: int
    config: Config


def cases() -> list[Sizes]:
    """Returns each group, page size, head_dim, number of splits and variant at least twice."""
    splits = (1, 2, 3, 5, 16, 17, 40)
    found = []
    for i in range(3 * MAX_GROUP):
        group = 1 + i % MAX_GROUP
        config = CONFIGS[i % len(CONFIGS)]._replace(tile=(32, 64, 128)[i // MAX_GROUP])
        sizes = HEAD_DIMS[i // 2 % 2], PAGE_SIZES[i % 3], splits[i % len(splits)]
        found.append(Sizes(1 + i % 2, group, *sizes, config))
    return found


def worst_error(torch: Any, device: str, sizes: Sizes) -> float:
    """Returns the worst error of a head, of the norm of its output; NaN if one is.

    Pages are shuffled; what holds no token is NaN, and tables lead there beyond a sequence's end.
    """
    page_size = sizes.page_size
    lens = [1, page_size - 1, page_size, page_size + 1, 257, 3 * page_size + 7]
    per_row = max(math.ceil(length / page_size) for length in lens) + 1
    num_heads = sizes.num_kv_heads * sizes.group
    dtype = torch.float16 if device == "cpu" else torch.bfloat16
    q = torch.randn(len(lens), num_heads, sizes.head_dim).to(dtype)
    size = 1 + len(lens) * per_row, sizes.num_kv_heads, page_size, sizes.head_dim
    k_pages, v_pages = (torch.full(size, math.nan, dtype=dtype) for _ in range(2))
    tables = 1 + torch.randperm(len(lens) * per_row).view(len(lens), per_row)
    expected = torch.empty(q.shape)
    for seq, length in enumerate(lens):
        k, v = (torch.randn(length, *size[1::2]).to(dtype) for _ in range(2))  # [L, Hk, D]
        at = torch.arange(length)
        pages = tables[seq, at // page_size]
        k_pages[pages, :, at % page_size], v_pages[pages, :, at % page_size] = k, v
        tables[seq, math.ceil(length / page_size) :] = 0
        queries = q[seq].float().view(sizes.num_kv_heads, sizes.group, sizes.head_dim)
        scores = queries @ k.float().permute(1, 2, 0) / math.sqrt(sizes.head_dim)
        out = torch.softmax(scores, -1) @ v.float().transpose(0, 1)
        expected[seq] = out.view(num_heads, sizes.head_dim)
    q, k_pages, v_pages = (x.to(device) for x in (q, k_pages, v_pages))
    tables = tables.to(device, torch.int32)
    lengths = torch.tensor(lens, dtype=torch.int32, device=device)
    out = triton_paged.paged_decode(
        q, k_pages, v_pages, tables, lengths, sizes.splits, sizes.config
    )
    out = out.float().cpu()
    return float(((out - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def check() -> bool:
    """Runs all cases; returns whether all outputs are right."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    torch.manual_seed(0)
    right = True
    for sizes in cases():
        error = worst_error(torch, device, sizes)
        is_right = error <= TOLERANCE[device]
        right &= is_right
        print(f"{'right' if is_right else 'WRONG'} {error:.1e} {sizes}", flush=True)
    print(f"{len(cases())} cases on {device}, {'interpreted' if device == 'cpu' else 'compiled'}")
    return right


# --- compiling without a GPU ----------------------------------------------------------------------


def compile_all(architecture: int) -> bool:
    """Compiles every variant and size; returns whether none spills registers."""
    attend, merge = triton_paged.kernels()
    kv = dict.fromkeys(("q", "k_pages", "v_pages"), "*bf16")
    numbers = {"tables": "*i32", "lens": "*i32", "sums": "*fp32", "pages_per_row": "i32"}
    right = True
    sizes = itertools.product(HEAD_DIMS, PAGE_SIZES, CONFIGS, ("*fp32", "*bf16"))
    for head_dim, page_size, config, outs in sizes:
        types = kv | numbers | {"outs": outs, "scale_log2": "fp32"}
        constants = {"head_dim": head_dim, "page_size": page_size, "group": 4}
        constants |= {"tile": config.tile, "rows": triton_paged.ROWS}
        options = {"num_warps": config.warps, "num_stages": config.stages}
        right &= compile_one(architecture, attend, types, constants, options) == 0
    types = {"outs": "*fp32", "sums": "*fp32", "out": "*bf16", "num_splits": "i32"}
    for head_dim in HEAD_DIMS:
        constants = {"head_dim": head_dim, "most": 64, "piece": triton_paged.PIECE}
        right &= compile_one(architecture, merge, types, constants, {"num_warps": 4}) == 0
    return right


def compile_one(
    architecture: int,
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, int],
    options: dict[str, int],
) -> int:
    """Compiles a kernel, prints what it takes, returns the bytes of its stack: what it spills."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    aligned = [name for name, kind in types.items() if kind.startswith("*") or kind == "i32"]
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in kernel.arg_names},
        constexprs=constants,
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source, target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if numbers is None:
        raise ValueError(f"cuobjdump says nothing of registers: {usage}")
    registers, stack_bytes = map(int, numbers.groups())
    print(
        f"{registers} registers, {stack_bytes} bytes of stack, {compiled.metadata.shared} bytes"
        f" shared: {kernel.fn.__name__} {constants} {options}",
        flush=True,
    )
    return stack_bytes


def main(argv: list[str]) -> None:
    """Does what the flags say."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    for package in ("torch", "triton"):
        if importlib.util.find_spec(package) is None:
            print(f"error: {package} is not installed", file=sys.stderr)
            sys.exit(2)
    right = check() if _COMPILE_FOR.value is None else compile_all(_COMPILE_FOR.value)
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    app.run(main)
