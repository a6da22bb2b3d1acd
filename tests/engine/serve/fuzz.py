"""Requests that schemathesis makes from `/openapi.json`; `make fuzz` runs it.

  python -m tests.engine.serve.fuzz .venv-fuzz/bin/st 120 [seed]

Nothing is answered with an error of the server's own, nor with what the document does not declare,
and nothing hangs; afterwards nothing is left in the engine. Which valid values go together the
document does not say, so that a 400 is always allowed.
"""

import os
import subprocess
import sys
import tempfile

from pallas_paged.engine.serve.parsers.formats import HERMES
from tests.engine.serve.live import live_server
from tests.engine.serve.test_bad_requests import TEMPLATE

KEY = "key"
LEFT_OUT = ("positive_data_acceptance", "negative_data_rejection")
HANGS_S = 60


def main(program: str, seconds: str, seed: str = "0") -> int:
    """Returns schemathesis's exit status."""
    options = {"chat_template": TEMPLATE, "tool_format": HERMES, "api_keys": (KEY,)}
    with live_server(**options) as live, tempfile.TemporaryDirectory() as folder:
        command = [
            *(
                os.path.abspath(program),
                "run",
                f"{live.url}/openapi.json",
                "--phases=coverage,fuzzing",
            ),
            *("--checks=all", f"--exclude-checks={','.join(LEFT_OUT)}", "--continue-on-failure"),
            *(f"--max-time={seconds}", "--max-examples=1000", f"--seed={seed}"),
            *("--header", f"Authorization: Bearer {KEY}", "--header", "X-Request-Timeout: 50"),
            *(f"--request-timeout={HANGS_S}", "--warnings=off", "--no-color"),
        ]
        status = subprocess.run(command, cwd=folder).returncode
        live.assert_idle()
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
