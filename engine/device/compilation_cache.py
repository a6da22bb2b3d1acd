"""Where JAX keeps compiled programs: a convenience, which never stops a start."""

import logging
import tempfile
from pathlib import Path

import jax

logger = logging.getLogger(__name__)

_counts = {"/jax/compilation_cache/cache_hits": 0, "/jax/compilation_cache/cache_misses": 0}


def _count(event: str, **_: object) -> None:
    if event in _counts:
        _counts[event] += 1


jax.monitoring.register_event_listener(_count)


def cache_counts() -> str:
    """Returns in words how many programs of this process the cache had; nothing without one."""
    if jax.config.jax_compilation_cache_dir is None or not jax.config.jax_enable_compilation_cache:
        return ""
    hits, misses = _counts.values()
    return f" (compilation cache of this process: {hits} hits, {misses} misses)"


def use_compilation_cache(folder: str | None) -> None:
    """Lets this process keep compiled programs in `folder`; see `EngineConfig`.

    A folder that JAX is configured with already stays, with its settings. One that cannot be
    written to is reported, and nothing is kept.

    Raises:
      ValueError: this process uses another folder.
    """
    current = jax.config.jax_compilation_cache_dir
    if folder is None or (folder == "auto" and current is not None):
        return
    try:
        path = Path.home() / ".cache" / "pallas-paged" if folder == "auto" else Path(folder)
    except RuntimeError as error:  # neither HOME nor an entry for the user
        _warn(str(error))
        return
    if current is not None:
        if Path(current) != path:
            raise ValueError(
                f"compilation_cache_dir={str(path)!r}, but this process already uses {current!r}, "
                "and JAX keeps one folder per process; leave it at 'auto' or choose the same"
            )
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        _warn(f"{path} cannot be written to: {error}")
        return
    logger.info("compiled programs of this process are kept in %s", path)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _warn(reason: str) -> None:
    logger.warning(
        "compiled programs are not kept, and every start compiles anew: %s. Set "
        "compilation_cache_dir to a folder that can be written to, or to None",
        reason.rstrip("."),
    )
