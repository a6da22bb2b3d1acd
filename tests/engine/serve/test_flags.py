"""The program's flags: what is wrong is said before a model is loaded, and templates are found."""

import subprocess
import sys
from pathlib import Path

import pytest

from pallas_paged.engine.serve.templates import choose_template
from tests.programs import run_program

PROGRAM = "pallas_paged.engine.serve"
TEMPLATE = "{% for m in messages %}{{ m.content }}<think>{% endfor %}"


def test_the_help_has_what_a_server_needs() -> None:
    done = run_program(PROGRAM, "--help")
    for flag in ("model", "port", "num_blocks", "served_model_name", "api_key", "max_num_seqs"):
        assert f"--{flag}:" in done.stdout
    assert "python -m pallas_paged.engine.serve --model=FOLDER" in done.stdout


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--prt=1", "prt"),
        ("--port=99999", "port"),
        ("--host=no.such.host.invalid", "--host=no.such.host.invalid --port=8000 cannot be used"),
        ("--model=/nowhere", "no folder /nowhere"),
        ("--request_timeout_s=0", "--request_timeout_s=0.0 must be above 0"),
        ("--shutdown_grace_s=-1", "--shutdown_grace_s=-1.0 must be at least 0"),
        ("--max_queued_requests=0", "max_queued_requests=0 must be at least 1"),
        ("--chat_template=nothing", "--chat_template='nothing' is no file"),
        ("more", "unexpected arguments"),
    ],
)
def test_what_is_wrong_is_one_line(flag: str, said: str) -> None:
    done = run_program(PROGRAM, flag)
    assert done.returncode == 2
    *_, last = done.stderr.splitlines()
    assert last.startswith("error: ")
    assert said in last
    assert "Traceback" not in done.stderr


def test_a_template_is_a_file_a_text_or_a_name(tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text(TEMPLATE)
    assert choose_template(str(file), "own") == (TEMPLATE, TEMPLATE)
    assert choose_template(TEMPLATE, None) == (TEMPLATE, TEMPLATE)
    several = {"default": "one", "tool_use": "two"}
    assert choose_template("tool_use", several) == ("tool_use", "two")
    assert choose_template(None, several) == (None, "one\ntwo")
    assert choose_template(None, "own") == (None, "own")
    assert choose_template(None, None) == (None, None)
    with pytest.raises(ValueError, match="which has default, tool_use"):
        choose_template("other", several)


def test_a_package_that_is_lacking_is_named() -> None:
    code = (
        "import runpy, sys; sys.modules['uvloop'] = None;"
        "runpy.run_module('pallas_paged.engine.serve', run_name='__main__', alter_sys=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "error: the server needs uvloop: pip install 'pallas-paged[serve]'\n"
