"""How programs end."""

import functools
import logging
import pathlib
import subprocess
import sys
import types

import pytest
from absl import flags

from pallas_paged.models import command_line

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_flags(monkeypatch):
    """Those of programs that other tests import in this process, some of them required."""
    alone = types.SimpleNamespace(FLAGS=flags.FlagValues(), Error=flags.Error)
    monkeypatch.setattr(command_line, "flags", alone)
    app = types.SimpleNamespace(run=lambda main, flags_parser: main(flags_parser(sys.argv)))
    monkeypatch.setattr(command_line, "app", app)
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.9")  # or it is set, and stays


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("a\n  b"), "error: a b\n"),
        (FileNotFoundError("no such file"), "error: no such file\n"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "why"), "error: 'utf-8' codec can't decode "),
        (ImportError("needs torch"), "error: needs torch\n"),
        (NotImplementedError("no kernel"), "error: no kernel\n"),
    ],
)
def test_what_the_user_got_wrong_is_one_line(error, line, monkeypatch, capsys):
    def main() -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["program"])
    with pytest.raises(SystemExit) as ended:
        command_line.run(main)
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(line)
    assert (shown.err.count("\n"), shown.out) == (1, "")


def test_there_are_no_arguments_but_flags(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["program", "word"])
    with pytest.raises(SystemExit) as ended:
        command_line.run(lambda: None)
    assert ended.value.code == 2
    assert "error: unexpected arguments ['word']" in capsys.readouterr().err


def test_a_wrong_flag_is_one_line_too(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["program", "--no_such_flag=3"])
    with pytest.raises(SystemExit) as ended:
        command_line.run(lambda: None)
    assert ended.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: Unknown command line flag 'no_such_flag'")
    assert shown.count("\n") == 1


def test_the_program_that_is_a_file_of_its_own_says_so_in_one_line_too():
    program = str(ROOT / "models" / "record_reference.py")
    for wrong in (["--no_such_flag=3"], [], ["--hf_dir=a", "--out=b", "--num_greedy=0"]):
        done = subprocess.run([sys.executable, program, *wrong], capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert (done.stderr.count("\n"), done.stdout) == (1, "")


@pytest.mark.parametrize(
    ("value", "is_right"),
    [("12/4", True), ("8/8,16/2", True), ("x", False), ("12", False), ("12/0", False)],
)
def test_lists_of_integers_are_checked_with_the_flags(value, is_right):
    values = flags.FlagValues()
    flags.DEFINE_list("heads", ["12/4"], "Heads.", flag_values=values)
    command_line.flags.register_validator = functools.partial(
        flags.register_validator, flag_values=values
    )
    command_line.integers_only("heads", "12/4")
    if is_right:
        values(["program", f"--heads={value}"])
    else:
        with pytest.raises(flags.Error, match=r"--heads=.* must be like 12/4, of integers >= 1"):
            values(["program", f"--heads={value}"])


def test_jax_tells_nothing_of_platforms_that_are_not_there(monkeypatch):
    logger = logging.getLogger("jax")
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    monkeypatch.setattr(sys, "argv", ["program"])
    command_line.run(lambda: None)
    assert not logging.getLogger("jax._src.xla_bridge").isEnabledFor(logging.INFO)


def test_mistakes_of_ours_keep_their_traceback(monkeypatch):
    def main() -> None:
        raise AssertionError("an invariant")

    monkeypatch.setattr(sys, "argv", ["program"])
    with pytest.raises(AssertionError, match="an invariant"):
        command_line.run(main)


@pytest.mark.parametrize(
    ("status", "platforms"), [(0, None), (100, "cpu"), (34, "cpu"), (999, None), (None, "cpu")]
)
def test_the_cpu_is_for_machines_without_a_gpu_that_is_visible(monkeypatch, status, platforms):
    """`CUDA_VISIBLE_DEVICES=` hides all of them, and the driver stays; 999 is a broken one."""

    def load(name: str) -> types.SimpleNamespace:
        if status is None:
            raise OSError(f"{name}: cannot open shared object file")
        return types.SimpleNamespace(cuInit=lambda flags: status)

    config = types.SimpleNamespace(jax_platforms=None)
    config.update = lambda name, value: setattr(config, name, value)
    monkeypatch.setattr(command_line, "jax", types.SimpleNamespace(config=config))
    monkeypatch.setattr(command_line, "ctypes", types.SimpleNamespace(CDLL=load))
    monkeypatch.setattr(command_line, "_has_cuda_plugin", lambda: True)
    monkeypatch.setattr(sys, "argv", ["program"])
    command_line.run(lambda: None)
    assert config.jax_platforms == platforms


def test_every_program_ends_that_way():
    """All but one that is to run as a copy of its single file, two that run without JAX, and
    lm_eval's own program.

    And the drivers of `benchmarks.peers`, which run in environments that have nothing of ours.
    """
    programs = {
        path.relative_to(ROOT).as_posix()
        for layer in ("engine", "models", "benchmarks")
        for path in (ROOT / layer).rglob("*.py")
        if '__name__ == "__main__"' in path.read_text()
        and not path.is_relative_to(ROOT / "benchmarks" / "peer_engines")
    }
    assert {"engine/generate.py", "models/port.py", "benchmarks/latency.py"} < programs
    others = {p for p in programs if "command_line.run(main)" not in (ROOT / p).read_text()}
    assert others == {
        "engine/evaluation/__main__.py",
        "models/record_reference.py",
        "benchmarks/gpu_suite/check_triton_paged.py",
        "benchmarks/gpu_suite/guard.py",
    }
