"""The GPU suite's checks of correctness: their cases, what they catch, and how XLA passes them."""

import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.attention_cases.arguments import build
from benchmarks.attention_cases.specs import SPECS
from benchmarks.gpu_suite import (
    correctness,
    correctness_attention,
    correctness_cases,
    correctness_large,
    correctness_moves,
    programs,
    repeated,
)
from benchmarks.gpu_suite.correctness_moves import Sizes
from benchmarks.gpu_suite.stage import Context, run_case
from pallas_paged import KVCache, paged_attention

STAGES = (correctness.CORRECTNESS, correctness.MORE)
GPU = Context("sm_90", pathlib.Path("results"), pathlib.Path("work"))


@pytest.fixture
def context(tmp_path: pathlib.Path) -> Context:
    return Context("cpu", tmp_path, tmp_path)


# --- the cases ------------------------------------------------------------------------------------


def names(stage, context):
    return [case.name for case in stage.cases(context)]


def test_every_case_has_a_name_of_its_own(context):
    for where in (GPU, context):
        every = [name for stage in STAGES for name in names(stage, where)]
        assert len(set(every)) == len(every)
    assert 45 <= len(correctness.CORRECTNESS.cases(GPU)) <= 72


def test_the_first_stage_begins_with_one_of_each_kind_and_has_everything_once():
    first = names(correctness.CORRECTNESS, GPU)
    kinds = ("decode block 16", "mixed block 16", "prefill block 16")
    moves = [
        f"{operation} {dtype}"
        for operation in correctness_cases.WRITES
        for dtype in correctness_cases.DTYPES
    ]
    moves += [
        f"{operation} {dtype}, static scales"
        for operation in correctness_cases.WRITES
        for dtype in correctness_cases.QUANTISED
    ]
    moves += [f"{operation} bfloat16" for operation in correctness_cases.MOVES]
    assert first[:18] == [f"mosaic_gpu: {name}" for name in (*kinds, *moves)]
    assert all(name.startswith("mosaic_gpu: ") for name in first)
    for what in ("70,000", "in 4.5 GiB"):
        for operation in correctness_cases.OPERATIONS:
            assert f"mosaic_gpu: {operation} {what}" in first

    specs = [*correctness_cases.basic_specs(), *correctness_cases.first_specs()]
    assert {f"mosaic_gpu: {spec.name}" for spec in specs} <= set(first)
    assert {spec.head_dim for spec in specs} == {64, 80, 96, 128, 192, 256}
    assert {s.num_q_heads // s.num_kv_heads for s in specs} == {1, 3, 4, 5, 7, 8, 16}
    assert {s.cache_dtype or s.dtype for s in specs} == {
        "bfloat16",
        "float16",
        "float8_e4m3fn",
        "int8",
    }
    options = [
        (s.sliding_window is not None, s.logits_soft_cap is not None, s.alibi, s.sinks)
        for s in specs
    ]
    alone = {tuple(i == j for j in range(4)) for i in range(4)}
    assert alone | {(True,) * 4} <= set(options)


def test_xla_comes_last():
    implementations = [name.split(":")[0] for name in names(correctness.MORE, GPU)]
    assert [key for key, _ in itertools.groupby(implementations)] == ["mosaic_gpu", "xla"]


def test_the_cases_for_a_gpu_touch_no_device(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the list of cases asked for a device")

    monkeypatch.setattr(jax, "devices", refuse)
    monkeypatch.setattr(jax, "device_put", refuse)
    monkeypatch.setattr(jnp, "asarray", refuse)
    for stage in STAGES:
        for case in stage.cases(GPU):
            assert case.programs(), case.name
            assert case.prepare is not None
            for program in case.programs():
                leaves = jax.tree.leaves(program.arguments())
                assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def test_programs_of_one_name_are_one_program():
    seen = {}
    for stage in STAGES:
        for case in stage.cases(GPU):
            for program in case.programs():
                leaves, tree = jax.tree.flatten(program.arguments())
                other = seen.setdefault(program.name, (leaves, tree, program))
                assert other[:2] == (leaves, tree), program.name
                assert other[2].donate == program.donate


def test_shapes_are_those_of_what_is_built():
    some = [
        *correctness_cases.interpreted_specs(),
        *correctness_cases.large_specs(),
        *correctness_cases.small_specs()[:1],
        *correctness_cases.kernel_specs()[1::16],
        *correctness_cases.common_specs()[::16],
    ]
    for spec in some:
        built = correctness_attention.arguments_of(build(spec))
        assert shaped(built) == shaped(correctness_attention.shapes(spec)), spec.name
    for operation in correctness_cases.OPERATIONS:
        for dtype in correctness_cases.DTYPES:
            sizes = correctness_moves.FEW
            built = correctness_moves.arguments_of(operation, dtype, sizes)
            assert shaped(built) == shaped(correctness_moves.shapes(operation, dtype, sizes))


def shaped(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def test_specs_for_kernels_have_sizes_that_they_take():
    for spec in correctness_cases.kernel_specs():
        assert (spec.head_dim, spec.block_size) >= (64, 16)
        assert spec.dtype in ("bfloat16", "float16")


# --- what the checks catch ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def right():
    spec = correctness_cases.interpreted_specs()[1]
    arguments = build(spec)
    results = correctness_attention.program(spec, "reference").function(
        *correctness_attention.arguments_of(arguments)
    )
    return spec, correctness_attention.expected(arguments), results


def judged(right, break_it):
    spec, expected, results = right
    broken = [np.asarray(leaf) for leaf in break_it(*results)]
    return correctness_attention.judge(spec.dtype, expected, broken)["wrong"]


def test_the_reference_itself_passes(right):
    assert judged(right, lambda out, lse: (out, lse)) == []


@pytest.mark.parametrize(
    "break_it",
    [
        lambda out, lse: (jnp.zeros_like(out), lse),
        lambda out, lse: (out.at[0, 1, 2].add(0.1), lse),
        lambda out, lse: (out.at[3, 0, 0].set(jnp.nan), lse),
        lambda out, lse: (jnp.flip(out, axis=1), lse),
        lambda out, lse: (out, lse + 0.01),
        lambda out, lse: (out, lse.at[0, 0].set(jnp.nan)),
        lambda out, lse: (out.at[-1].set(1), lse),
        lambda out, lse: (out, lse.at[-1].set(0)),
    ],
    ids=["zeros", "one", "nan", "heads", "lse", "lse-nan", "padding", "lse-padding"],
)
def test_a_wrong_result_fails(right, break_it):
    _, expected, (out, _) = right
    assert expected["used"][0] < len(out)
    assert judged(right, break_it)


def test_long_prompts_are_checked_at_their_ends_and_in_between(monkeypatch):
    starts = np.array([0, 1, 1, 501, 504, 504], np.int32)
    rows = correctness_attention.checked_rows(starts, 40)
    assert len(rows) == 40
    assert {0, 1, 500, 501, 503} <= set(rows)
    assert np.all(np.diff(rows) > 0)
    assert list(correctness_attention.checked_rows(starts[:2], 0)) == [0]
    # What is not computed must be finite all the same.
    monkeypatch.setattr(correctness_attention, "MAX_CHECKED", 0)
    spec = correctness_cases.interpreted_specs()[2]
    expected = correctness_attention.expected(build(spec))
    assert list(expected["rows"]) == [0, 19]
    out, lse = np.zeros((32, 4, 64), np.float32), np.full((32, 4), -np.inf, np.float32)
    out[[0, 19]], lse[:20] = expected["out"], 0
    lse[[0, 19]] = expected["lse"]
    judge = functools.partial(correctness_attention.judge, "bfloat16", expected)
    assert judge([out, lse])["wrong"] == []
    out[7, 1, 1] = np.nan
    assert judge([out, lse])["wrong"] == ["a result is not finite"]


def test_queries_are_checked_where_they_stand():
    """Each checked query is a sequence of its own; all of them at once are the same."""
    for spec in (correctness_cases.interpreted_specs()[4], SPECS[26]):
        arguments = build(spec)
        expected = correctness_attention.expected(arguments)
        out, lse = correctness_attention.program(spec, "reference").function(
            *correctness_attention.arguments_of(arguments)
        )
        wrong = correctness_attention.judge(spec.dtype, expected, [out, lse])["wrong"]
        assert wrong == [], spec.name
        assert len(expected["rows"]) == sum(spec.lens_of_queries)


def test_a_prefix_is_told_of_and_makes_no_difference(monkeypatch):
    specs = correctness_cases.more_specs()
    specs = [spec for spec in specs if isinstance(spec, correctness_cases.PrefixSpec)]
    assert len(specs) == 2
    spec = specs[0]
    arguments = build(spec)
    seen = []

    def attend(*args, **options):
        seen.append(args[3].shared_prefix)
        return paged_attention(*args, **options)

    monkeypatch.setattr(correctness_attention, "paged_attention", attend)
    results = correctness_attention.program(spec, "xla").function(
        *correctness_attention.arguments_of(arguments)
    )
    (prefix,) = seen
    tables, is_shared = np.asarray(arguments.metadata.block_tables), np.asarray(prefix.is_shared)
    count = int(prefix.num_blocks)
    assert (is_shared.sum(), count) == (6, spec.num_shared_blocks)
    assert (tables[is_shared, :count] == np.asarray(prefix.block_table)[:count]).all()
    expected = correctness_attention.expected(arguments)
    assert correctness_attention.judge(spec.dtype, expected, results)["wrong"] == []


def wrong_at(turn: int, function):
    """Returns a program that gives another result at the `turn`th call."""
    calls = itertools.count(1)

    def call(*leaves):
        results = [np.asarray(leaf).copy() for leaf in jax.tree.leaves(function(*leaves))]
        if next(calls) == turn:
            results[0].reshape(-1).view(np.uint8)[-1] ^= 1
        return results

    return call


@pytest.mark.parametrize("turn", [None, 7])
def test_a_result_that_differs_once_fails(turn, context, monkeypatch):
    problem = correctness_moves.problem("scatter_blocks", "bfloat16", "xla", repeats=12)
    repeated.prepare(problem, context)
    tree = jax.tree.structure(problem.program.arguments())

    def function(*leaves):  # jitted, or it would donate the cache
        return jitted(*jax.tree.unflatten(tree, leaves))

    jitted, loaded = jax.jit(problem.program.function), wrong_at(turn, function)
    monkeypatch.setattr(
        programs, "load", lambda program, context: programs.Loaded(loaded, "compiled")
    )
    row = repeated.run(problem, context)
    assert row["program"] == "compiled"
    assert (row["repeats"], row["differing_repeats"]) == (12, 0 if turn is None else 1)
    assert row["status"] == ("ok" if turn is None else "failed"), row
    if turn is not None:
        assert "1 of 12 runs differ" in row["reason"]


def test_every_kernel_runs_fifty_times(context, monkeypatch):
    problems = []
    monkeypatch.setattr(repeated, "run", lambda problem, context: problems.append(problem) or {})
    monkeypatch.setattr(correctness_large, "run", repeated.run)
    for where, repeats in ((GPU, 50), (context, 2)):
        for stage in STAGES:
            for case in stage.cases(where):
                case.run(where)
                expected = repeats if case.name.startswith("mosaic_gpu") else 1
                assert problems[-1].repeats == expected, case.name


@pytest.mark.parametrize("operation", correctness_cases.OPERATIONS)
def test_a_wrong_block_fails(operation, context, monkeypatch):
    right_way = correctness_moves.FUNCTIONS[operation]

    def wrong(*args, implementation):
        result = right_way(*args, implementation=implementation)
        if implementation == "reference":
            return result
        cache, *rest = result if operation == "rotate_and_write" else (result,)
        cache = cache._replace(v=cache.v.at[-1, 0, 0, 0].set(7))
        return (cache, *rest) if rest else cache

    monkeypatch.setitem(correctness_moves.FUNCTIONS, operation, wrong)
    problem = correctness_moves.problem(operation, "bfloat16", "xla", 1)
    repeated.prepare(problem, context)
    assert repeated.run(problem, context)["status"] == "failed"


@pytest.mark.parametrize("operation", correctness_cases.WRITES)
@pytest.mark.parametrize("dtype", correctness_cases.QUANTISED)
def test_rows_with_their_own_scales_fail_where_others_are_given(
    operation, dtype, context, monkeypatch
):
    right_way = correctness_moves.FUNCTIONS[operation]

    def wrong(*args, implementation, static_scales):
        given = static_scales if implementation == "reference" else None
        return right_way(*args, implementation=implementation, static_scales=given)

    for function, status in ((right_way, "ok"), (wrong, "failed")):
        monkeypatch.setitem(correctness_moves.FUNCTIONS, operation, function)
        problem = correctness_moves.problem(operation, dtype, "xla", 1, is_static=True)
        repeated.prepare(problem, context)
        assert repeated.run(problem, context)["status"] == status


def test_padding_that_is_written_fails(context, monkeypatch):
    def wrong(k, v, cache, slots, implementation):
        return cache._replace(k=cache.k.at[1, 0, 0].set(k[0, 0]))

    for function, status in ((correctness_moves.FUNCTIONS["write_kv"], "ok"), (wrong, "failed")):
        monkeypatch.setitem(correctness_moves.FUNCTIONS, "write_kv", function)
        problem = correctness_moves.problem("write_kv", "bfloat16", "xla", 1, padding=True)
        repeated.prepare(problem, context)
        assert repeated.run(problem, context)["status"] == status


@pytest.mark.parametrize("operation", correctness_cases.OPERATIONS)
def test_moves_by_index_are_the_references(operation):
    sizes = Sizes(24, 2, 4, 64, num_moved=11)
    arguments = correctness_moves.arguments_of(operation, "bfloat16", sizes)
    by_index = correctness_moves.by_index(operation, *arguments)
    right = correctness_moves.FUNCTIONS[operation](*arguments, implementation="reference")
    first = correctness_moves.null_blocks(operation)
    for one, other in zip(jax.tree.leaves(by_index), jax.tree.leaves(right), strict=True):
        assert repeated.differing_bytes(one[first:], np.asarray(other)[first:]) == 0


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_quantised_numbers_may_be_one_step_off_but_few_of_them(dtype):
    def cache(stored):
        scale = np.ones((1, 1, 4), np.float32)
        return KVCache(stored, stored, scale, scale)

    numbers = np.full((1, 1, 4, 64), 96.0)
    numbers[..., 0] = 127.0
    right, few, many, far = (numbers.copy() for _ in range(4))
    step = 1 if dtype == "int8" else 8
    few[0, 0, 0, 5] += step
    many[..., 5] += step
    far[0, 0, 0, 5] += 24
    wrong = [
        correctness_moves.judge_quantised(
            cache(right.astype(jnp.dtype(dtype))), cache(x.astype(jnp.dtype(dtype)))
        )["wrong"]
        for x in (right, few, many, far)
    ]
    assert list(map(bool, wrong)) == [False, False, True, True]


def test_errors_are_relative_and_nan_is_infinite():
    error = correctness_attention.error_of(np.array([1.0, 3.0]), np.array([1.0, 1.0]))
    assert error == pytest.approx(1.0)
    assert correctness_attention.error_of(np.array([np.nan]), np.array([1.0])) == np.inf
    assert correctness_attention.error_of(np.array([-np.inf]), np.array([-np.inf])) == 0


# --- the end of a large cache, small --------------------------------------------------------------

NUM_BLOCKS = 90
BLOCK_BYTES = 8 * 16 * 128 * 2


def large_problems():
    size = NUM_BLOCKS * BLOCK_BYTES
    specs = correctness_cases.large_specs()
    return {
        **{spec.name: correctness_large.attention(spec, "xla", 3, size) for spec in specs},
        **{
            operation: correctness_large.move(operation, "xla", 3, size)
            for operation in correctness_cases.OPERATIONS
        },
    }


@pytest.mark.parametrize("name", large_problems())
def test_the_last_blocks_are_read_and_written(name, context):
    large = large_problems()[name]
    for program in large.programs:
        assert programs.compile_ahead(program, context)["status"] == "ok"
    correctness_large.prepare(large, context)
    row = correctness_large.run(large, context)
    assert (row["status"], row["repeats"]) == ("ok", 3), row


def test_the_real_one_is_larger_than_offsets_of_32_bits_reach():
    for name, large in zip(
        large_problems(),
        (
            *(
                correctness_large.attention(spec, "xla", 3)
                for spec in correctness_cases.large_specs()
            ),
            *(correctness_large.move(o, "xla", 3) for o in correctness_cases.OPERATIONS),
        ),
        strict=True,
    ):
        (cache,) = [a for a in large.program.arguments() if is_large(a)]
        assert cache.k.size * cache.k.dtype.itemsize == 4.5 * 2**30, name
        num_blocks, block_bytes = len_of(cache), 4.5 * 2**30 // len_of(cache)
        ids = correctness_large.far_ids(np.array([0, 3, 5]), num_blocks)
        assert sorted(ids[[3, 5]]) == [num_blocks - 2, num_blocks - 1]
        assert (num_blocks - 1) * block_bytes - 2**32 in ids * block_bytes
        assert ids[0] == 0
        assert len(set(ids)) == len(ids)


def is_large(argument):
    return isinstance(argument, KVCache) and len_of(argument) > 1000


def len_of(cache):
    return cache.k.shape[0]


@pytest.mark.parametrize("operation", ["write_kv", "copy_blocks", "scatter_blocks"])
@pytest.mark.parametrize("block", [5, 40])
def test_a_write_to_any_other_block_fails(operation, block, context, monkeypatch):
    right_way = correctness_moves.FUNCTIONS[operation]

    def wrong(*args, implementation):
        cache = right_way(*args, implementation=implementation)
        if implementation == "reference":
            return cache
        return cache._replace(v=cache.v.at[block, 0, 0, 0].set(7))

    monkeypatch.setitem(correctness_moves.FUNCTIONS, operation, wrong)
    large = correctness_large.move(operation, "xla", 1, NUM_BLOCKS * BLOCK_BYTES)
    correctness_large.prepare(large, context)
    assert correctness_large.run(large, context)["status"] == "failed"


def test_reading_where_offsets_wrap_is_seen(context):
    spec = correctness_cases.large_specs()[0]
    large = correctness_large.attention(spec, "xla", 1, NUM_BLOCKS * BLOCK_BYTES)
    attend = large.program.function

    def wrong(cache, q, step, arrays):
        tables = jnp.where(step.block_tables >= 80, step.block_tables - 80, step.block_tables)
        return attend(cache, q, step._replace(block_tables=tables), arrays)

    large = large._replace(program=large.program._replace(function=wrong))
    correctness_large.prepare(large, context)
    row = correctness_large.run(large, context)
    assert row["status"] == "failed"
    assert "not finite" in row["reason"]


# --- from the files to the rows -------------------------------------------------------------------


def run_ahead(case, context):
    for program in case.programs():
        assert programs.compile_ahead(program, context)["status"] == "ok"
    case.prepare(context)
    return run_case(case, context)


@pytest.mark.parametrize(
    "name",
    [
        *("mixed", "int8", "nothing", "write_kv int8", "gather_blocks bfloat16"),
        "rotate_and_write bfloat16",
    ],
)
def test_xla_passes_with_programs_and_arrays_from_files(name, context):
    (case,) = [c for c in correctness.MORE.cases(context) if c.name == f"xla: {name}"]
    assert case.programs()
    row = run_ahead(case, context)
    assert (row["status"], row["program"]) == ("ok", "compiled"), row


@pytest.mark.parametrize(
    "name", ["float8", "nothing", "one token", "write_kv nothing", "rotate_and_write int8"]
)
def test_interpreted_kernels_pass(name, context):
    cases = correctness.CORRECTNESS.cases(context)
    (case,) = [case for case in cases if case.name == f"mosaic_gpu: {name}"]
    assert case.programs() == ()
    row = run_ahead(case, context)
    assert (row["status"], row["repeats"]) == ("ok", 2), row


def test_a_kernel_that_is_not_there_is_visible(context, monkeypatch):
    def refuse(*args, **kwargs):
        raise NotImplementedError("no such kernel")

    (case, *_) = correctness.MORE.cases(context)
    case.prepare(context)
    monkeypatch.setattr(correctness_attention, "paged_attention", refuse)
    (program,) = case.programs()
    assert programs.compile_ahead(program, context)["status"] == "unsupported"
    row = run_case(case, context)
    assert (row["status"], row["reason"]) == ("unsupported", "no such kernel")


def test_what_is_prepared_stays(context):
    case = correctness.MORE.cases(context)[0]
    case.prepare(context)
    (path,) = (context.work / "programs").iterdir()
    before = path.stat().st_mtime_ns
    case.prepare(context)
    assert path.stat().st_mtime_ns == before
