"""How programs end."""

import pathlib
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


def test_mistakes_of_ours_keep_their_traceback(monkeypatch):
    def main() -> None:
        raise AssertionError("an invariant")

    monkeypatch.setattr(sys, "argv", ["program"])
    with pytest.raises(AssertionError, match="an invariant"):
        command_line.run(main)


def test_every_program_ends_that_way():
    """All but one, which is to run as a copy of its single file."""
    programs = {
        path.relative_to(ROOT).as_posix()
        for layer in ("engine", "models", "benchmarks")
        for path in (ROOT / layer).rglob("*.py")
        if '__name__ == "__main__"' in path.read_text()
    }
    assert {"engine/generate.py", "models/port.py", "benchmarks/latency.py"} < programs
    others = {p for p in programs if "command_line.run(main)" not in (ROOT / p).read_text()}
    assert others == {"models/record_reference.py"}
