"""The launch grids of all kernels at their largest: within CUDA's limits, for Mosaic aborts beyond.

CUDA takes 2^31 - 1 thread blocks along a grid's first axis and 65,535 along each other one. The
last axis of a Mosaic GPU kernel's grid is CUDA's first. Read where JAX lowers kernels for a GPU.
"""

import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax._src.pallas.mosaic_gpu import lowering

import pallas_paged
from pallas_paged import AttentionMetadata, paged_attention
from pallas_paged.deviceless import TARGETS, compile_for, target_device
from pallas_paged.ops.attention import mosaic_gpu
from pallas_paged.ops.attention.hopper.prefill_config import PrefillTuning
from pallas_paged.ops.attention.hopper.prefill_plan import tile_tokens
from pallas_paged.ops.kv_write.mosaic_gpu import rotate_and_write
from tests.kernels.test_mosaic_cache_ops import operations, shapes

LIMIT = 65_535
MANY = 70_000
# With 16 query heads per KV head, the most there may be, a tile of prefill has the fewest tokens.
GROUP, TILE_TOKENS = 16, 8
MANY_TOKENS = TILE_TOKENS * (LIMIT + 1)

# Where the tests below see the kernels launched. A new one belongs there too.
FILES = {
    "copy_pair": "block_copy/mosaic_gpu.py",
    "gather_block": "block_transfer/mosaic_gpu.py",
    "scatter_block": "block_transfer/mosaic_gpu.py",
    "write_token": "kv_write/mosaic_gpu.py",
    "rotate_and_write_head": "kv_write/mosaic_gpu.py",
    "paged_decode": "attention/hopper/decode.py",
    "paged_decode_merge": "attention/hopper/decode_merge.py",
    "paged_prefill": "attention/hopper/prefill.py",
    "paged_attention_sm80": "attention/ampere/attend.py",
    "paged_attention_sm80_merge": "attention/ampere/attend.py",
    "paged_attention_sm100": "attention/blackwell/attend.py",
    "paged_attention_sm100_merge": "attention/blackwell/attend.py",
}


@pytest.fixture
def grids(monkeypatch):
    """Grids by the kernels' names, CUDA's first axis first, of what is lowered in a test."""
    found = {}
    lower = lowering.lower_jaxpr_to_module

    def lower_and_note(*args, **kwargs):
        result = lower(*args, **kwargs)
        (jaxpr,) = (each for each in (*args, *kwargs.values()) if hasattr(each, "debug_info"))
        found[jaxpr.debug_info.func_name] = result.grid
        return result

    monkeypatch.setattr(lowering, "lower_jaxpr_to_module", lower_and_note)
    return found


def check(grids, *names):
    assert grids.keys() == {*names} <= FILES.keys()
    for name, (x, *others) in grids.items():
        assert 0 < x < 2**31, (name, x)
        assert len(others) == 2
        assert all(0 < size <= LIMIT for size in others), (name, x, others)


def ints(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def test_every_kernel_is_among_them():
    ops = pathlib.Path(pallas_paged.__file__).parent / "ops"
    files = [path for path in ops.rglob("*.py") if "plgpu.kernel" in path.read_text()]
    assert {str(path.relative_to(ops)) for path in files} == {*FILES.values()}


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_many_blocks_are_copied_gathered_and_scattered(grids, dtype):
    """Compiled down to machine code; blocks are divided, so that no axis is 1 by chance."""
    sizes = (8, 32, 128, dtype)
    cache = shapes(MANY, *sizes)
    for name, arguments in (
        ("copy_blocks", (ints(MANY), ints(MANY))),
        ("scatter_blocks", (ints(MANY), cache)),
        ("gather_blocks", (ints(MANY),)),
    ):
        compile_for("h100", operations(sizes)[name][0], cache, *arguments)
    check(grids, "copy_pair", "scatter_block", "gather_block")
    pieces = 8 if dtype == "bfloat16" else 4
    assert {*grids.values()} == {(MANY, pieces, 1)}


def test_many_tokens_are_written(grids):
    sizes = (8, 16, 128, "bfloat16")
    rows = jax.ShapeDtypeStruct((1 << 20, 8, 128), jnp.bfloat16)
    write, _ = operations(sizes)["write_kv"]
    with jax.default_device(target_device("h100")):
        jax.jit(write).lower(shapes(MANY, *sizes), rows, rows, ints(1 << 20))
    check(grids, "write_token")
    assert grids["write_token"] == (1 << 20, 1, 1)


def test_many_tokens_are_rotated_and_written(grids):
    num_tokens = 1 << 20
    q = jax.ShapeDtypeStruct((num_tokens, 32, 128), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((num_tokens, 8, 128), jnp.bfloat16)
    angle = jax.ShapeDtypeStruct((num_tokens, 64), jnp.float32)
    cache = shapes(MANY, 8, 16, 128, "bfloat16")
    with jax.default_device(target_device("h100")):
        rotate_and_write.lower(q, k, k, angle, angle, cache, ints(num_tokens), None)
    check(grids, "rotate_and_write_head")
    assert grids["rotate_and_write_head"] == (num_tokens, 8, 1)


def attend(target, num_tokens, num_seqs, max_query_len):
    """Lowers attention in the kernels."""
    q = jax.ShapeDtypeStruct((num_tokens, 2 * GROUP, 64), jnp.bfloat16)
    cache = jax.ShapeDtypeStruct((4000, 2, 16, 64), jnp.bfloat16)
    step = (ints(num_seqs, 64), ints(num_seqs), ints(num_seqs + 1))

    def run(q, k, v, *step):
        unread = jnp.zeros(num_tokens, jnp.int32)
        metadata = AttentionMetadata(unread, unread, *step, max_query_len)
        return paged_attention(q, k, v, metadata, implementation="mosaic_gpu")

    with jax.default_device(target_device(target)):
        jax.jit(run).lower(q, cache, cache, *step)


@pytest.mark.parametrize("target", TARGETS)
def test_many_sequences_are_decoded(grids, target):
    """By as many thread blocks as the GPU holds, whatever the step is."""
    attend(target, MANY, MANY, 1)
    if target in ("h100", "h200"):
        check(grids, "paged_decode", "paged_decode_merge")
    elif target == "b200":
        check(grids, "paged_attention_sm100", "paged_attention_sm100_merge")
    else:
        check(grids, "paged_attention_sm80", "paged_attention_sm80_merge")
    num_sms = target_device(target).core_count
    assert all(x % num_sms == 0 and x <= 4 * num_sms for x, *_ in grids.values())


@pytest.mark.parametrize(
    "sizes", [(MANY_TOKENS, 1, MANY_TOKENS), (MANY, MANY, 9)], ids=["one-long", "many-short"]
)
def test_many_tokens_are_prefilled(grids, sizes):
    """By as many thread blocks as the GPU holds, however many tiles there may be."""
    assert tile_tokens(GROUP, 64) == TILE_TOKENS
    attend("h200", *sizes)
    check(grids, "paged_decode", "paged_decode_merge", "paged_prefill")
    assert grids["paged_prefill"] == (target_device("h200").core_count, 1, 1)


def test_a_thread_block_for_each_tile(grids, monkeypatch):
    """Without `persistent`, all along CUDA's first axis."""
    tuning = PrefillTuning(persistent=False)
    monkeypatch.setattr(mosaic_gpu, "prefill_tuning_for", lambda *_: tuning)
    attend("h200", MANY_TOKENS, 1, MANY_TOKENS)
    check(grids, "paged_decode", "paged_decode_merge", "paged_prefill")
    assert grids["paged_prefill"] > (2 * LIMIT, 1, 1)


def test_a_step_of_any_size_on_an_a100(grids):
    """It has no tiles of prefill: the thread blocks that the GPU holds share all work."""
    attend("a100-40gb", 2 * MANY_TOKENS, 64, MANY_TOKENS)
    check(grids, "paged_attention_sm80", "paged_attention_sm80_merge")
