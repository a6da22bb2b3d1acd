"""The Mosaic GPU kernels on the cache: interpreted with race detection, and compiled for GPUs.

Interpreted kernels round exactly as the reference does, so results are compared bit by bit.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_paged import (
    KVCache,
    StaticScales,
    copy_blocks,
    gather_blocks,
    rotate_and_write,
    scatter_blocks,
    write_kv,
)
from pallas_paged.deviceless import compile_for, kernel_ptx, kernel_resources, target_device
from pallas_paged.dispatch import interpret_kernels
from pallas_paged.ops.kv_write import mosaic_gpu as kv_write
from pallas_paged.quantisation import is_quantised

# KV heads, block size, head_dim, dtype: rows of one and of several warps, scales that are moved in
# vectors, by one warp and one by one, and blocks that several thread blocks share.
CACHES = [
    (4, 8, 32, "float8_e4m3fn"),
    (2, 8, 64, "int8"),
    (8, 16, 32, "int8"),
    (8, 8, 80, "float16"),
    (2, 16, 256, "bfloat16"),
]


def poisoned(num_blocks, num_kv_heads, block_size, head_dim, dtype):
    """Returns a cache of NaN; of integers, 77 with NaN for a scale."""
    return jax.tree.map(
        lambda array: jnp.full_like(array, 77 if array.dtype == jnp.int8 else jnp.nan),
        KVCache.zeros(num_blocks, num_kv_heads, block_size, head_dim, dtype),
    )


def random_cache(num_blocks, *shape_and_dtype):
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda array: jnp.asarray(20 * rng.standard_normal(array.shape), array.dtype),
        jax.eval_shape(lambda: KVCache.zeros(num_blocks, *shape_and_dtype)),
    )


def bits(array):
    return np.asarray(array).view(f"u{array.dtype.itemsize}")


def assert_same_but_for_the_null_block(actual, expected):
    for array, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(bits(array)[1:], bits(other)[1:])


def assert_same_null_block(actual, expected):
    for array, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(bits(array)[0], bits(other)[0])


@pytest.fixture
def run(capsys):
    """Runs an operation interpreted, and sees that no race was reported."""

    def run(operation, *args, **options):
        with interpret_kernels(detect_races=True):
            result = operation(*args, implementation="mosaic_gpu", **options)
            jax.block_until_ready(result)
        assert "RACE DETECTED" not in capsys.readouterr().out
        return result

    return run


def static_scales(num_kv_heads):
    """Returns scales that are powers of two, by which a division rounds nothing."""
    exponents = jnp.arange(num_kv_heads, dtype=jnp.float32)
    return StaticScales(0.25 * 2.0**exponents, 0.125 / 2.0**exponents)


def with_scales(cases):
    """Returns cases that end with a cache's sizes: with the rows' own scales and static ones."""
    cases = list(cases)
    own = [(*case, False) for case in cases]
    return own + [(*case, True) for case in cases if is_quantised(case[-1][-1])]


@pytest.mark.parametrize(("sizes", "is_static"), with_scales((each,) for each in CACHES), ids=str)
def test_write(run, sizes, is_static):
    num_kv_heads, block_size, head_dim, _ = sizes
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, 6, num_kv_heads, head_dim)).astype(np.float32)
    v[1] *= 100
    k[2] = 0
    k[3, 0, 1] = np.inf
    k[4:] = v[4:] = np.nan
    input_dtype = "float32" if num_kv_heads == 4 else "bfloat16"
    k, v = jnp.asarray(k, input_dtype), jnp.asarray(v, input_dtype)
    slots = jnp.array([3 * block_size - 1, 2 * block_size, block_size, block_size + 2, 0, 0])
    args = k, v, poisoned(4, *sizes), slots.astype(jnp.int32)
    given = static_scales(num_kv_heads) if is_static else None
    expected = write_kv(*args, implementation="reference", static_scales=given)
    written = run(write_kv, *args, static_scales=given)
    assert args[2].k.is_deleted()
    assert_same_but_for_the_null_block(written, expected)
    assert_same_null_block(written, poisoned(4, *sizes))


# Queries per KV head, then as above: rows of queries together and one by one.
ROTATED = [
    (4, (2, 8, 64, "int8")),
    (3, (1, 16, 128, "float8_e4m3fn")),
    (1, (3, 8, 64, "bfloat16")),
    (8, (2, 8, 192, "bfloat16")),
    (7, (2, 8, 64, "float8_e4m3fn")),
    (5, (1, 8, 128, "float16")),
    (16, (1, 8, 64, "float32")),
]


def rotary_arguments(group, num_kv_heads, head_dim, dtype="bfloat16"):
    """Returns queries, keys, values, cosines and sines of which no product is rounded."""
    rng = np.random.default_rng(3)
    shapes = [(6, num_kv_heads * n, head_dim) for n in (group, 1, 1)]
    q, k, v = (jnp.asarray(rng.integers(-8, 9, shape), dtype) for shape in shapes)
    angles = [jnp.asarray(rng.integers(-4, 5, (6, head_dim // 2)) / 4, jnp.float32) for _ in "cs"]
    return q, k, v, *angles


@pytest.mark.parametrize(("group", "sizes", "is_static"), with_scales(ROTATED), ids=str)
def test_rotate_and_write(run, group, sizes, is_static):
    num_kv_heads, block_size, head_dim, _ = sizes
    input_dtype = "float32" if group == 3 else "bfloat16"
    q, k, v, *angles = rotary_arguments(group, num_kv_heads, head_dim, input_dtype)
    q, k, v = (x.at[4:].set(jnp.nan) for x in (q, k, v))
    k = k.at[2].set(0)
    slots = jnp.array([3 * block_size - 1, 2 * block_size, block_size, block_size + 2, 0, 0])
    args = q, k, v, *angles, poisoned(4, *sizes), slots.astype(jnp.int32)
    given = static_scales(num_kv_heads) if is_static else None
    reference = functools.partial(rotate_and_write, implementation="reference", static_scales=given)
    expected_q, expected = jax.jit(reference, keep_unused=True)(*args)
    rotated, written = run(rotate_and_write, *args, static_scales=given)
    assert args[5].k.is_deleted()
    np.testing.assert_array_equal(bits(rotated)[:4], bits(expected_q)[:4])
    assert_same_but_for_the_null_block(written, expected)
    assert_same_null_block(written, poisoned(4, *sizes))
    assert np.asarray(rotated, np.float32)[:4].any()


def test_rotated_keys_are_rounded_before_they_are_quantised(run):
    """As they are where they are rotated first: the largest of them makes the scale."""
    k = jnp.full((1, 1, 64), 1.0078125, jnp.bfloat16)  # 1 + 2^-7, the next after 1
    cos, sin = (jnp.full((1, 32), x, jnp.float32) for x in (1 + 2**-8, 0))
    cache, slots = KVCache.zeros(2, 1, 8, 64, "int8"), jnp.array([8], jnp.int32)
    _, written = run(rotate_and_write, k, k, k, cos, sin, cache, slots)
    rounded = float(jnp.bfloat16(1.0078125 * (1 + 2**-8)))
    np.testing.assert_allclose(written.k_scale[1, 0, 0], rounded / 127, rtol=1e-6)


@pytest.mark.parametrize("implementation", ["xla", "reference", "mosaic_gpu"])
def test_rotation_turns_pairs_and_no_others(run, implementation):
    """By hand: pair i is dimensions i and i + D/2, turned by a quarter, and by nothing."""
    q = jnp.arange(64.0).reshape(1, 1, 64)
    quarter = jnp.arange(32) < 16
    cos, sin = (jnp.where(quarter, a, b)[None].astype(jnp.float32) for a, b in ((0, 1), (1, 0)))
    cache = KVCache.zeros(2, 1, 8, 64, "float32")
    args = q, q, q + 1, cos, sin, cache, jnp.array([8 + 5], jnp.int32)
    if implementation == "mosaic_gpu":
        rotated, cache = run(rotate_and_write, *args)
    else:
        rotated, cache = rotate_and_write(*args, implementation=implementation)
    expected = np.arange(64.0)
    expected[:16], expected[32:48] = -np.arange(32.0, 48.0), np.arange(16.0)
    np.testing.assert_array_equal(rotated[0, 0], expected)
    np.testing.assert_array_equal(cache.k[1, 0, 5], expected)
    np.testing.assert_array_equal(cache.v[1, 0, 5], np.arange(1.0, 65.0))
    assert np.count_nonzero(cache.k) == 63


@pytest.mark.usefixtures("unchecked_types")
def test_rotation_is_refused_where_it_cannot_be():
    q, k, v, cos, sin = rotary_arguments(2, 2, 64)
    cache, slots = KVCache.zeros(2, 2, 8, 64, "bfloat16"), jnp.zeros(6, jnp.int32)
    for wrong, message in [
        ((q[:, :3], k, v, cos, sin), "Hq a multiple of 2"),
        ((q[:, :0], k, v, cos, sin), "Hq a multiple of 2"),
        ([*(x.astype(jnp.int32) for x in (q, k, v)), cos, sin], "one dtype of floats"),
        ((q[:5], k, v, cos, sin), r"q.shape=\(5, 4, 64\) must be \[6, Hq, 64\]"),
        ((q.astype(jnp.float32), k, v, cos, sin), "one dtype of floats, not float32, bfloat16"),
        ((q, k, v, cos[:, :31], sin), r"cos must be f32\[6, 32\]"),
        ((q, k, v, cos, sin.astype(jnp.bfloat16)), r"sin must be f32\[6, 32\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            rotate_and_write(*wrong, cache, slots)
    with interpret_kernels():
        x = jnp.zeros((1, 1, 96), jnp.bfloat16)
        angle = jnp.zeros((1, 48), jnp.float32)
        cache = KVCache.zeros(2, 1, 8, 96, "bfloat16")
        with pytest.raises(NotImplementedError, match="head_dim=96 is not a multiple of 64"):
            rotate_and_write(x, x, x, angle, angle, cache, slots[:1], implementation="mosaic_gpu")
        q, k, v, cos, sin = rotary_arguments(17, 2, 64)
        cache = KVCache.zeros(2, 2, 8, 64, "bfloat16")
        with pytest.raises(NotImplementedError, match="34 query heads for 2 KV heads, more"):
            rotate_and_write(q, k, v, cos, sin, cache, slots, implementation="mosaic_gpu")


@pytest.mark.parametrize("sizes", CACHES, ids=str)
def test_copy_gather_and_scatter(run, sizes):
    cache = random_cache(7, *sizes)
    src, dst = (jnp.array(ids, jnp.int32) for ids in ([5, 2, 2, 4], [1, 6, 3, 0]))
    expected = copy_blocks(cache, src, dst, implementation="reference")
    blocks = gather_blocks(cache, src, implementation="reference")
    gathered = run(gather_blocks, cache, src)
    assert not cache.k.is_deleted()
    for array, other in zip(jax.tree.leaves(gathered), jax.tree.leaves(blocks), strict=True):
        np.testing.assert_array_equal(bits(array), bits(other))
    for operation, args in ((copy_blocks, (src, dst)), (scatter_blocks, (dst, gathered))):
        cache = random_cache(7, *sizes)
        written = run(operation, cache, *args)
        assert cache.k.is_deleted()
        assert_same_but_for_the_null_block(written, expected)
        assert_same_null_block(written, random_cache(7, *sizes))


@pytest.mark.parametrize("v_head_dim", [16, 80])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_moves_of_values_of_another_width_than_the_keys(run, v_head_dim, dtype):
    def cache():
        keys, values = random_cache(7, 2, 8, 32, dtype), random_cache(7, 2, 8, v_head_dim, dtype)
        return KVCache(keys.k, values.v, keys.k_scale, values.v_scale)

    src, dst = (jnp.array(ids, jnp.int32) for ids in ([5, 2, 4], [1, 6, 0]))
    expected = copy_blocks(cache(), src, dst, implementation="reference")
    assert_same_but_for_the_null_block(run(copy_blocks, cache(), src, dst), expected)
    gathered = run(gather_blocks, cache(), src)
    assert gathered.v.shape == (3, 2, 8, v_head_dim)
    assert_same_but_for_the_null_block(run(scatter_blocks, cache(), dst, gathered), expected)


def test_no_tokens_and_no_blocks(run):
    cache = random_cache(3, 4, 8, 32, "int8")
    none, rows = jnp.zeros(0, jnp.int32), jnp.zeros((0, 4, 32))
    assert run(gather_blocks, cache, none).k.shape == (0, 4, 8, 32)
    cache = run(copy_blocks, cache, none, none)
    cache = run(scatter_blocks, cache, none, run(gather_blocks, cache, none))
    assert_same_but_for_the_null_block(
        run(write_kv, rows, rows, cache, none), random_cache(3, 4, 8, 32, "int8")
    )


def shapes(num_blocks, *shape_and_dtype):
    return jax.eval_shape(lambda: KVCache.zeros(num_blocks, *shape_and_dtype))


def operations(sizes):
    """Returns the operations as functions of a donated cache, and the rest of their arguments.

    With ids that are promised to be inside, as the engine does it: nothing is launched to see.
    """
    num_kv_heads, _, head_dim, dtype = sizes
    ids = jax.ShapeDtypeStruct((6,), jnp.int32)
    rows = jax.ShapeDtypeStruct((6, num_kv_heads, head_dim), jnp.bfloat16)

    def promised(operation):
        return functools.partial(operation, promise_in_bounds=True)

    def write(cache, k, v, slots, given=None):
        return promised(write_kv)(k, v, cache, slots, static_scales=given)

    angles = jax.ShapeDtypeStruct((6, head_dim // 2), jnp.float32)

    def rotate(cache, heads, cos, sin, slots, given=None):
        """Of what a merged projection to queries, keys and values makes."""
        end = heads.shape[2] - 2 * head_dim
        q, k, v = (
            part.reshape(6, -1, head_dim)
            for part in jnp.split(heads, [end, end + head_dim], axis=2)
        )
        rotated = promised(rotate_and_write)
        return rotated(q, k, v, cos, sin, cache, slots, static_scales=given)

    rotates = {}
    for name, group in (("", 4), ("_of_7", 7), ("_of_3", 3)) if head_dim % 64 == 0 else ():
        heads = jax.ShapeDtypeStruct((6, num_kv_heads, (group + 2) * head_dim), jnp.bfloat16)
        rotates[f"rotate_and_write{name}"] = rotate, (heads, angles, angles, ids)
    writes = {"write_kv": (write, (rows, rows, ids))}
    if is_quantised(dtype):
        # With scales that are given, the same operations.
        given = StaticScales(*[jax.ShapeDtypeStruct((num_kv_heads,), jnp.float32)] * 2)
        writes["write_kv_static"] = writes["write_kv"][0], (rows, rows, ids, given)
        if rotates:
            operation, arguments = rotates["rotate_and_write"]
            rotates["rotate_and_write_static"] = operation, (*arguments, given)
    return (
        rotates
        | writes
        | {
            "copy_blocks": (promised(copy_blocks), (ids, ids)),
            "scatter_blocks": (promised(scatter_blocks), (ids, shapes(6, *sizes))),
            "gather_blocks": (promised(gather_blocks), (ids,)),
        }
    )


def check_one_launch_in_place_without_spills(target, sizes):
    cache = shapes(50, *sizes)
    cache_bytes = sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(cache))
    for name, (operation, args) in operations(sizes).items():
        (kernel,) = kernel_resources(target, operation, cache, *args)
        assert kernel.spill_bytes == 0, (name, kernel)
        assert kernel.registers <= 64, (name, kernel)
        assert kernel.warnings == ()
        is_update = name != "gather_blocks"
        donated = (0,) if is_update else ()
        compiled = compile_for(target, operation, cache, *args, donate_argnums=donated)
        text = compiled.as_text()
        entry = text[text.index("ENTRY") :]
        launched = set(re.findall(r" = [^=]*? ([\w-]+)\(", entry))
        launched -= {"parameter", "bitcast", "get-tuple-element", "tuple"}
        assert launched == {"custom-call"}, (name, launched)
        assert entry.count(" custom-call(") == 1, name
        memory = compiled.memory_analysis()
        assert memory.temp_size_in_bytes <= 1024, name
        assert memory.alias_size_in_bytes == (cache_bytes if is_update else 0), name


@pytest.mark.parametrize(
    ("target", "sizes"),
    [
        ("h100", (8, 16, 128, "bfloat16")),
        ("h100", (8, 16, 128, "float8_e4m3fn")),
        ("h200", (5, 16, 64, "int8")),
        ("a100-40gb", (2, 16, 96, "int8")),
        ("l4", (8, 16, 128, "float8_e4m3fn")),
        ("b200", (8, 16, 128, "float8_e4m3fn")),
    ],
    ids=str,
)
def test_one_launch_in_place_without_spills(target, sizes, in_process_for):
    """By automatic choice: one custom call and nothing else but views, on the cache's buffers."""
    if target.startswith("h"):
        check_one_launch_in_place_without_spills(target, sizes)
    else:
        in_process_for(target, check_one_launch_in_place_without_spills, target, sizes)


def ptx_of_a_write(target, sizes):
    operation, args = operations(sizes)["write_kv"]
    return kernel_ptx(target, operation, shapes(52, *sizes), *args)


def test_float8_is_rounded_by_the_hardware_where_it_can(in_process_for):
    program = in_process_for("l4", ptx_of_a_write, "l4", (8, 32, 128, "float8_e4m3fn"))
    assert "cvt.rn.satfinite.e4m3x2" in program


def test_every_other_head_dim_compiles():
    """One of each way a row lies in warps, for the write alone."""
    for num_kv_heads, head_dim, dtype in (
        (1, 64, "bfloat16"),
        (3, 192, "int8"),
        (8, 80, "float16"),
    ):
        operation, args = operations((num_kv_heads, 16, head_dim, dtype))["write_kv"]
        cache = shapes(51, num_kv_heads, 16, head_dim, dtype)
        (kernel,) = kernel_resources("h100", operation, cache, *args)
        assert kernel.spill_bytes == 0


def test_what_the_kernels_refuse():
    rows = jax.ShapeDtypeStruct((6, 8, 80), jnp.bfloat16)
    one_head = jax.ShapeDtypeStruct((6, 1, 80), jnp.bfloat16)
    with jax.default_device(target_device("h100")):
        assert kv_write.unsupported(rows, shapes(4, 8, 16, 80, "bfloat16")) is None
        reason = kv_write.unsupported(rows, shapes(4, 8, 16, 80, "int8"))
        assert reason == "head_dim=80 of int8 is not a multiple of 32"
        assert "head_dim=80" in kv_write.unsupported(one_head, shapes(4, 1, 16, 80, "bfloat16"))
    rows = jax.ShapeDtypeStruct((6, 8, 64), jnp.bfloat16)
    in_float8 = rows, shapes(4, 8, 16, 64, "float8_e4m3fn")
    for target, capability in (("a100-80gb", "8.0"), ("rtx3090", "8.6")):
        with jax.default_device(target_device(target)):
            reason = kv_write.unsupported(*in_float8)
            expected = f"compute capability {capability} has no instruction that rounds to "
            assert reason == expected + "float8_e4m3fn"
            assert kv_write.unsupported(rows, shapes(4, 8, 16, 64, "int8")) is None
    for target in ("rtx4090", "l40s", "h200"):
        with jax.default_device(target_device(target)):
            assert kv_write.unsupported(*in_float8) is None
    cache = KVCache.zeros(4, 1, 1, 80, jnp.float32)
    with pytest.raises(NotImplementedError, match="a block holds 80 numbers per array, not a mult"):
        copy_blocks(
            cache, jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32), implementation="mosaic_gpu"
        )
    with pytest.raises(
        NotImplementedError, match=r"needs an NVIDIA GPU of .* 9.0 or 10.0, not cpu"
    ):
        gather_blocks(
            KVCache.zeros(4, 1, 8, 32, jnp.float32),
            jnp.zeros(1, jnp.int32),
            implementation="mosaic_gpu",
        )
