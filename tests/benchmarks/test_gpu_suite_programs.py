"""Programs of the GPU suite: compiled by one process, loaded and run by another."""

import importlib.metadata
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from benchmarks.gpu_suite import programs
from benchmarks.gpu_suite.stage import Context, Program
from pallas_paged import deviceless


def _scale(state, factor):
    return {"sum": state["a"] + state["b"], "product": (state["a"] * factor["by"],)}


def _arguments():
    whole = jax.ShapeDtypeStruct((3, 2), jnp.float32)
    return {"a": whole, "b": whole}, {"by": jax.ShapeDtypeStruct((), jnp.float32)}


SCALE = Program("scale 3 x 2", _scale, _arguments)
INPUTS = (
    {"a": np.full((3, 2), 3, np.float32), "b": np.ones((3, 2), np.float32)},
    {"by": np.float32(5)},
)


def _fail(x):
    raise ValueError("this does not trace")


def _refuse(x):
    raise NotImplementedError("no kernel for this")


def _one():
    return (jax.ShapeDtypeStruct((4,), jnp.float32),)


@pytest.fixture
def context(tmp_path: pathlib.Path) -> Context:
    return Context("cpu", tmp_path / "results", tmp_path / "work")


@pytest.fixture
def versions():
    """Lets a test change what the hash of the sources depends on."""
    programs.version.cache_clear()
    yield programs.version
    programs.version.cache_clear()


def in_another_process(code: str, *arguments: str) -> str:
    lines = (
        "import pathlib, sys",
        "from benchmarks.gpu_suite import programs",
        "from benchmarks.gpu_suite.stage import Context",
        "from tests.benchmarks.test_gpu_suite_programs import *",
        code,
    )
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines), *arguments],
        cwd=programs.ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- from process to process ----------------------------------------------------------------------


def test_what_another_process_compiled_is_loaded_and_runs(context):
    assert programs.find(SCALE.name, context) is None
    assert not programs.is_settled(SCALE.name, context)
    context_there = "Context('cpu', *map(pathlib.Path, sys.argv[1:]))"
    compile_it = f"print(programs.compile_ahead(SCALE, {context_there})['status'])"
    said = in_another_process(compile_it, str(context.results), str(context.work))
    assert said == "ok\n"
    assert programs.is_settled(SCALE.name, context)
    loaded = programs.load(SCALE, context)
    assert loaded.source == "compiled"
    product, total = loaded(*INPUTS)  # leaves, in the order of JAX's trees
    np.testing.assert_array_equal(product, np.full((3, 2), 15))
    np.testing.assert_array_equal(total, np.full((3, 2), 4))


def test_what_is_loaded_is_not_traced(context):
    assert programs.compile_ahead(SCALE, context)["status"] == "ok"
    loaded = programs.load(SCALE._replace(function=_fail), context)
    assert len(loaded(*INPUTS)) == 2


def test_donated_arguments_are_overwritten(context):
    def add(unread, state, x):
        del unread
        return {name: value + x for name, value in state.items()}

    (x,) = _one()
    program = Program("add", add, lambda: (x, {"k": x, "v": x}, x), donate=(1,))
    assert programs.compile_ahead(program, context)["status"] == "ok"
    for found in (True, False):
        if not found:
            programs.path_of(program.name, context, ".bin").unlink()
        ones = [jnp.ones(4) for _ in range(4)]
        loaded = programs.load(program, context)
        assert (loaded.source == "compiled") is found
        k, v = loaded(ones[0], {"k": ones[1], "v": ones[2]}, ones[3])
        assert [array.is_deleted() for array in ones] == [False, True, True, False]
        np.testing.assert_array_equal(np.asarray(k) + np.asarray(v), np.full(4, 4))


def test_options_are_for_gpus_only(context):
    program = SCALE._replace(
        options=(("xla_gpu_enable_command_buffer", ""), ("no_such_option", "1"))
    )
    assert programs.compile_ahead(program, context)["status"] == "ok"
    assert programs.load(program, context).source == "compiled"
    other = program._replace(name="never compiled")
    assert len(programs.load(other, context)(*INPUTS)) == 2
    assert not (context.work / "autotuned").exists()
    target = deviceless.target_device("h100")
    options = programs._options(program, target, context.work / "autotuned")
    assert {"no_such_option", "xla_gpu_per_fusion_autotune_cache_dir"} <= options.keys()


# --- what is not found ----------------------------------------------------------------------------


def test_programs_of_other_sources_are_not_found(context, monkeypatch, versions, tmp_path):
    for name in ("pallas_paged/ops/deep/kernel.py", "models/llama.py"):
        path = tmp_path / "sources" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1\n")
    suite = tmp_path / "sources/benchmarks/gpu_suite"
    suite.mkdir(parents=True)
    monkeypatch.setattr(programs, "ROOT", tmp_path / "sources")
    assert programs.compile_ahead(SCALE, context)["status"] == "ok"

    def is_found() -> bool:
        versions.cache_clear()
        return programs.find(SCALE.name, context) is not None

    (suite / "report.py").write_text("x = 1\n")  # has no part in what is compiled
    assert is_found()
    path.write_text("x = 2\n")
    assert not is_found()
    path.write_text("x = 1\n")
    assert is_found()
    path.rename(path.with_name("other.py"))
    assert not is_found()


@pytest.mark.parametrize(
    "name",
    [
        "pallas_paged/dispatch.py",
        "pallas_paged/ops/attention/hopper/decode.py",
        "pallas_paged/targets/h100.txtpb",
        "models/llama.py",
        "engine/device/step.py",
        "benchmarks/random_models.py",
        "benchmarks/attention_cases/arguments.py",
        "benchmarks/gpu_suite/shapes.py",
    ],
)
def test_what_programs_depend_on_is_in_their_version(name):
    path = programs.ROOT / name
    assert any(path in programs.ROOT.glob(pattern) for pattern in programs._SOURCES)


def test_programs_of_another_jax_platform_or_name_are_not_found(context, monkeypatch, versions):
    assert programs.compile_ahead(SCALE, context)["status"] == "ok"
    assert programs.find(SCALE.name, context) is not None
    assert programs.find(SCALE.name, context._replace(platform="sm_90")) is None
    assert programs.find(f"{SCALE.name}!", context) is None  # of the same file name but its hash
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.1")
    versions.cache_clear()
    assert programs.find(SCALE.name, context) is None


def test_a_program_that_is_not_found_is_compiled_here(context):
    asked: list[float] = []
    loaded = programs.load(SCALE, context._replace(more_time=asked.append))
    assert loaded.source == "here: not compiled ahead"
    assert asked == [programs.COMPILE_LIMIT_S]
    assert len(loaded(*INPUTS)) == 2


def test_carried_programs_come_after_own_ones_and_in_order(context, tmp_path):
    first, second = folders = tmp_path / "first", tmp_path / "second"
    context = context._replace(carried=folders)
    own = programs.path_of(SCALE.name, context, ".bin")
    content = programs.serialized(SCALE)
    programs.write(second / own.name, content)
    assert programs.find(SCALE.name, context) == (second / own.name, "carried")
    assert programs.is_settled(SCALE.name, context)
    assert programs.load(SCALE, context).source == "carried"
    programs.write(first / own.name, content)
    assert programs.find(SCALE.name, context) == (first / own.name, "carried")
    programs.write(own, content)
    assert programs.find(SCALE.name, context) == (own, "compiled")
    # What was found to fail here does not hide what was carried.
    programs.keep_failure(SCALE.name, context, {"status": "failed", "reason": "no memory"})
    assert programs.load(SCALE, context).source == "compiled"


# --- what cannot be loaded ------------------------------------------------------------------------


def test_a_failure_to_compile_is_the_loaders_too(context):
    program = Program("fails", _fail, _one)
    row = programs.compile_ahead(program, context)
    assert (row["status"], row["reason"]) == ("failed", "ValueError: this does not trace")
    assert programs.is_settled("fails", context)
    with pytest.raises(
        programs.NotCompiledError, match="failed while compiling: ValueError"
    ) as caught:
        programs.load(program, context)
    assert caught.value.row.items() <= row.items()


def test_a_refusal_to_compile_is_the_loaders_too(context):
    program = Program("refuses", _refuse, _one)
    assert programs.compile_ahead(program, context)["status"] == "unsupported"
    with pytest.raises(NotImplementedError, match=r"^no kernel for this$"):
        programs.load(program, context)


def test_what_is_recorded_of_a_process_that_died_is_raised(context):
    programs.keep_failure("crashes", context, {"status": "crashed"})
    with pytest.raises(programs.NotCompiledError, match="crashed while compiling"):
        programs.load(SCALE._replace(name="crashes"), context)


@pytest.mark.parametrize("damage", [lambda x: x[: len(x) // 2], lambda x: b"", lambda x: b"text"])
def test_a_damaged_program_is_compiled_here(damage, context):
    assert programs.compile_ahead(SCALE, context)["status"] == "ok"
    path = programs.path_of(SCALE.name, context, ".bin")
    path.write_bytes(damage(path.read_bytes()))
    loaded = programs.load(SCALE, context)
    assert loaded.source.startswith("here: compiled, but not loaded: ")
    assert len(loaded(*INPUTS)) == 2


def test_carried_programs_are_tried_by_running_one(context, tmp_path):
    def cannot_use() -> str | None:
        return programs.cannot_use([SCALE], context)

    assert "none of them" in cannot_use()
    context = context._replace(carried=(tmp_path / "carried",))
    path = context.carried[0] / programs.path_of(SCALE.name, context, ".bin").name
    programs.write(path, programs.serialized(SCALE))
    assert cannot_use() is None
    programs.write(path, programs.serialized(Program("other", lambda x: x, _one)))
    assert "TypeError" in cannot_use()  # it loads
    programs.write(path, b"no program")
    assert "UnpicklingError" in cannot_use()


def test_a_program_for_a_gpu_is_not_loaded_without_one(context, tmp_path):
    content = programs.serialized(SCALE, target="h100")
    assert content != programs.serialized(SCALE)
    carried = tmp_path / "carried"
    programs.write(carried / programs.path_of(SCALE.name, context, ".bin").name, content)
    loaded = programs.load(SCALE, context._replace(carried=(carried,)))
    assert loaded.source.startswith("here: carried, but not loaded: ")
    assert len(loaded(*INPUTS)) == 2


# --- arrays and files -----------------------------------------------------------------------------

DTYPES = (
    "bfloat16",
    "float8_e4m3fn",
    "float8_e5m2",
    "int4",
    "int8",
    "uint8",
    "int32",
    "int64",
    "bool",
    "float16",
    "float32",
    "float64",
)


def test_arrays_of_all_dtypes_come_back(context):
    rng = np.random.default_rng(0)
    arrays = {}
    for dtype in DTYPES:
        own = getattr(ml_dtypes, dtype, dtype)
        numbers = rng.integers(0, 2, (3, 4)) if dtype == "bool" else rng.integers(-7, 8, (3, 4))
        arrays[dtype] = numbers.astype(own)
        arrays[f"{dtype}: turned/scalar"] = arrays[dtype].T
        arrays[f"{dtype}: scalar"] = arrays[dtype][1, 1].reshape(())
        arrays[f"{dtype}: empty"] = arrays[dtype][:, :0]
    arrays["file"] = np.array([np.nan, -0.0, np.inf], ml_dtypes.bfloat16)
    path = programs.path_of("correctness: a case", context, ".npz")
    programs.save_arrays(path, arrays)
    loaded = programs.load_arrays(path)
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (loaded[name].dtype, loaded[name].shape) == (array.dtype, array.shape), name
        np.testing.assert_array_equal(loaded[name].tobytes(), array.tobytes(), err_msg=name)
    on_device = {"x": jnp.arange(4, dtype=jnp.bfloat16), "y": jnp.float8_e4m3fn(2.5)}
    programs.save_arrays(path, on_device)
    loaded = programs.load_arrays(path)
    assert loaded.keys() == on_device.keys()
    assert (str(loaded["x"].dtype), float(loaded["y"])) == ("bfloat16", 2.5)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: programs.write(path, b"content"),
        lambda path: programs.save_arrays(path, {"x": np.ones(3)}),
    ],
    ids=["write", "save_arrays"],
)
def test_a_write_that_is_cut_off_leaves_no_file(write, context, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt  # as if the process had been killed before the last step

    path = programs.path_of("a case", context, ".bin")
    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write(path)
    assert programs.find("a case", context) is None
    (part,) = path.parent.iterdir()
    assert part.name.startswith(".")
    assert part.suffix == ".part"
    write(path)
    assert programs.find("a case", context) == (path, "compiled")


def test_processes_may_write_the_same_file_at_a_time(context, monkeypatch):
    path = programs.path_of("a case", context, ".bin")
    whole = pathlib.Path.replace

    def replace(self, target):
        monkeypatch.setattr(pathlib.Path, "replace", whole)
        write_it = "programs.write(pathlib.Path(sys.argv[1]), b'theirs')"
        in_another_process(write_it, str(path))
        assert path.read_bytes() == b"theirs"
        return self.replace(target)

    monkeypatch.setattr(pathlib.Path, "replace", replace)
    programs.write(path, b"ours")
    assert path.read_bytes() == b"ours"
    assert list(path.parent.iterdir()) == [path]


def test_names_of_files_are_short_and_say_what_they_are():
    name = programs.file_name("correctness: mosaic_gpu: decode, block 16 " + "x" * 90, "v")
    assert name.startswith("correctness-mosaic-gpu-decode-block-16-xxx")
    assert len(name) <= 73
    assert json.dumps(name).isascii()
