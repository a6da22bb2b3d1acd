"""The decode kernel's machine code for sm_90a: no spills, no warnings, and how it is launched."""

import collections
import re

import jax.numpy as jnp
import pytest

from benchmarks.attention_cases.decode import make_case
from pallas_paged.deviceless import compile_for, kernel_resources
from pallas_paged.ops.attention.config import shared_memory_bytes
from pallas_paged.ops.attention.hopper.decode import partial_results
from pallas_paged.ops.attention.hopper.decode_problem import scratch_types
from pallas_paged.ops.attention.work_list import CtaField, SequenceField, WorkList

ALL = {
    "sliding_window": 300,
    "logits_soft_cap": 30.0,
    "has_alibi": True,
    "has_sinks": True,
}
# What is compiled in each of the two ways: the table of `make kernels-full` has a hundred programs,
# every configuration among them, and `test_full_table.py` what is asked of them.
CASES = (
    make_case(4, 128, 16, 8, **ALL),
    make_case(3, 80, 32, 8, dtype="float16", cache_dtype="int8", has_alibi=True),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_spills(case):
    kernels = kernel_resources("h100", case.function, *case.arguments())
    assert [kernel.name for kernel in kernels] == [
        "paged_decode_mosaic_gpu_kernel",
        "paged_decode_merge_mosaic_gpu_kernel",
    ]
    for kernel in kernels:
        assert kernel.spill_bytes == 0
        assert kernel.warnings == ()


def test_shared_memory_is_what_was_computed():
    """The figure that a configuration is checked by; the compiler leaves out the barriers."""
    case = make_case(3, 64, 32)

    def kernel(work, *arrays):
        return partial_results(
            *arrays[:2],
            case.metadata(*arrays),
            work,
            None,
            None,
            problem=case.problem,
            config=case.config,
        )

    shapes = ((64, SequenceField.COUNT), (264, CtaField.COUNT))
    work = WorkList(*(jnp.zeros(shape, jnp.int32) for shape in shapes))
    (resources,) = kernel_resources(
        "h100", lambda *arrays: kernel(work, *arrays), *case.arguments()
    )
    barriers = 8 * (3 * case.config.num_stages + 1)
    computed = shared_memory_bytes(scratch_types(case.problem, case.config))
    assert resources.smem_bytes == computed - barriers


def test_a_step_plans_once_and_copies_no_cache():
    """Two layers: the plan's launches once, then per layer q's padding and two kernels.

    The plan: running sums, the sequences with work, where the shares' ends lie, the shares.
    """
    case = make_case(4, 128, 16)

    def step(q, *rest):
        for _ in range(2):
            out, _ = case.function(q, *rest)
            q = out * jnp.bfloat16(0.5)
        return q

    compiled = compile_for("h200", step, *case.arguments())
    program = compiled.as_text()
    entry = program[program.index("\nENTRY") :]
    instructions = re.findall(r" = .*? ([a-z-]+)\(", entry)
    free = {"parameter", "get-tuple-element", "bitcast", "tuple", "constant"}
    launches = collections.Counter(name for name in instructions if name not in free)
    assert launches["custom-call"] == 4
    assert launches["fusion"] <= 4 + 3  # the plan; q, q between the layers, the result
    assert set(launches) == {"custom-call", "fusion"}
    cache_bytes = 1024 * 8 * 16 * 128 * 2
    assert compiled.memory_analysis().temp_size_in_bytes < cache_bytes / 4
