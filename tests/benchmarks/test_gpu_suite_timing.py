"""The GPU suite's timed stages, as far as a CPU allows: figures by hand, failures, programs."""

import pathlib
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import random_models
from benchmarks.gpu_suite import (
    attention_speed,
    cache_speed,
    device,
    layers,
    model_step,
    programs,
    shapes,
    timing,
)
from benchmarks.gpu_suite.attention_speed import Attention
from benchmarks.gpu_suite.layers import Layers
from benchmarks.gpu_suite.shapes import Shape
from benchmarks.gpu_suite.stage import Context, Program, run_case
from pallas_paged import deviceless, dispatch
from pallas_paged.launches import Launches, launches

ROOT = pathlib.Path(__file__).parent.parent.parent
STAGES = (
    device.STAGE,
    attention_speed.DECODE,
    attention_speed.PREFILL,
    cache_speed.STAGE,
    model_step.STAGE,
)
TOY = Shape(2, 40, "4/2", 16)
TOY_PROMPTS = Shape(2, 24, "4/2", 16, 24)


@pytest.fixture
def context(tmp_path: pathlib.Path) -> Context:
    return Context("cpu", tmp_path, tmp_path / "work")


def on_gpu(tmp_path: pathlib.Path) -> Context:
    return Context("sm_90", tmp_path, tmp_path / "work")


# --- sizes and cases ------------------------------------------------------------------------------


def test_figures_of_a_shape_by_hand():
    shape = Shape(2, 40, "6/3", 16, queries=4)
    assert shape.blocks_per_seq == 3
    assert shape.kv_bytes == 2 * (2 * 48) * 3 * 128 * 2
    assert shape.moved_bytes == shape.kv_bytes + 2 * (2 * 4) * 6 * 128 * 2
    assert shape.operations == 4 * 6 * 128 * 2 * (37 + 38 + 39 + 40)


def test_shapes_are_few_and_begin_with_the_aims():
    decode, prefill = shapes.decode_shapes(), shapes.prefill_shapes()
    assert decode[:4] == list(shapes.DECODE_AIMS)
    assert prefill[:3] == list(shapes.PREFILL_AIMS)
    assert (len(set(decode)), len(set(prefill))) == (len(decode), len(prefill))
    assert len(decode) <= 16
    assert len(prefill) <= 9
    assert all(s.queries in (s.context, 512) for s in prefill)


def test_what_does_not_fit_is_skipped(context):
    tokens = Shape(128, 1024, "32/8", 16, 1024)
    assert "131072 tokens" in attention_speed.why_not(tokens, context)
    assert attention_speed.why_not(TOY, context) is None


def test_layers_have_caches_of_their_own_as_long_as_memory_allows():
    shape = shapes.DECODE_AIMS[0]
    assert (layers.num_caches(shape, True), layers.rotations(shape, True)) == (8, 1)
    assert layers.num_caches(shape._replace(context=32768), True) == 4
    small = Shape(1, 512, "32/8", 16)
    rotated = layers.rotations(small, True)
    assert 2 * rotated * small.kv_bytes >= 2 * timing.L2_BYTES
    tables = attention_speed.paged(small, "xla", True).operands[3]["tables"].make()
    assert len(np.unique(tables)) == tables.size == rotated * 32
    assert tables.min() == 1


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_names_are_unique_and_no_device_is_asked(stage, tmp_path, monkeypatch):
    def ask(*args):
        raise AssertionError("a device was asked")

    for name in ("devices", "local_devices", "default_backend", "device_put"):
        monkeypatch.setattr(jax, name, ask)
    cases = stage.cases(on_gpu(tmp_path))
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    every = [program for case in cases for program in case.programs()]
    shapes_of: dict[str, str] = {}
    for program in every:
        found = str(jax.tree.map(lambda x: (x.shape, x.dtype), program.arguments()))
        assert shapes_of.setdefault(program.name, found) == found, program.name
    if stage is not device.STAGE:
        assert sum(case.run_s for case in cases) <= 1.3 * stage.budget_s


# --- figures --------------------------------------------------------------------------------------


def test_layers_and_plan_are_told_apart_by_hand():
    row = timing.per_layer([30e-6, 31e-6, 29e-6], [50e-6, 51e-6, 49e-6], (4, 8))
    assert row["us"] == pytest.approx(5.0)  # (50 - 30) / 4
    assert row["plan_us"] == pytest.approx(10.0)  # 2 * 30 - 50
    assert (row["t4_us"], row["t8_us"]) == (pytest.approx(30.0), pytest.approx(50.0))
    assert row["noise"] == pytest.approx(0.0, abs=1e-6)
    row = timing.per_layer([30e-6] * 3, [48e-6, 50e-6, 54e-6], (4, 8))
    assert row["noise"] == pytest.approx(6 / 20)
    row = timing.per_layer([14e-6], [24e-6], (2, 4))
    assert (row["us"], row["plan_us"]) == (pytest.approx(5.0), pytest.approx(4.0))


@pytest.mark.parametrize("many", [[20.0, 20.0, 20.0], [31.0, 40.0, 35.0], [30.0] * 3])
def test_what_is_lost_in_noise_is_no_figure(many):
    few = [30e-6] * 3
    row = timing.per_layer(few, [1e-6 * each for each in many], (4, 8))
    assert row["us"] is None
    assert row["plan_us"] is None
    assert "repeats spread" in row["us_reason"]
    assert row["t4_us"] == pytest.approx(30.0)


def test_a_plan_that_is_lost_in_noise_leaves_the_layers_their_figure():
    row = timing.per_layer([20e-6, 22e-6, 21e-6], [40e-6, 42e-6, 41e-6], (4, 8))
    assert row["us"] == pytest.approx(5.0)
    assert row["plan_us"] is None
    assert row["plan_us_reason"] == "1.00 us, and repeats spread 2.00 us"


def test_of_five_repeats_the_outermost_are_left_out():
    assert timing.spread([5.0, 1.0, 2.0, 3.0, 100.0]) == 3.0
    assert timing.spread([5.0, 1.0]) == 4.0


def test_each_layer_has_its_cache_and_the_last_turn_is_the_first_ones_number(context):
    def begin(turn, state, queries):
        return queries[turn] + 0 * state, turn

    def attend(q, cache, turn):
        return 10 * q + cache + 0 * turn

    caches = [timing.Host(lambda i=i: np.full(2, i), (2,)) for i in (1, 2)]
    queries = timing.Host(lambda: np.array([[3, 4], [5, 6]]), (2, 2))
    some = Layers("s", begin, attend, (timing.zeros((2,), "int32"), caches, queries), (1, 3), 2, 1)
    assert len({loop.program.name for loop in some.loops}) == 2
    arrays = timing.make(some.operands, context)
    for turns in (1, 2):
        (result,) = programs.load(some.loop(3, turns).program, context)(*arrays)
        assert result.tolist() == [3121, 4121]


class FakeProgram:
    """Takes 7 us, and 5 us for each of its layers, on a clock of its own."""

    def __init__(self, program, context):
        self.us = 7 + 5 * int(re.search(r"(\d+) layers", program.name)[1])
        self.turns = int(re.search(r"(\d+) turns", program.name)[1])

    def __call__(self, state, *operands):
        FakeProgram.now += 1e-6 * self.turns * self.us
        return (state + jnp.arange(2),)


def test_a_clock_runs_through_the_layers(context, monkeypatch):
    FakeProgram.now = 0.0
    monkeypatch.setattr(timing.programs, "load", FakeProgram)
    clock = SimpleNamespace(perf_counter=lambda: FakeProgram.now)
    monkeypatch.setattr(timing, "time", clock)
    some = Layers("some", None, None, ((), []), (4, 8), 11, 5)
    row, results = some.measure((jnp.zeros(2, jnp.int32), []), context)
    assert (row["us"], row["plan_us"]) == (pytest.approx(5.0), pytest.approx(7.0))
    assert (row["t4_us"], row["t8_us"]) == (pytest.approx(27.0), pytest.approx(47.0))
    assert [len(both) for both in results] == [2, 2]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0, np.nan], "1 of 2 numbers are not finite"),
        ([1.0, np.inf], "not finite"),
        ([0.0, 0.0], "the whole result is 0"),
    ],
)
def test_results_that_cannot_be_right(result, message):
    with pytest.raises(ValueError, match=message):
        timing.checked([jnp.array(result, jnp.bfloat16)])


def test_numbers_are_normal():
    draw = jax.jit(timing.normal_numbers, static_argnums=1)
    some, other = (np.asarray(draw(np.uint32(seed), 1 << 18)) for seed in (0, 1))
    assert np.all(np.isfinite(some))
    assert abs(some.mean()) < 0.01
    assert some.std() == pytest.approx(1, abs=0.01)
    assert abs(np.corrcoef(some, other)[0, 1]) < 0.01
    for apart in (1, 16, 128):
        assert abs(np.corrcoef(some[apart:], some[:-apart])[0, 1]) < 0.02


# --- cases on a CPU -------------------------------------------------------------------------------

CASES = [(stage, case) for stage in STAGES for case in stage.cases(Context("cpu", ROOT, ROOT))]


@pytest.mark.parametrize(
    ("stage", "case"), CASES, ids=[f"{stage.name}: {case.name}" for stage, case in CASES]
)
def test_programs_are_compiled_ahead_and_the_case_runs_with_them(stage, case, context, monkeypatch):
    for program in case.programs():
        row = programs.compile_ahead(program, context)
        assert row["status"] == "ok", row
    sources = []
    load = programs.load

    def watched(program, context):
        loaded = load(program, context)
        sources.append(loaded.source)
        return loaded

    monkeypatch.setattr(programs, "load", watched)
    row = run_case(case, context)
    assert row["status"] == "ok" or row["reason"] == "only a GPU has a target description", row
    assert set(sources) <= {"compiled"}
    assert bool(sources) == bool(case.programs())
    if stage in (attention_speed.DECODE, attention_speed.PREFILL):
        assert row["error"] == 0  # both are XLA's way here
        assert row["t2_us"] > 0
        assert "matmul_share" not in row  # it would mean nothing
    elif sources:
        assert row["us"] > 0


def as_ours(monkeypatch, implementation: str) -> None:
    """Lets an implementation that runs here take the place of our kernel."""
    monkeypatch.setattr(Attention, "ours", implementation)


def test_a_peer_fails_alone(context, monkeypatch):
    def fail(*args):
        raise RuntimeError("no such library")

    monkeypatch.setattr(attention_speed.peers, "dense", fail)
    row = attention_speed.run(Attention(TOY, False), context)
    assert (row["dense_us"], row["dense_reason"]) == (None, "RuntimeError: no such library")
    assert row["jax_paged_reason"] == "unsupported: Triton needs a GPU"
    assert row["t2_us"] > 0
    assert row["xla_t2_us"] > 0


@pytest.mark.parametrize(
    ("shape", "break_it", "message"),
    [
        (TOY, lambda out: out, None),
        (TOY, lambda out: jnp.flip(out, axis=1), "differs from XLA's result"),
        (TOY, lambda out: out.at[-1, 0].mul(1.2), "differs from XLA's result"),
        (TOY, lambda out: out.at[-1, 0, 0].set(jnp.nan), "not finite"),
        (TOY, jnp.zeros_like, "the whole result is 0"),
        (TOY_PROMPTS, lambda out: out, None),
        (TOY_PROMPTS, lambda out: out.at[-1, 0].mul(1.2), "differs from XLA's result"),
    ],
    ids=["right", "heads", "one", "nan", "zeros", "prefill right", "prefill one"],
)
def test_a_wrong_result_gets_no_time(shape, break_it, message, context, monkeypatch):
    as_ours(monkeypatch, "reference")
    right_way = attention_speed.paged_attention

    def attend(*args, implementation, **kwargs):
        out = right_way(*args, implementation=implementation, **kwargs)
        return break_it(out) if implementation == "reference" else out

    monkeypatch.setattr(attention_speed, "paged_attention", attend)
    monkeypatch.setattr(Attention, "peers", lambda self: {})
    if message is None:
        row = attention_speed.run(Attention(shape, False), context)
        assert 0 <= row["error"] <= attention_speed.TOLERANCE
    else:
        with pytest.raises(ValueError, match=message):
            attention_speed.run(Attention(shape, False), context)


def test_a_result_that_changes_gets_no_time(context, monkeypatch):
    measure = Layers.measure

    def changing(self, arrays, context):
        row, results = measure(self, arrays, context)
        results[0][1][0].view(np.uint8).flat[5] ^= 1
        return row, results

    monkeypatch.setattr(Layers, "measure", changing)
    with pytest.raises(ValueError, match="differ in 1 bytes"):
        attention_speed.run(Attention(TOY, False), context)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [TOY, TOY_PROMPTS], ids=["decode", "prefill"])
def test_layers_of_the_kernel_pass_the_check(shape, context, monkeypatch):
    as_ours(monkeypatch, "mosaic_gpu")
    attention = Attention(shape, False)
    ours = attention_speed.paged(shape, "mosaic_gpu", False)
    arrays = timing.make(ours.operands, context)
    with dispatch.interpret_kernels():
        (result,) = programs.load(ours.loop(ours.counts[0], 2).program, context)(*arrays)
    row = attention_speed.compare(attention, np.asarray(result), arrays, context)
    assert 0 < row["error"] < attention_speed.TOLERANCE / 2


@pytest.mark.parametrize("operation", ["write_kv", "gather_blocks"])
def test_a_wrong_block_gets_no_time(operation, context, monkeypatch):
    right_way = getattr(cache_speed, operation)
    timed = cache_speed._timed
    calls = []

    def wrong(*args, implementation):
        cache = right_way(*args, implementation=implementation)
        return cache._replace(v=cache.v.at[-1, 0, 0, 0].set(7)) if len(calls) == 1 else cache

    def counted(loop, context):
        calls.append(loop.name)
        return timed(loop, context)

    monkeypatch.setattr(cache_speed, operation, wrong)
    monkeypatch.setattr(cache_speed, "_timed", counted)
    with pytest.raises(ValueError, match="bytes differ from XLA's result"):
        cache_speed.run(cache_speed.Job(operation, 3, 16), context)


# --- programs for a GPU ---------------------------------------------------------------------------


def in_loop(loop: timing.Loop) -> Launches:
    """Returns what a turn of a loop launches on an H100."""
    program = loop.program
    function = jax.jit(program.function, donate_argnums=program.donate)
    text = deviceless.compile_for("h100", function, *program.arguments()).as_text()
    (body,) = set(re.findall(r"\bbody=%?([\w.\-]+)", text))
    text = text.replace("ENTRY ", "")
    return launches(re.sub(rf"^(%?{re.escape(body)} )", r"ENTRY \1", text, flags=re.MULTILINE))


@pytest.mark.slow
def test_a_turn_plans_once_and_a_layer_adds_its_kernels():
    """The attention and its merge, as in the engine's step."""
    decode = attention_speed.paged(Shape(8, 1024, "32/8", 16), "mosaic_gpu", True)
    one, two = (in_loop(decode.loop(count, 3)) for count in (1, 2))
    assert (len(one.kernels), len(two.kernels)) == (2, 4)
    assert len(two.others) == len(one.others)
    assert len(one.others) >= 4  # the plan is in the turn
    assert two.loops == ()


@pytest.mark.slow
@pytest.mark.parametrize(
    "operation",
    ["write_kv", "rotate_and_write", "copy_blocks", "gather_blocks", "scatter_blocks"],
)
def test_a_pool_is_not_copied_in_a_turn(operation):
    turn = in_loop(cache_speed.loop(cache_speed.Job(operation, 64, 16), "mosaic_gpu", True))
    assert len(turn.kernels) == 1
    assert not any("copy" in name for name in turn.others), turn.others


DECODE, PREFILL = Shape(8, 1024, "32/8", 16), Shape(1, 1024, "32/8", 64, 1024)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize(
    "of",
    [
        lambda context: Attention(DECODE, True).programs(),
        lambda context: Attention(PREFILL, True).programs(),
        lambda context: [p for c in device.STAGE.cases(context) for p in c.programs()],
        lambda context: [p for c in cache_speed.STAGE.cases(context)[-5:] for p in c.programs()],
        lambda context: model_step.all_programs(ONE_LAYER),
    ],
    ids=["decode", "prefill", "device", "cache", "model"],
)
def test_every_program_compiles_for_an_h100(of, tmp_path, monkeypatch):
    one_layer = random_models.CONFIGS["8b"] | {"num_hidden_layers": 1, "vocab_size": 1024}
    monkeypatch.setitem(random_models.CONFIGS, "8b one layer", one_layer)
    for program in of_fewest_layers(timing.unique(of(on_gpu(tmp_path)))):
        if "cudnn" in program.name:
            # Its programs can be compiled only where its library is.
            with pytest.raises(RuntimeError, match="cuDNN not found"):
                programs.serialized(program, target="h100")
        else:
            assert len(programs.serialized(program, target="h100")) > 1000, program.name


def of_fewest_layers(every: list[Program]) -> list[Program]:
    """Leaves out what does the same with more layers."""
    fewest: dict[str, tuple[int, Program]] = {}
    for program in every:
        found = re.search(r"(\d+) layers", program.name)
        count = int(found[1]) if found else 0
        name = re.sub(r"\d+ layers", "layers", program.name)
        if name not in fewest or count < fewest[name][0]:
            fewest[name] = count, program
    return [program for _, program in fewest.values()]


ONE_LAYER = model_step.Step(64, 2048, filters=True, model="8b one layer")


def test_the_floor_of_a_step_by_hand():
    layer = 32 * (4 + 2 * 2) * 8 + 32 * 32 + 3 * 32 * 64 + 2 * 32
    weights = 2 * (300 * 32 + 2 * layer + 32)  # the embedding table is not read
    cached = 3 * 40 * 2 * 2 * 2 * 8 * 2  # tokens, layers, keys and values, heads, numbers, bytes
    assert model_step.floor_bytes(model_step.Step(3, 40, model="tiny")) == weights + cached
