"""Interrupts that arrive where Python drops what is raised."""

import subprocess
import sys

import pytest

IN_THE_COLLECTOR = "import gc; gc.callbacks.append(terminate_once); gc.collect()"
IN_A_DESTRUCTOR = """
class Ends:
    def __del__(self):
        terminate_once()
Ends()
"""
PROGRAM = """
import os, signal, sys, time
from benchmarks import interrupts

def terminate_once(*_):
    global is_terminated
    if not is_terminated:
        is_terminated = True
        os.kill(os.getpid(), signal.SIGTERM)

is_terminated = False
{install}
try:
    {where}
    print("lost at first", flush=True)
    time.sleep(60)
except {error}:
    print("ended")
"""
KINDS = {
    "KeyboardInterrupt": "interrupts.interrupt_on_sigterm()",
    "SystemExit": "interrupts.interrupt_on_sigterm(lambda *_: sys.exit(3))",
}


@pytest.mark.parametrize("error", KINDS)
@pytest.mark.parametrize("where", [IN_THE_COLLECTOR, IN_A_DESTRUCTOR])
def test_an_interrupt_that_python_drops_is_raised_again(where, error):
    where = where.strip().replace("\n", "\n    ")
    program = PROGRAM.format(where=where, error=error, install=KINDS[error])
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout == "lost at first\nended\n"
    assert not done.stderr


def test_other_errors_there_are_printed_as_ever():
    program = PROGRAM.format(
        where="Ends = type('Ends', (), {'__del__': lambda self: 1 // 0}); Ends()",
        error="KeyboardInterrupt",
        install=KINDS["KeyboardInterrupt"],
    ).replace("time.sleep(60)", "pass")
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout == "lost at first\n"
    assert "ZeroDivisionError" in done.stderr
