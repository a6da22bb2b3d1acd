"""Settings of every test: eight CPU devices, strict dtypes, checked shapes."""

import atexit
import concurrent.futures
import contextlib
import gc
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# An interpreted kernel blocks one of the CPU client's threads for each of its own that waits at a
# barrier; with as many threads as two cores give, it would wait forever.
os.environ.setdefault("NPROC", "16")
# In the environment, so that the programs which tests run are as strict.
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# Most of the time goes into compiling small CPU programs: LLVM need not make them fast. And where
# programs are compiled for a GPU there is none on which variants could be tried.
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_gpu_autotune_level=0",
    )
)

# Where Python may not write what it compiled, as in many containers, each program that tests start
# would compile all that it imports, for some seconds. All test processes share one folder instead.
if sys.dont_write_bytecode:
    sys.dont_write_bytecode = False
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix = tempfile.mkdtemp(
        prefix="pallas-paged-"
    )
    atexit.register(shutil.rmtree, sys.pycache_prefix, ignore_errors=True)

import jax
import jaxtyping
import pytest
from hypothesis import Phase, settings
from jaxtyping import install_import_hook

# Many tests build the same small engine: what one of them compiled the next one finds. One folder
# for each of the test processes, for JAX writes its files in place.
_cache = tempfile.mkdtemp(prefix="pallas-paged-tests-")
atexit.register(shutil.rmtree, _cache, ignore_errors=True)
jax.config.update("jax_compilation_cache_dir", _cache)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
# And the programs that this process runs, one after the other.
os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

# For tests/mutations.py: that a test fails is enough, nobody asks for the smallest example.
settings.register_profile("no-shrinking", phases=[Phase.explicit, Phase.generate])

# Without what is for CPUs: Numba would be given the checking functions around its own.
LAYER_1 = [
    *("pallas_paged.kv_cache", "pallas_paged.block_tables"),
    *(f"pallas_paged.ops.{name}" for name in ("block_copy", "block_transfer", "kv_write")),
    "pallas_paged.ops.product.api",
    *(f"pallas_paged.ops.attention.{name}" for name in ("api", "work_list", "xla", "reference")),
]
MODELS = [f"pallas_paged.models.{name}" for name in ("attend", "decoder", "layers", "opt", "rope")]
install_import_hook(LAYER_1 + MODELS, "beartype.beartype")


@pytest.fixture(autouse=True, scope="module")
def unchecked_shapes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Checks shapes in tests of the functions one by one, and in one of the engine's modules.

    It would be much of the time of the engine's tests, four fifths of it with the mock model.
    """
    name = request.module.__name__
    is_whole = name.startswith(("tests.engine.", "tests.benchmarks."))
    jaxtyping.config.update("jaxtyping_disable", is_whole and not name.endswith(".test_smoke"))
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


# From a minute on. The GPU suite's rehearsal, which has a limit, is not beside benchmark programs.
LONG_FILES = [
    *("tests/engine/test_whole_step_deviceless.py", "tests/test_benchmarks.py"),
    *("tests/engine/test_draft_model.py", "tests/kernels/test_attention.py"),
    *("tests/engine/test_compile.py", "tests/kernels/test_mosaic_cache_ops.py"),
    *("tests/benchmarks/test_gpu_suite_rehearsal.py", "tests/kernels/test_mosaic_prefill.py"),
    *("tests/engine/test_sampling.py", "tests/kernels/test_cpu_attention.py"),
    *("tests/kernels/test_product.py", "tests/engine/test_beams.py"),
    *("tests/engine/test_kernel_check.py", "tests/engine/test_scheduler_stateful.py"),
    *("tests/engine/serve/test_program.py", "tests/engine/test_programs.py"),
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first: a process that gets one last would run it alone at the end."""
    rank = {name: index for index, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: rank.get(item.nodeid.split("::")[0], len(rank)))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Freezes what has been imported: it stays, and no collection of garbage walks through it.

    Nor need one begin after every 700 objects: to trace a program makes many, and few are garbage.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 20, 20)


@pytest.fixture(scope="session")
def in_process_for():
    """Calls a function in a process that compiles kernels for one target alone; see `deviceless`.

    The target, by name, comes first. The function and its arguments must be picklable.
    """
    spawn = multiprocessing.get_context("spawn")
    pools = {}
    with contextlib.ExitStack() as stack:

        def call(target, function, *args):
            if target not in pools:
                pool = concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn)
                pools[target] = stack.enter_context(pool)
            return pools[target].submit(function, *args).result()

        yield call
