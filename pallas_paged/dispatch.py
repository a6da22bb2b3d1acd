"""Which implementation of an operation runs: the one the caller names, or one chosen and logged.

Every operation keeps a table from implementation name to function, in order of preference; a new
backend is one more entry.
"""

import functools
import logging
from collections.abc import Collection

import jax

KNOWN_IMPLEMENTATIONS = ("mosaic_gpu", "xla", "reference")
"""Every name that may be asked for; an operation offers some of them."""

_logger = logging.getLogger(__name__)


def choose_implementation(
    operation: str, offered: Collection[str], requested: str | None = None
) -> str:
    """Returns the name of the implementation that `operation` runs.

    Args:
      operation: the operation's name, for messages.
      offered: the names of its implementations, the preferred one first.
      requested: the name the caller asks for; None lets the operation choose, which is logged once
        per process and choice.

    Raises:
      ValueError: `requested` is no implementation's name.
      NotImplementedError: `operation` has no such implementation.
    """
    if requested is None:
        choice = next(iter(offered))
        _log_choice(operation, choice, jax.default_backend())
        return choice
    if requested not in KNOWN_IMPLEMENTATIONS:
        raise ValueError(
            f"{operation}: implementation={requested!r} is unknown; "
            f"use None or one of {', '.join(map(repr, offered))}"
        )
    if requested not in offered:
        raise NotImplementedError(
            f"{operation} has no {requested!r} implementation in this version; "
            f"use implementation=None or one of {', '.join(map(repr, offered))}"
        )
    return requested


@functools.cache
def _log_choice(operation: str, choice: str, platform: str) -> None:
    _logger.info("%s runs as %r on %s (automatic choice)", operation, choice, platform)
