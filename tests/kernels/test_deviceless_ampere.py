"""The attention kernels' machine code where one computes a whole step: what it takes and launches.

For sm_80, sm_86, sm_89 and sm_100a. No spills, no warnings; how it waits for copies.
"""

import collections
import re

import jax.numpy as jnp
import pytest

from pallas_paged.deviceless import (
    KernelResources,
    compile_for,
    kernel_ptx,
    kernel_resources,
)
from pallas_paged.ops.attention.ampere.problem import scratch_types
from pallas_paged.ops.attention.config import SM80, SM86, DecodeConfig, shared_memory_bytes
from tests.kernels.ampere_cases import FEATURES, CompileCase

ALL = FEATURES[3]
# The table of `make kernels-full` has a hundred others, of which `test_full_table.py` asks as much.
CASES = (
    CompileCase(1, 128, 16, 256, "float16", "float8_e4m3fn", **ALL),
    CompileCase(4, 128, 16, 256, **ALL, target="a10"),
    CompileCase(8, 256, 16, 1, "bfloat16", "float8_e4m3fn", **ALL, target="l4"),
)


def resources(case: CompileCase) -> tuple[KernelResources, ...]:
    """Returns what the kernels of `case` take."""
    return kernel_resources(case.target, case.function, *case.arguments())


def ptx(case: CompileCase) -> str:
    """Returns the kernels of `case`."""
    return kernel_ptx(case.target, case.function, *case.arguments())


def test_sm100_computes_in_tensor_memory_without_spills(in_process_for):
    case = CompileCase(4, 128, 16, 256, **ALL, target="b200")
    kernels = in_process_for(case.target, resources, case)
    assert [kernel.name for kernel in kernels] == [
        "paged_attention_sm100_mosaic_gpu_kernel",
        "paged_attention_sm100_merge_mosaic_gpu_kernel",
    ]
    assert all(kernel.spill_bytes == 0 and kernel.warnings == () for kernel in kernels)
    program = in_process_for(case.target, ptx, case._replace(group=7))
    # 8 products of 16 numbers of head_dim, and 4 of 16 keys.
    assert program.count("tcgen05.mma.cta_group::1") == 8 + 4
    assert "mma.sync" not in program


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.target}-{case.name}")
def test_no_spills_and_enough_shared_memory(case, in_process_for):
    kernels = in_process_for(case.target, resources, case)
    assert [kernel.name for kernel in kernels] == [
        "paged_attention_sm80_mosaic_gpu_kernel",
        "paged_attention_sm80_merge_mosaic_gpu_kernel",
    ]
    for kernel in kernels:
        assert kernel.spill_bytes == 0
        assert kernel.warnings == ()
    computed = shared_memory_bytes(scratch_types(case.problem, case.chosen_config))
    limits = SM80 if case.target.startswith("a100") else SM86
    assert kernels[0].smem_bytes == computed <= limits.smem_per_cta_bytes
    # 65,536 registers per SM and 128 threads per CTA, given out by 8 a thread.
    assert case.chosen_config.ctas_per_sm * -(-kernels[0].registers // 8) * 8 * 128 <= 65536


def test_every_copy_is_a_group_and_waits_count_them(in_process_for):
    """The order of copies in which the interpreted tests believe is that of the machine code."""
    case = CompileCase(4, 64, 32, 1, config=DecodeConfig(num_stages=3, ctas_per_sm=2))
    program = in_process_for(case.target, ptx, case)
    copies = 2  # of keys per tile, and as many of values
    groups = program.count("cp.async.commit_group")
    assert groups == 2 * 2 * copies  # before the loop over tiles, and in it
    # No copy is started before every warp has read what was there.
    for before in program.split("cp.async.commit_group")[:-1]:
        assert "bar.sync" in re.split(r"cp\.async\.c[ag]", before)[0]
    assert len(re.findall(r"cp\.async\.c[ag]\.shared\.global", program)) % groups == 0
    in_flight = 2 * 2 * copies  # of the two tiles behind the one that is read
    waits = re.findall(r"cp\.async\.wait_group\s+(\d+)", program)
    assert sorted(map(int, waits)) == [0, 0, in_flight, in_flight + copies]
    assert "mma.sync.aligned.m16n8k16" in program


# The second one's blocks are copied flat, as rows of another length than they have.
LAYERS = (CompileCase(4, 128, 16, 1), CompileCase(4, 80, 16, 1, cache_dtype="float8_e4m3fn"))


def two_layers(case: CompileCase) -> tuple[str, int]:
    """Returns the program of two layers of decode, and the bytes of its temporaries."""

    def step(q, *rest):
        for _ in range(2):
            out, _ = case.function(q, *rest)
            q = out * jnp.bfloat16(0.5)
        return q

    compiled = compile_for(case.target, step, *case.arguments(num_tokens=16, num_blocks=4000))
    return compiled.as_text(), compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.name)
def test_a_step_plans_once_and_copies_no_cache(case, in_process_for):
    """Two layers: the plan once, then per layer the padding of q, two kernels and the result."""
    program, temporary_bytes = in_process_for(case.target, two_layers, case)
    entry = program[program.index("\nENTRY") :]
    instructions = re.findall(r" = .*? ([a-z-]+)\(", entry)
    free = {"parameter", "get-tuple-element", "bitcast", "tuple", "constant"}
    launches = collections.Counter(name for name in instructions if name not in free)
    assert launches["custom-call"] == 4
    assert launches["fusion"] <= 8 + 3  # the plan; q, q between the layers, the result
    assert set(launches) == {"custom-call", "fusion"}
    cache_bytes = 4000 * 2 * 16 * case.head_dim * case.problem.cache_dtype.itemsize
    assert temporary_bytes < cache_bytes
