"""Runs a command, and ends it and all that it started once nobody holds the standard input open.

  python -m benchmarks.gpu_suite.guard COMMAND [ARGUMENT ...]

Whoever starts it, in a session of its own, keeps a pipe to its standard input: when that process
ends, be it killed, the pipe closes. No jax here.
"""

import os
import signal
import subprocess
import sys
import threading


def _end_with_owner() -> None:
    """Waits for the end of the standard input; then kills the process group, itself with it."""
    while os.read(0, 4096):
        pass
    os.killpg(0, signal.SIGKILL)


def main() -> int:
    """Returns the command's exit status, 128 + the signal's number if one ended it."""
    threading.Thread(target=_end_with_owner, daemon=True).start()
    status = subprocess.run(sys.argv[1:], stdin=subprocess.DEVNULL, check=False).returncode
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
