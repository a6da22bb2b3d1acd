"""The stage "hints": its tools' stand-ins, what is read from reports, and what outlives whom.

The reports of compute-sanitizer and ncu in this file are written by hand, after NVIDIA's
documentation: no tool made them. The thunks are XLA's own, shortened.
"""

import gzip
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from benchmarks.gpu_suite import hints, hints_child, hints_tools, hints_work, programs
from benchmarks.gpu_suite.stage import Case, Context, run_case

CLEAN = """\
========= COMPUTE-SANITIZER
========= ERROR SUMMARY: 0 errors
"""
MEMCHECK = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 2 bytes
=========     at paged_decode_mosaic_gpu_kernel+0x1a40
=========     by thread (3,0,0) in block (2,0,0)
=========     Access to 0x7f3c2a001000 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f3c2a000000 of size 4,096 bytes
=========         Host Frame: cuLaunchKernelEx [0x2cc0ff] in libcuda.so.1
=========
========= Invalid __global__ write of size 2 bytes
=========     at paged_decode_mosaic_gpu_kernel+0x1a40
=========     by thread (4,0,0) in block (2,0,0)
=========
========= ERROR SUMMARY: 2 errors
"""
SYNCCHECK = """\
========= COMPUTE-SANITIZER
========= Barrier error detected. Missing wait.
=========     at paged_prefill_mosaic_gpu_kernel+0xbb10
=========     by thread (128,0,0) in block (0,0,0)
=========     Barrier is located at shared address 0x30408
=========
========= ERROR SUMMARY: 257 errors
========= ERROR SUMMARY: 157 errors were not printed. Use --print-limit option to adjust
"""
NO_DEVICE = """\
========= COMPUTE-SANITIZER
========= Error: Device not supported. Please refer to the "Supported Devices" section
=========
"""
NO_COUNTERS = """\
==PROF== Connected to process 4242 (/usr/bin/python3.12)
==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance \
Counters on the target device 0.
==PROF== Disconnected from process 4242
==WARNING== No kernels were profiled.
"""
RAW_PAGE = {
    "ID": ("", "0"),
    "Process ID": ("", "4242"),
    "Kernel Name": ("", "paged_decode_mosaic_gpu_kernel"),
    "gpu__time_duration.sum": ("ns", "402,304"),
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": ("%", "81.25"),
    "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed": ("%", "81.3"),
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": ("%", "33.5"),
    "sm__warps_active.avg.pct_of_peak_sustained_active": ("%", "12.4"),
    "sm__maximum_warps_per_active_cycle_pct": ("%", "12.5"),
    "launch__registers_per_thread": ("register/thread", "56"),
    "launch__shared_mem_per_block_dynamic": ("byte/block", "109,568"),
    "launch__shared_mem_per_block_static": ("byte/block", "0"),
    "launch__grid_size": ("", "264"),
    "launch__waves_per_multiprocessor": ("", "1"),
    "lts__t_sector_hit_rate.pct": ("%", "3.1"),
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_ld.sum": ("", "1,000"),
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_st.sum": ("", "24"),
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio": ("inst", "13.16"),
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio": ("inst", "0.02"),
    "smsp__average_warps_issue_stalled_wait_per_issue_active.ratio": ("inst", "1.15"),
    "smsp__average_warps_issue_stalled_gmma_per_issue_active.ratio": ("inst", "2.51"),
    "smsp__average_warps_issue_stalled_selected_per_issue_active.ratio": ("inst", "1"),
    "smsp__pcsamp_sample_buffer_full": ("", "n/a"),
}


def raw_page(page: dict[str, tuple[str, str]] = RAW_PAGE) -> str:
    lines = [page, (unit for unit, _ in page.values()), (value for _, value in page.values())]
    return "\n".join(",".join(f'"{cell}"' for cell in line) for line in lines)


@pytest.fixture
def context(tmp_path: pathlib.Path) -> Context:
    return Context("sm_90", tmp_path / "results", tmp_path / "work")


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts a shell script on the PATH; no other tools are found than these."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setattr(hints_tools.find_tool, "__defaults__", ((str(tmp_path / "nvidia*"),),))

    def put(name: str, body: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)

    return put


def case_of(name: str, context: Context) -> Case:
    return next(case for case in hints.STAGE.cases(context) if case.name == name)


def compiled(name: str, context: Context, besides: tuple[str, ...] = ()) -> Case:
    """Returns a case whose programs look as if they had been compiled."""
    case = case_of(name, context)
    for program in case.programs():
        if program.name not in besides:
            programs.write(programs.path_of(program.name, context, ".bin"), b"for a GPU")
    return case


def said_by_child(case: Case, besides: tuple[str, ...] = ()) -> str:
    names = [program.name for program in case.programs() if program.name not in besides]
    return "\n".join(f"{hints_child.MARK}{name} | compiled | 0.10 s" for name in names)


def prints(text: str, status: int = 0) -> str:
    return f"cat <<'END'\n{text}\nEND\nexit {status}"


# --- the cases ------------------------------------------------------------------------------------


def test_the_cases_are_in_order_of_importance(context):
    names = [case.name for case in hints.STAGE.cases(context)]
    assert names[:4] == ["memcheck", "synccheck", "ncu decode", "ncu prefill"]
    assert names[4:] == ["thunks"]
    toys = hints.STAGE.cases(context._replace(platform="cpu"))
    assert [case.name for case in toys] == ["memcheck", "ncu decode", "thunks"]
    assert sum(case.run_s for case in hints.STAGE.cases(context)) <= hints.STAGE.budget_s
    per_job = [hints_work.programs(job, context) for job in ("smallest", "decode", "prefill")]
    every = [program.name for job in per_job for program in job]
    assert len(set(every)) == len(every) == 9


@pytest.mark.parametrize("name", ["memcheck", "ncu decode"])
def test_without_a_gpu_the_child_runs_with_no_tool_in_front(name, context):
    context = context._replace(platform="cpu")
    case = case_of(name, context)
    for program in case.programs():
        assert programs.compile_ahead(program, context)["status"] == "ok"
    row = run_case(case, context)
    assert (row["status"], row["tool"]) == ("ok", "none, there is no GPU"), row
    assert row["ran"] == {program.name: "compiled" for program in case.programs()}
    assert hints_child.MARK in (context.results / "hints" / row["file"]).read_text()


@pytest.mark.slow
def test_thunks_are_dumped_and_counted(context):
    context = context._replace(platform="cpu")
    case = case_of("thunks", context)
    assert case.prepare is not None
    case.prepare(context)
    row = run_case(case, context)
    assert row["status"] == "ok", row
    assert row["thunks"] > row["top_level"] > 0
    # The toy runs with XLA's attention, which has loops; what else a step had is gone.
    assert min(row["command_buffers"], row["whiles"]) > 0
    assert row["conditionals"] == 0
    kept = gzip.decompress((context.results / "hints" / row["file"]).read_bytes()).decode()
    assert hints_tools.thunk_figures(kept)["thunks"] == row["thunks"]
    assert row["took_s"] < 5  # it was prepared


def test_thunks_that_were_not_dumped_ahead_are_not_dumped_again(context, monkeypatch):
    def fail(*args):
        raise NotImplementedError("cannot compile for h100")

    monkeypatch.setattr(hints, "_dumped", fail)
    case = case_of("thunks", context)
    assert case.prepare is not None
    with pytest.raises(NotImplementedError):
        case.prepare(context)
    monkeypatch.undo()
    row = run_case(case, context)
    assert (row["status"], row["reason"]) == ("unsupported", "cannot compile for h100")
    monkeypatch.setattr(hints, "_dumped", lambda *args: "000: kCopy [source | sink] kCopy\n")
    case.prepare(context)
    assert run_case(case, context)["thunks"] == 1


# --- stand-ins for the tools ----------------------------------------------------------------------


def test_a_clean_report_is_ok(context, install):
    case = compiled("synccheck", context)
    # The tool repeats its arguments, and what the child would print.
    echo = 'echo "$@" $XLA_PYTHON_CLIENT_ALLOCATOR $XLA_PYTHON_CLIENT_PREALLOCATE'
    install("compute-sanitizer", f"{echo}\n{prints(CLEAN + said_by_child(case))}")
    row = run_case(case, context)
    assert (row["status"], row["errors"], len(row["ran"])) == ("ok", 0, 7), row
    text = (context.results / "hints" / row["file"]).read_text()
    assert "--tool=synccheck" in text
    assert "--padding" not in text
    assert " platform false\n" in text  # each array apart, and no memory taken that others need
    assert "-m benchmarks.gpu_suite.hints_child --job=smallest --context=" in text


def test_reported_errors_fail_and_are_shown(context, install):
    case = compiled("memcheck", context)
    install("compute-sanitizer", prints(MEMCHECK + said_by_child(case)))
    row = run_case(case, context)
    assert (row["status"], row["errors"]) == ("failed", 2)
    assert row["kinds"] == {"Invalid __global__ write of size 2 bytes": 2}
    assert "paged_decode_mosaic_gpu_kernel+0x1a40" in row["report"]


def test_a_clean_report_of_a_child_that_died_fails(context, install):
    install("compute-sanitizer", prints(f"Traceback: no such program\n{CLEAN}", status=1))
    row = run_case(compiled("memcheck", context), context)
    assert (row["status"], row["errors"]) == ("failed", 0)
    assert row["reason"].startswith("0 of 7 programs ran, exit status 1")
    assert "no such program" in row["reason"]


@pytest.mark.parametrize(
    ("case", "tool", "output", "said"),
    [
        ("memcheck", "compute-sanitizer", NO_DEVICE, "Device not supported"),
        ("ncu decode", "ncu", NO_COUNTERS, "ERR_NVGPUCTRPERM"),
    ],
)
def test_a_tool_that_refuses_is_unsupported(case, tool, output, said, context, install):
    install(tool, prints(output, status=1))
    row = run_case(compiled(case, context), context)
    assert row["status"] == "unsupported", row
    assert said in row["reason"].splitlines()[0]
    assert output.splitlines()[-2].strip("= ")[-20:] in row["reason"]


def test_a_program_that_says_not_supported_is_no_refusing_tool(context, install):
    install("ncu", prints("jax: Device not supported", status=1))
    row = run_case(compiled("ncu decode", context), context)
    assert row["status"] == "failed"
    assert "Device not supported" in row["reason"]


@pytest.mark.parametrize("case", ["memcheck", "synccheck", "ncu decode", "ncu prefill"])
def test_a_tool_that_is_not_there_is_unsupported(case, context, install):
    row = run_case(compiled(case, context), context)
    assert row["status"] == "unsupported"
    assert "neither on the PATH" in row["reason"]


def test_tools_are_found_where_packages_put_them(tmp_path, install):
    for version in ("nvidia-12", "nvidia-13"):
        path = tmp_path / version / "ncu"
        path.parent.mkdir()
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
    assert hints_tools.find_tool("ncu") == str(path)
    install("ncu", "")
    assert hints_tools.find_tool("ncu") == str(tmp_path / "bin" / "ncu")


def test_a_profile_is_read_and_kept(context, install):
    case = compiled("ncu decode", context)
    install(
        "ncu",
        f"""
        case "$*" in
          *--import*--page=raw*) {prints(raw_page())} ;;
          *--import*) echo "$@"; exit 0 ;;
        esac
        while [ "$1" != "-o" ]; do echo "$1"; shift; done
        echo report > "$2"
        {prints(said_by_child(case))}
        """.replace("        ", ""),
    )
    row = run_case(case, context)
    assert row["status"] == "ok", row
    assert row["kernel"] == "paged_decode_mosaic_gpu_kernel"
    assert row["duration_us"] == pytest.approx(402.304)
    assert (row["dram_percent"], row["registers"], row["bank_conflicts"]) == (81.25, 56, 1024)
    names = ["details.txt", "raw.csv", "source.csv.gz"]
    assert row["files"] == [*(f"ncu-decode-{name}" for name in names), "ncu-decode.ncu-rep"]
    assert all((context.results / "hints" / name).exists() for name in row["files"])
    asked = (context.results / "hints" / row["file"]).read_text().split()
    assert {"--clock-control=none", "--launch-count=1", "--section=SourceCounters"} <= set(asked)
    assert asked[asked.index("--kernel-name") + 1].startswith("regex:^paged_(decode|")


def test_a_tool_that_hangs_is_killed_and_what_it_printed_is_kept(context, install, monkeypatch):
    monkeypatch.setattr(hints, "LIMIT_S", hints._SPARE_S + 4)
    install("compute-sanitizer", "echo half a report; exec sleep 300")
    row = run_case(compiled("memcheck", context), context)
    assert row["status"] == "timed out"
    assert row["reason"].startswith("killed after")
    assert (context.results / "hints" / row["file"]).read_text() == "half a report\n"


def test_what_does_not_compile_is_left_out_and_named(context, install):
    broken = "hints mosaic_gpu: mixed"
    programs.keep_failure(broken, context, {"status": "unsupported", "reason": "no such kernel"})
    case = compiled("memcheck", context, besides=(broken,))
    install("compute-sanitizer", f'echo "$@"\n{prints(CLEAN + said_by_child(case, (broken,)))}')
    row = run_case(case, context)
    assert (row["status"], len(row["ran"])) == ("ok", 6), row
    assert row["left_out"] == {broken: "NotImplementedError: no such kernel"}
    assert f"--leave_out={broken}" in (context.results / "hints" / row["file"]).read_text()


def test_tools_are_not_started_over_nothing(context, install):
    install("ncu", "exit 0")
    row = run_case(case_of("ncu decode", context), context)
    assert row["status"] == "failed"
    assert "block 64 was not compiled ahead" in row["reason"]
    (program,) = case_of("ncu prefill", context).programs()
    programs.keep_failure(program.name, context, {"status": "unsupported", "reason": "too large"})
    row = run_case(case_of("ncu prefill", context), context)
    assert (row["status"], row["reason"]) == ("unsupported", "too large")


# --- reading reports ------------------------------------------------------------------------------


def test_errors_are_counted_once():
    row = hints_tools.sanitizer_figures(SYNCCHECK)
    assert row["errors"] == 257
    assert row["kinds"] == {"Barrier error detected. Missing wait.": 1}
    two_processes = hints_tools.sanitizer_figures(CLEAN + MEMCHECK)
    assert two_processes["errors"] == 2
    with pytest.raises(ValueError, match="no summary"):
        hints_tools.sanitizer_figures("========= COMPUTE-SANITIZER\nkilled\n")


def test_figures_of_a_profile():
    row = hints_tools.profile_figures(f"==PROF== Loading report\n{raw_page()}\n")
    assert row["stalls"] == "long_scoreboard 13.2, gmma 2.51, wait 1.15, selected 1"
    assert row["smem_dynamic_bytes"] == 109568
    assert "none" not in row
    some = {name: RAW_PAGE[name] for name in ("ID", "Kernel Name", "launch__registers_per_thread")}
    row = hints_tools.profile_figures(raw_page(some))
    assert row["registers"] == 56
    assert {"duration_us", "dram_percent", "bank_conflicts", "stalls"} <= set(row["none"])
    strange = RAW_PAGE | {"gpu__time_duration.sum": ("cycle", "5")}
    assert hints_tools.profile_figures(raw_page(strange))["none"] == ["duration_us"]
    with pytest.raises(ValueError, match="no kernel"):
        hints_tools.profile_figures("==WARNING== No kernels were profiled.\n")


def test_thunks_outside_of_command_buffers_are_counted():
    sequence = """\
000: kCommandBuffer [source       | next=115 (1)]
    001: kCustomKernel       [source       | next=007 (6)] fusion grid: [8, 1, 1]
    093: kConditional  [source       | next=094 (1)]
      false_branch:
        083: kCustomKernel [source       | next=084 (1)] input_reduce_fusion_14
115: kConditional   [prev=000 (1) | next=116 (1)]
  false_branch:
    054: kCopy          [source       | next=099 (4)] kCopy
    062: kWhile         [prev=000 (1) | next=000 (1)]
condition:
        063: kCustomKernel [source | sink] loop_compare_fusion grid: [1, 1, 1]
      body:
        000: kCommandBuffer [source | sink]
            064: kWhile [source       | sink        ] loop_add_fusion_1
  true_branch:
    080: kCustomKernel [source | sink] loop_broadcast_fusion_1
116: kCustomKernel  [prev=115 (1) | sink        ] input_scatter_fusion
"""
    assert hints_tools.thunk_figures(sequence) == {
        "thunks": 12,
        "top_level": 3,
        "command_buffers": 2,
        "whiles": 1,
        "conditionals": 1,
    }
    with pytest.raises(ValueError, match="no thunks"):
        hints_tools.thunk_figures("")


def test_reports_are_capped(tmp_path):
    text = "".join(f"line {i}\n" for i in range(200_000))
    assert hints_tools.keep(tmp_path, "a.txt", text) == "a.txt"
    kept = (tmp_path / "a.txt").read_text()
    assert hints_tools.MAX_REPORT_BYTES - 300 < len(kept) <= hints_tools.MAX_REPORT_BYTES
    assert kept.startswith("line 0\n")
    assert kept.endswith("line 199999\n")
    assert "bytes left out]" in kept
    hints_tools.keep(tmp_path, "a.txt.gz", text)
    assert gzip.decompress((tmp_path / "a.txt.gz").read_bytes()).decode() == kept
    size = hints_tools.MAX_REPORT_BYTES + 1
    assert hints_tools.keep(tmp_path, "b.rep", b"x" * size) == f"b.rep not kept: {size} bytes"
    assert not (tmp_path / "b.rep").exists()


# --- who outlives whom ----------------------------------------------------------------------------

TWO_SLEEPERS = "sleep 300 & echo $! $$ > {pids}.part; mv {pids}.part {pids}; wait"


def is_running(pid: int) -> bool:
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def pids_of(path: pathlib.Path) -> list[int]:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, "the command did not start"
        time.sleep(0.02)
    return [int(pid) for pid in path.read_text().split()]


def assert_they_end(pids: list[int]) -> None:
    deadline = time.monotonic() + 20
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline, f"{pids} still run"
        time.sleep(0.02)


@pytest.mark.parametrize("whole_group", [False, True])
def test_nothing_survives_a_case_that_is_killed(whole_group, tmp_path):
    pids = tmp_path / "pids"
    script = textwrap.dedent(f"""
        import pathlib
        from benchmarks.gpu_suite import hints_tools
        command = ["sh", "-c", {TWO_SLEEPERS.format(pids=pids)!r}]
        hints_tools.run(command, pathlib.Path({str(tmp_path / "log")!r}), 300, {{}})
        """)
    case = subprocess.Popen(
        [sys.executable, "-c", script], cwd=hints_tools.ROOT, start_new_session=True
    )
    running = pids_of(pids)
    assert all(map(is_running, running))
    if whole_group:
        os.killpg(case.pid, signal.SIGKILL)
    else:
        case.kill()
    case.wait()
    assert_they_end(running)


def test_nothing_survives_its_time(tmp_path):
    pids = tmp_path / "pids"
    command = ["sh", "-c", TWO_SLEEPERS.format(pids=pids)]
    ran = hints_tools.run(command, tmp_path / "log", 5.0, {})
    assert ran.status is None
    assert_they_end(pids_of(pids))


def test_what_a_command_leaves_running_is_ended(tmp_path):
    pids = tmp_path / "pids"
    command = ["sh", "-c", f"sleep 300 & echo $! > {pids}; echo $GREETING; exit 3"]
    ran = hints_tools.run(command, tmp_path / "log", 60, {"GREETING": "hello"})
    assert (ran.status, ran.output) == (3, "hello\n")
    assert_they_end(pids_of(pids))
