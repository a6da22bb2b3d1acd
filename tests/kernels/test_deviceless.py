"""Compilation for GPUs that are not here."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.deviceless import (
    TARGETS,
    _parse,
    compile_for,
    kernel_resources,
    target_device,
)

SHAPE = jax.ShapeDtypeStruct((256, 256), jnp.float32)


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_compiles(target):
    compiled = compile_for(target, lambda x, y: (x @ x, y + 1), SHAPE, SHAPE, donate_argnums=1)
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes == 2 * 256 * 256 * 4
    assert memory.alias_size_in_bytes == 256 * 256 * 4
    assert "NVIDIA" in target_device(target).device_kind


def test_the_compilation_cache_is_left_alone(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        for _ in range(2):
            compile_for("h200", lambda x: x @ x, SHAPE)
        assert not list(tmp_path.iterdir())
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_unknown_target():
    with pytest.raises(ValueError, match="'v100' is unknown; use one of a10, a100-40gb, "):
        target_device("v100")


def scale(factor, x):
    """A kernel by way of shared memory."""

    def body(x_ref, out_ref, tile, barrier):
        plgpu.copy_gmem_to_smem(x_ref, tile, barrier)
        plgpu.barrier_wait(barrier)
        out_ref[...] = factor * tile[...]

    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    scratch = [plgpu.SMEM(x.shape, x.dtype), plgpu.Barrier()]
    return plgpu.kernel(body, out_type=out, scratch_types=scratch)(x)


def test_the_compilers_report_is_read():
    x = jax.ShapeDtypeStruct((256,), jnp.float32)
    (kernel,) = kernel_resources("h100", lambda x: scale(2.0, x), x)
    assert 1024 <= kernel.smem_bytes <= 2048
    assert 8 <= kernel.registers <= 255
    assert kernel.spill_bytes == 0
    assert kernel.warnings == ()
    with pytest.raises(RuntimeError, match="no Mosaic GPU kernel was compiled"):
        kernel_resources("h100", lambda x: x + 1.0, x)


def test_spills_and_warnings_are_seen():
    report = """
kernel attend: smem_scratch_bytes=4096
kernel merge: smem_scratch_bytes=512
ptxas info    : (C7511) Potential Performance Loss: serialized in the function 'attend'
ptxas info    : Compiling entry function 'attend' for 'sm_90a'
ptxas warning : (C7504) Potential Performance Loss
ptxas info    : Function properties for attend
    64 bytes stack frame, 48 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 168 registers, used 2 barriers
ptxas warning : Registers are spilled to local memory in function 'merge'
ptxas info    : Compiling entry function 'merge' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers"""
    attend, merge = _parse(report)
    assert (attend.name, attend.registers, attend.spill_bytes) == ("attend", 168, 64)
    assert attend.warnings == (
        "ptxas info    : (C7511) Potential Performance Loss: serialized in the function 'attend'",
        "ptxas warning : (C7504) Potential Performance Loss",
    )
    assert merge.warnings == (
        "ptxas warning : Registers are spilled to local memory in function 'merge'",
    )
    assert (merge.name, merge.registers, merge.spill_bytes) == ("merge", 10, 0)
    assert attend.smem_bytes == merge.smem_bytes == 4096
