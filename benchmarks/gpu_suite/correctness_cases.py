"""What is checked, in the order of what it tells: sizes, dtypes and options of attention.

No arrays here: `correctness.py` makes cases of these.
"""

import dataclasses
import functools
import itertools
from typing import Any

from benchmarks.attention_cases.arguments import AttentionSpec
from benchmarks.attention_cases.specs import (
    DECODE_KERNEL_SPECS,
    QUANTISED_KERNEL_SPECS,
    SPECS,
)

DTYPES = ("bfloat16", "float32", "float8_e4m3fn", "int8")
"""Of caches in which blocks are moved."""
WRITES = ("write_kv", "rotate_and_write")
QUANTISED = ("float8_e4m3fn", "int8")
"""Those whose scales may be given."""
MOVES = ("copy_blocks", "gather_blocks", "scatter_blocks")
OPERATIONS = (*WRITES, *MOVES)
BLOCK_SIZES = (16, 64, 32, 128)
HEAD_DIMS = (64, 80, 96, 192, 256)
"""Besides 128, which all others have."""
GROUPS = (1, 3, 5, 7, 8, 16)
"""Query heads per KV head, besides 4, which all others have."""
OPTIONS: dict[str, dict[str, Any]] = {
    "window": {"sliding_window": 100},
    "cap": {"logits_soft_cap": 5.0},
    "alibi": {"alibi": True},
    "sinks": {"sinks": True},
    "all": {"sliding_window": 77, "logits_soft_cap": 3.0, "alibi": True, "sinks": True},
}
LENS = (300, 1, 129, 64, 2000, 1999, 1024, 700, 65, 1500)
"""Several tiles for each thread block of a chip, so that their buffers go round."""
QUERIES = (1, 1, 40, 64, 3, 1, 500, 1, 64, 1)
"""Of these sequences, in a mixed step."""


@dataclasses.dataclass(frozen=True)
class PrefixSpec(AttentionSpec):
    """A step that is told of the blocks which its first sequence has in common with others."""


_make = functools.partial(
    AttentionSpec, num_q_heads=32, num_kv_heads=8, head_dim=128, block_size=16, dtype="bfloat16"
)
# Few blocks in a table, for the reference gathers all of them for every token.
_decode = functools.partial(_make, seq_lens=LENS, max_blocks=126)
_mixed = functools.partial(_decode, query_lens=QUERIES, num_tokens=704)


def _by_block_size(size: int) -> dict[str, AttentionSpec]:
    """Returns lengths around a block's size, by the kind of step.

    Decode is over more tokens than prompts have: these are long enough for the kernels' buffers to
    go round several times, and short enough for the reference. All but decode are one program.
    """
    ends = (0, 1, size - 1, size, size + 1, 777)
    lens = (*ends, 1025)
    some = tuple(-(-length // 3) for length in lens)
    mixed = tuple(length if i % 2 == 0 else min(length, 1) for i, length in enumerate(lens))
    prompts = functools.partial(
        _make, seq_lens=lens, block_size=size, num_tokens=2304, max_blocks=1025 // size + 2
    )
    return {
        "decode": _make(
            f"decode block {size}",
            (*ends, 4097, 2050),
            block_size=size,
            max_blocks=4097 // size + 2,
        ),
        "mixed": prompts(f"mixed block {size}", query_lens=mixed),
        "prefill": prompts(f"prefill block {size}", query_lens=lens),
        "chunk": prompts(f"chunk block {size}", query_lens=some),
    }


def _both(name: str, **fields: Any) -> list[AttentionSpec]:
    """Returns a decode step and a mixed one."""
    return [_decode(f"decode {name}", **fields), _mixed(f"mixed {name}", **fields)]


def _grouped(kind: str, group: int) -> AttentionSpec:
    make = _decode if kind == "decode" else _mixed
    return make(f"{kind} group {group}", num_q_heads=4 * group, num_kv_heads=4)


def basic_specs() -> list[AttentionSpec]:
    """Returns one step of each kind."""
    kinds = _by_block_size(16)
    return [kinds[kind] for kind in ("decode", "mixed", "prefill")]


def empty_specs() -> list[AttentionSpec]:
    """Returns steps whose sequences are taken away before they run, so that all is padding."""
    return [
        _make("decode nothing", (30, 1, 200)),
        _make("mixed nothing", (30, 1, 200), (30, 1, 20)),
    ]


def small_specs() -> list[AttentionSpec]:
    """Returns steps with less work than a chip has thread blocks."""
    return [
        _make("decode one token", (1,)),
        _make("decode little", (1, 64, 5, 65, 0)),
        _make("mixed little", (70, 3, 1), (70, 1, 1)),
    ]


def first_specs() -> list[AttentionSpec]:
    """Returns every head size, group and option, and every dtype."""
    specs = [
        *_both("float8", cache_dtype="float8_e4m3fn"),
        *_both("int8", cache_dtype="int8"),
        _decode("decode float16", dtype="float16"),
    ]
    for head_dim in HEAD_DIMS:
        specs += _both(f"dim {head_dim}", head_dim=head_dim)
    specs += [_grouped("decode", group) for group in GROUPS]
    specs += [_grouped("mixed", group) for group in (1, 8, 16)]
    for name, option in OPTIONS.items():
        specs += _both(name, **option)
    return specs


def more_specs() -> list[AttentionSpec]:
    """Returns the other block sizes, and what is seldom met."""
    specs = [_by_block_size(16)["chunk"], _mixed("mixed float16", dtype="float16")]
    for size in BLOCK_SIZES[1:]:
        specs += _by_block_size(size).values()
    specs += [_grouped("mixed", group) for group in (3, 5, 7)]
    for i, (head_dim, cache_dtype) in enumerate(
        itertools.product((64, 96, 192, 256), ("float8_e4m3fn", "int8"))
    ):
        size = (64, 16, 128, 32)[i % 4]
        specs += _both(
            f"{cache_dtype} dim {head_dim}",
            head_dim=head_dim,
            block_size=size,
            max_blocks=2000 // size + 2,
            dtype=("float16", "bfloat16")[i // 2 % 2],
            cache_dtype=cache_dtype,
            **OPTIONS["all"],
        )
    specs += [
        _make("decode few tokens", (500, 64, 7, 1000), (2, 4, 3, 8)),
        _make("decode one long", (32768,), num_q_heads=8, num_kv_heads=2),
        _make(
            "decode many",
            tuple(range(1, 301)),
            num_rows=300,
            num_tokens=300,
            num_q_heads=8,
            num_kv_heads=2,
        ),
        _decode("decode shared", num_shared_blocks=3),
    ]
    for name, option in {
        "": {},
        " float8": OPTIONS["cap"] | {"alibi": True, "sinks": True},
    }.items():
        dtype = "float8_e4m3fn" if name else None
        spec = _decode("", num_shared_blocks=16, cache_dtype=dtype, **option)
        specs.append(PrefixSpec(**vars(spec) | {"name": f"decode behind a shared prefix{name}"}))
    return specs


def kernel_specs() -> list[AttentionSpec]:
    """Returns the specs that all implementations share, in sizes that the kernels take.

    Odd lengths, wide tables and sequences without queries are theirs.
    """
    specs = [*DECODE_KERNEL_SPECS, *QUANTISED_KERNEL_SPECS]
    seen = set()
    for spec in SPECS:
        quantised = spec.cache_dtype in ("float8_e4m3fn", "int8")
        sized = dataclasses.replace(
            spec,
            dtype="float16" if spec.dtype == "float16" else "bfloat16",
            cache_dtype=spec.cache_dtype if quantised else None,
            head_dim=max(spec.head_dim, 64),
            block_size=max(spec.block_size, 16),
        )
        without_name = dataclasses.replace(sized, name="")
        if without_name not in seen:
            specs.append(sized)
        seen.add(without_name)
    return [dataclasses.replace(spec, name=f"spec {spec.name}") for spec in specs]


def common_specs() -> list[AttentionSpec]:
    """Returns the same as they are, for what takes every size."""
    return [dataclasses.replace(spec, name=f"spec {spec.name}") for spec in SPECS]


def large_specs() -> list[AttentionSpec]:
    """Returns steps over few blocks, which `correctness_large.py` moves to a large cache's end."""
    lens, queries = (40, 17), (20, 1)
    return [
        _make("decode in 4.5 GiB", lens),
        _make("mixed in 4.5 GiB", lens, queries),
        _make("decode in 4.5 GiB of int8", lens, cache_dtype="int8"),
    ]


def interpreted_specs() -> list[AttentionSpec]:
    """Returns sizes small enough for interpreted kernels; the last four have all of it."""
    make = functools.partial(
        AttentionSpec, num_q_heads=4, num_kv_heads=2, head_dim=64, block_size=16, dtype="bfloat16"
    )
    lens = (17, 0, 33)
    return [
        make("decode", lens),
        make("mixed", lens, (1, 0, 20)),
        make("prefill", (20,), (20,)),
        make("float8", lens, cache_dtype="float8_e4m3fn", sinks=True),
        make("int8", lens, (1, 0, 20), cache_dtype="int8", sliding_window=9),
        make("one token", (1,)),
    ]


def interpreted_empty_specs() -> list[AttentionSpec]:
    """Returns a small step whose sequences are taken away."""
    spec = interpreted_specs()[0]
    return [dataclasses.replace(spec, name="nothing")]
