"""Finds the attention kernels' fastest configurations on this GPU; writes them into the package.

For each case of kernel, head_dim, block size and group, every configuration that fits the chip is
compiled by `--jobs` processes, and then timed on a few steps: of decode many sequences, a few short
ones and one long one; of prefill whole prompts and pieces of them. One whose results are not those
of the configuration by rule is left out. The one with the smallest geometric mean of its times is
kept, if it beats the configuration by rule by more than the noise. When `--budget_s` is over, what
was measured is kept.

  python -m benchmarks.tune_attention --head_dims=64,128 --block_sizes=16,32,64 --groups=4,8
"""

import concurrent.futures
import itertools
import multiprocessing
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterable

from absl import flags

from benchmarks.gpu_suite import programs
from benchmarks.gpu_suite.stage import Context, Row
from benchmarks.gpu_suite.tuning import BUDGET_S, loader
from benchmarks.gpu_suite.tuning_choice import Outcome, keep, tune
from benchmarks.gpu_suite.tuning_problems import KERNELS, Problem, describe
from pallas_paged.dispatch import target_device, unsupported_target
from pallas_paged.models import command_line
from pallas_paged.ops.attention import config as attention_config
from pallas_paged.quantisation import LARGEST

_KERNELS = flags.DEFINE_list("kernels", list(KERNELS), f"Of {', '.join(KERNELS)}.")
_HEAD_DIMS = flags.DEFINE_list("head_dims", ["64", "128"], "head_dim of the cases.")
command_line.integers_only("head_dims", "64")
_BLOCK_SIZES = flags.DEFINE_list("block_sizes", ["16", "32", "64"], "Block sizes of the cases.")
command_line.integers_only("block_sizes", "16")
_GROUPS = flags.DEFINE_list("groups", ["8"], "Query heads per KV head of the cases.")
command_line.integers_only("groups", "8")
_DTYPE = flags.DEFINE_enum(
    "cache_dtype",
    "bfloat16",
    ["bfloat16", "float16", *map(str, LARGEST)],
    "Dtype of the cache; queries have the same, or bfloat16 if the cache is quantised.",
)
_JOBS = flags.DEFINE_integer(
    "jobs",
    max(1, (os.cpu_count() or 2) - 2),
    "Processes that compile.",
    lower_bound=1,
)
_BUDGET = flags.DEFINE_float("budget_s", 540.0, "Seconds after which no more cases are begun.")
_OUT = flags.DEFINE_string(
    "tuned_dir", None, "Folder for the file of this kind of GPU; the package's own if not given."
)


@flags.validator("kernels", message=f"use some of {', '.join(KERNELS)}: --kernels=decode")
def _kernels_are_known(kernels: list[str]) -> bool:
    return bool(kernels) and set(kernels) <= set(KERNELS)


def make_problems(
    kernels: Iterable[str],
    groups: Iterable[int],
    head_dims: Iterable[int],
    block_sizes: Iterable[int],
    cache_dtype: str,
) -> list[Problem]:
    """Returns a problem for each configuration that the package looks up."""
    problems: dict[object, Problem] = {}
    for group, head_dim, block_size, kernel in itertools.product(
        groups, head_dims, block_sizes, kernels
    ):
        problem = Problem(kernel, head_dim, block_size, (group,), cache_dtype)
        known = problems.get(problem.key)
        groups_so_far = known.groups if known else ()
        if group not in groups_so_far:
            problems[problem.key] = problem._replace(groups=(*groups_so_far, group))
    return list(problems.values())


def compile_all(problem: Problem, context: Context, jobs: int) -> None:
    """Compiles a problem's programs in other processes, for the device that is there.

    What is not compiled, because it failed or took its process with it, `programs.load` will say.
    """
    names = [program.name for program in problem.programs()]
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        min(jobs, len(names)), mp_context=spawn, initializer=_take_little_memory
    ) as pool:
        futures = [pool.submit(_compile, problem, i, context.fields()) for i in range(len(names))]
    for name, future in zip(names, futures, strict=True):
        error = future.exception()
        if error is not None and not programs.is_settled(name, context):
            reason = f"{type(error).__name__}: {error}"
            programs.keep_failure(name, context, {"status": "crashed", "reason": reason})


def _take_little_memory() -> None:
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"


def _compile(problem: Problem, index: int, fields: Row) -> None:
    programs.compile_ahead(problem.programs()[index], Context.of(fields))


def tune_all(
    problems: Iterable[Problem],
    tune_one: Callable[[Problem], Outcome],
    keep_one: Callable[[Problem, Outcome], None],
    budget_s: float,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Tunes and keeps one problem after the other; returns how many.

    Args:
      problems: the most important first.
      tune_one: measures one; whatever it raises leaves that one out.
      keep_one: called with each outcome, at once.
      budget_s: seconds after which no more are begun.
      clock: seconds since whenever.
    """
    done, end = 0, clock() + budget_s
    for problem in problems:
        if clock() > end:
            break
        try:
            outcome = tune_one(problem)
        except Exception as error:
            print(f"{problem.name}: left out: {type(error).__name__}: {error}")
            continue
        keep_one(problem, outcome)
        done += 1
        for config, reason in outcome.left_out.items():
            print(f"  left out: {config}: {reason}")
        times = ", ".join(f"{seconds * 1e6:.1f}" for seconds in outcome.best.times_s)
        ratio = outcome.by_rule.mean_s / outcome.best.mean_s
        print(f"{problem.name}: {describe(outcome.best.config)}: {times} us, rule/best {ratio:.3f}")
    return done


def main() -> None:
    """Tunes, prints a line per case, and writes the file after each."""
    reason = unsupported_target("hopper")
    if reason is not None:
        raise NotImplementedError(f"tune_attention cannot measure here: {reason}")
    groups, head_dims, block_sizes = (
        [int(number) for number in flag.value] for flag in (_GROUPS, _HEAD_DIMS, _BLOCK_SIZES)
    )
    problems = make_problems(_KERNELS.value, groups, head_dims, block_sizes, _DTYPE.value)
    folder = pathlib.Path(_OUT.value or pathlib.Path(attention_config.__file__).parent / "tuned")
    device_kind = target_device().device_kind
    with tempfile.TemporaryDirectory() as work:
        context = Context("sm_90", results=folder, work=pathlib.Path(work))

        def tune_one(problem: Problem) -> Outcome:
            compile_all(problem, context, _JOBS.value)
            return tune(problem, loader(problem, context), BUDGET_S)

        def keep_one(problem: Problem, outcome: Outcome) -> None:
            keep(folder, {problem.key: outcome.best.config}, device_kind)

        done = tune_all(problems, tune_one, keep_one, _BUDGET.value)
    print(f"{done} of {len(problems)} cases")
    print(folder / attention_config.tuned_file_name(device_kind))


if __name__ == "__main__":
    command_line.run(main)
