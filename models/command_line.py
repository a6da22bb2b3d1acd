"""How the command-line programs begin, and end when something is wrong: one line, status 2."""

import ctypes
import importlib.util
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import jax
from absl import app, flags

_OF_THE_USER = (ValueError, OSError, ImportError, NotImplementedError)
"""What the package raises for what a caller got wrong; anything else is a mistake of ours."""
_NO_CUDA_DEVICE = (34, 100)
"""What CUDA's driver answers where it is a stub, or sees no GPU; JAX is to tell of other errors."""


def run(main: Callable[[], None]) -> None:
    """Parses the flags and runs `main`; there are no arguments but flags.

    What the user got wrong is printed to standard error as one line, and the program exits with 2.
    """

    def guarded(argv: Sequence[str]) -> None:
        try:
            settle_jax()
            if len(argv) > 1:
                raise ValueError(f"unexpected arguments {argv[1:]}; all of them are --flag=value")
            main()
        except _OF_THE_USER as error:
            _refuse(str(error))

    app.run(guarded, flags_parser=_parse)


def integers_only(flag: str, form: str) -> None:
    """Refuses values of a flag, a list or a string, that are not written like `form`.

    Args:
      flag: the flag's name.
      form: an example of one value, such as "12/4": integers, each at least 1 in the flag's values.
    """
    pattern = re.sub(r"\d+", r"0*[1-9]\\d*", form)

    def is_like(value: str | list[str]) -> bool:
        values = [value] if isinstance(value, str) else value
        return all(re.fullmatch(pattern, each) for each in values)

    flags.register_validator(flag, is_like, f"must be like {form}, of integers >= 1")


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        _refuse(f"{error}; --help lists the flags")


def _refuse(reason: str) -> NoReturn:
    print("error:", " ".join(reason.split()), file=sys.stderr)
    sys.exit(2)


def settle_jax() -> None:
    """Makes JAX's settings, where nobody has, those of a program that has the machine for itself.

    It may use nine tenths of a GPU, not three quarters; where its CUDA plugin is installed and no
    GPU is there, or none is visible, the CPU; and it tells nothing of platforms that are not there.
    """
    logging.getLogger("jax").setLevel(logging.WARNING)
    settings = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    if not any(name in os.environ for name in settings):
        os.environ[settings[0]] = "0.9"
    if not jax.config.jax_platforms and _has_cuda_plugin() and not _has_cuda_device():
        jax.config.update("jax_platforms", "cpu")


def _has_cuda_plugin() -> bool:
    if importlib.util.find_spec("jax_plugins") is None:
        return False
    names = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")
    return any(importlib.util.find_spec(name) is not None for name in names)


def _has_cuda_device() -> bool:
    try:
        status = ctypes.CDLL("libcuda.so.1").cuInit(0)
    except OSError:
        return False
    return status not in _NO_CUDA_DEVICE
