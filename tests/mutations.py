"""Breaks the code on purpose, one way at a time, and sees the tests fail.

Each mutation replaces one piece of source in a copy of the repository; then the tests that should
notice run there. A mutation that no test notices, or whose source is gone, is an error.
"""

import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent


class Mutation(NamedTuple):
    """One way to break the code, and the tests, separated by spaces, one of which notices."""

    file: str
    old: str
    new: str
    tests: str


def is_noticed(mutation: Mutation) -> bool:
    """Returns whether a test fails with the mutation applied to a copy of the repository."""
    source = (ROOT / mutation.file).read_text()
    assert source.count(mutation.old) == 1, f"{mutation.old!r} is not once in {mutation.file}"
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder)
        for name in ("pallas_paged", "benchmarks", "tests"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, copy / name, ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", copy)
        (copy / mutation.file).write_text(source.replace(mutation.old, mutation.new))
        command = [sys.executable, "-m", "pytest", *mutation.tests.split(), "-q", "-x"]
        command.append("--hypothesis-profile=no-shrinking")
        try:
            done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=600)
        except subprocess.TimeoutExpired:
            return True  # it hangs
    assert done.returncode <= 1, done.stdout + done.stderr
    return done.returncode != 0  # below 0 it crashed


def run(mutations: Mapping[str, Mutation], names: Sequence[str]) -> int:
    """Tries the mutations, or those of some names; returns 1 if one was not noticed."""
    chosen = {name: mutations[name] for name in names or mutations}
    missed = []
    for name, mutation in chosen.items():
        noticed = is_noticed(mutation)
        print(f"{'noticed' if noticed else 'MISSED '}  {name}", flush=True)
        missed += [] if noticed else [name]
    print(f"{len(chosen) - len(missed)} of {len(chosen)} mutations noticed")
    return bool(missed)
