"""The command line as a user meets it: prompts from everywhere, and what is wrong said clearly."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.models.references import DATA
from tests.programs import run_program

ROOT = pathlib.Path(__file__).parents[2]
TINY = ["--max_tokens=8", "--num_blocks=40", "--max_model_len=128", "--temperature=0"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Keeps what the programs compile, as the user's home would."""
    return tmp_path_factory.mktemp("home")


def environment(home: pathlib.Path) -> dict[str, str]:
    return {
        "HOME": str(home),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": os.environ["XLA_FLAGS"],
        "PATH": "/usr/bin:/bin",
        "COLUMNS": "100",
    }


def test_standard_input_is_completed_with_the_demo_model(cache: pathlib.Path) -> None:
    """Nobody told JAX on which platform: that there is no TPU, proxy or GPU is no news."""
    prompt = "class Stack:\n    def"
    variables = {k: v for k, v in environment(cache).items() if k != "JAX_PLATFORMS"}
    program = [sys.executable, "-m", "pallas_paged.engine.generate", *TINY]
    done = subprocess.run(
        program, input=prompt, capture_output=True, text=True, env=variables, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(prompt)
    assert len(done.stdout) > len(f"{prompt}\n")
    lines = [line for line in done.stderr.splitlines() if not line.startswith("compiling ")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("8 tokens in")


def test_prompts_are_the_lines_of_a_file_and_of_standard_input(tmp_path: pathlib.Path) -> None:
    generate = functools.partial(run_program, "pallas_paged.engine.generate", *TINY)
    lines = "import os\n\nclass Stack:\n"
    (tmp_path / "prompts.txt").write_text(lines)
    from_file = generate(f"--prompts_file={tmp_path / 'prompts.txt'}")
    assert from_file.returncode == 0, from_file.stderr
    assert "=== 0: 'import os'" in from_file.stdout
    assert "=== 1: 'class Stack:'" in from_file.stdout
    bare = generate("--noecho", "--prompts_file=-", text=lines)
    assert bare.returncode == 0, bare.stderr
    labels = ("=== 0: 'import os'", "=== 0"), ("=== 1: 'class Stack:'", "=== 1")
    assert bare.stdout == functools.reduce(
        lambda s, pair: s.replace(*pair), labels, from_file.stdout
    )


def test_the_chat_template_is_used() -> None:
    done = run_program("pallas_paged.engine.generate", "--chat", "--prompt=Read a file.", *TINY)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


WRONG = [
    (["--model=/nowhere", "--prompt=a"], "", "/nowhere"),
    ([f"--model={DATA / 'opt-prenorm'}", "--prompt=a"], "", "has no tokenizer files"),
    (["--prompt=a", "--min_tokens=200"], "", "min_tokens=200 must be at most max_tokens=128"),
    (["--prompt=a", "--temperature=nan"], "", "temperature=nan"),
    (["--prompt=a", "--max_model_len=100000"], "", "max_model_len=100000"),
    (["--prompt=a", "--max_tokens=600"], "", "max_tokens=600"),
    (["--prompt=a", "--prompts_file=x"], "", "--prompt and --prompts_file"),
    ([], "", "standard input is empty"),
    ([], "ab\udcff", "standard input is not UTF-8: byte 0xff at 2; convert it first"),
    (["--prompts_file=-"], "\udcfe", "standard input is not UTF-8: byte 0xfe at 0"),
    ([f"--prompts_file={__file__}.none"], "", "No such file"),
    (["--prompts_file=/bin/sh"], "", "--prompts_file=/bin/sh is not UTF-8"),
    (["--prompt=a\udcff"], "", "--prompt holds '\\udcff' at character 1, half of a"),
    (["--prompt=a", "--stop=\udcff"], "", "stop=['\\udcff'] holds"),
    (["--prompt=a", "--chat_template=x"], "", "--chat_template is for messages; add --chat"),
    (["--prompt=a", "--chat", "--chat_template=x"], "", "chat_template='x' is neither"),
    (["a prompt"], "", "unexpected arguments ['a prompt']"),
]


def test_standard_input_may_be_closed() -> None:
    command = f'exec "{sys.executable}" -m pallas_paged.engine.generate <&-'
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.startswith("error: standard input is empty")


FORKED = """
import gc, json, os, sys
from pallas_paged.engine import generate
from pallas_paged.models import command_line
gc.collect()
gc.freeze()  # or each fork walks through all of it when it ends
for index, (flags, text) in enumerate(json.load(open("cases.json"))):
    open(f"{index}.in", "w", errors="surrogateescape").write(text)
    if not os.fork():
        for fd, name in enumerate(("in", "out", "err")):
            os.dup2(os.open(f"{index}.{name}", os.O_CREAT | os.O_RDWR), fd)
        sys.argv = ["generate", *flags]
        command_line.run(generate.main)
    open(f"{index}.rc", "w").write(str(os.waitstatus_to_exitcode(os.wait()[1])))
"""


@pytest.fixture(scope="module")
def ends(cache: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Runs all of `WRONG` with one import, and returns a folder with what came of each."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "cases.json").write_text(json.dumps([case[:2] for case in WRONG]))
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED],
        cwd=folder,
        env=environment(cache) | {"PYTHONPATH": str(ROOT)},
        check=True,
        timeout=300,
    )
    return folder


@pytest.mark.parametrize("index", range(len(WRONG)), ids=lambda i: f"{i}: {WRONG[i][2]}")
def test_what_is_wrong_is_said_in_one_line(index: int, ends: pathlib.Path) -> None:
    code, out, errors = ((ends / f"{index}.{name}").read_text() for name in ("rc", "out", "err"))
    assert code == "2", errors
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert WRONG[index][2] in errors
    assert out == ""


def test_help_lists_the_flags() -> None:
    done = run_program("pallas_paged.engine.generate", "--help")
    for flag in (
        "--model",
        "--prompt",
        "--prompts_file",
        "--temperature",
        "--[no]chat",
        "--chat_template",
    ):
        assert flag in done.stdout


def test_the_demo_streams_and_reports() -> None:
    flags = "--max_tokens=12", "--prompt=import os", "--prompt=def f("
    done = run_program("pallas_paged.engine.demo", *flags)
    assert done.returncode == 0, done.stderr
    assert "KV pool" in done.stdout
    assert "tokens/s in one batch" in done.stdout
