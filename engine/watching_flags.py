"""Flags of programs that run an engine: its log of steps, and a trace of some of them."""

from typing import Any

from absl import flags

_STEP_LOG = flags.DEFINE_string(
    "step_log",
    None,
    "Append a line of JSON to this file for each step (what was in it, where its time went) and "
    "each compilation.",
)
_PROFILE_DIR = flags.DEFINE_string(
    "profile_dir", None, "Write a trace of JAX's profiler to this folder, for XProf or Perfetto."
)
_PROFILE_STEPS = flags.DEFINE_string(
    "profile_steps",
    "20:30",
    "With --profile_dir: the steps to trace, first:end, counted from the engine's start.",
)


def _steps(text: str) -> tuple[int, int]:
    first, end = text.split(":")
    steps = int(first), int(end)
    if not 0 <= steps[0] < steps[1]:
        raise ValueError(text)
    return steps


def _is_valid(text: str) -> bool:
    try:
        _steps(text)
    except ValueError:
        return False
    return True


flags.register_validator(
    "profile_steps", _is_valid, "must be two integers, first:end with 0 <= first < end, like 20:30"
)


def watching_options() -> dict[str, Any]:
    """Returns the fields of `EngineConfig` that the flags set."""
    profile = {}
    if _PROFILE_DIR.value is not None:
        steps = _steps(_PROFILE_STEPS.value)
        profile = {"profile_dir": _PROFILE_DIR.value, "profile_steps": steps}
    return {"step_log": _STEP_LOG.value} | profile
