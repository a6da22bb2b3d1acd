"""Runs programs of ours as a user does, but for the import of other people's libraries.

That takes two seconds each time, mostly more than the program. So a process imports them once, and
programs are forked from it: nothing of the package is imported there, no flag defined, no device
started.
"""

import multiprocessing
import os
import pathlib
import runpy
import sys
import tempfile
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent
_LIBRARIES = ["absl.app", "flax.nnx", "jax.numpy", "orbax.checkpoint", "tqdm", "transformers"]
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload([*_LIBRARIES, "tests.frozen"])


class Done(NamedTuple):
    """How a program ended."""

    returncode: int
    stdout: str
    stderr: str


def run_program(module: str, *flags: str, text: str = "", timeout_s: float = 300) -> Done:
    """Runs `python -m module flags` in the repository's root, to its end; it can read `text`."""
    with tempfile.TemporaryDirectory() as folder:
        files = [pathlib.Path(folder, name) for name in ("stdin", "stdout", "stderr")]
        files[0].write_text(text, encoding="utf-8")
        process = _server.Process(target=_run, args=(module, flags, *files))
        process.start()
        process.join(timeout_s)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutError(f"{module} {flags} takes longer than {timeout_s} s")
        stdout, stderr = (file.read_text(encoding="utf-8") for file in files[1:])
    return Done(process.exitcode, stdout, stderr)


def _run(module: str, flags: tuple[str, ...], *files: pathlib.Path) -> None:
    for number, file in enumerate(files):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), number)
    # multiprocessing has put an empty file there.
    sys.stdin = open(0, encoding="utf-8")  # noqa: SIM115
    os.chdir(ROOT)
    sys.argv = [module, *flags]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
