"""How the command-line programs end when something is wrong: one line, and status 2."""

import sys
from collections.abc import Callable, Sequence

from absl import app

_OF_THE_USER = (ValueError, OSError, ImportError, NotImplementedError)
"""What the package raises for what a caller got wrong; anything else is a mistake of ours."""


def run(main: Callable[[], None]) -> None:
    """Parses the flags and runs `main`; there are no arguments but flags.

    What the user got wrong is printed to standard error as one line, and the program exits with 2.
    """

    def guarded(argv: Sequence[str]) -> None:
        try:
            if len(argv) > 1:
                raise ValueError(f"unexpected arguments {argv[1:]}; all of them are --flag=value")
            main()
        except _OF_THE_USER as error:
            print("error:", " ".join(str(error).split()), file=sys.stderr)
            sys.exit(2)

    app.run(guarded)
