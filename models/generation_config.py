"""What a model folder says about generation: the tokens that end it, and how its authors sample."""

import logging
import math
import os
from pathlib import Path
from typing import Any

from pallas_paged.models.checkpoint import model_file, read_json
from pallas_paged.models.config import is_finite

logger = logging.getLogger(__name__)

_GENERATION_CONFIG = "generation_config.json"
_SAMPLING: dict[str, tuple[str, type]] = {
    "temperature": ("temperature", float),
    "top_p": ("top_p", float),
    "top_k": ("top_k", int),
    "min_p": ("min_p", float),
    "repetition_penalty": ("repetition_penalty", float),
    "max_new_tokens": ("max_tokens", int),
}
"""By the name in the file: ours, and the type."""


def load_eos_token_ids(path: str | os.PathLike[str]) -> tuple[int, ...]:
    """Returns the ids of the tokens that end a sequence of the model in the folder `path`.

    They are `eos_token_id` in `generation_config.json`, or where that is missing in `config.json`;
    empty if neither has any. Ids that no token has are left out, and logged: files use -1 for none,
    and an id beyond the vocabulary is one that never comes.

    Raises:
      FileNotFoundError: no such folder, or no `config.json` in it.
      ValueError: `eos_token_id` is neither an integer nor a list of integers.
    """
    config_file = model_file(path, "config.json")
    config = read_json(config_file)
    for file, values in (
        (config_file.with_name(_GENERATION_CONFIG), _generation_config(config_file)),
        (config_file, config),
    ):
        eos = values.get("eos_token_id")
        if eos is not None:
            ids = eos if isinstance(eos, list) else [eos]
            if not all(type(token) is int for token in ids):
                raise ValueError(f"{file}: eos_token_id={eos!r} must be an integer or a list")
            return _tokens(file, ids, config.get("vocab_size"))
    return ()


def load_sampling_defaults(path: str | os.PathLike[str]) -> dict[str, float | int]:
    """Returns how the authors of the model in the folder `path` advise to sample.

    The fields are those of `generation_config.json` that vLLM takes defaults from, by the names of
    `SamplingParams`: `temperature`, `top_p`, `min_p` and `repetition_penalty`, which are floats,
    `top_k` and `max_tokens` (`max_new_tokens` in the file), which are integers. What is absent or
    null in the file is absent here; without the file nothing is here. Only types are checked, not
    ranges.

    `do_sample` is not read, as in vLLM: a file with `do_sample` false and no `temperature` gives no
    temperature, and a temperature is given whatever `do_sample` is.

    Raises:
      FileNotFoundError: no such folder, or no `config.json` in it.
      ValueError: a field of another type, or a number that is not finite.
    """
    config_file = model_file(path, "config.json")
    file = config_file.with_name(_GENERATION_CONFIG)
    defaults: dict[str, float | int] = {}
    for name, value in _generation_config(config_file).items():
        if name not in _SAMPLING or value is None:
            continue
        ours, kind = _SAMPLING[name]
        if not is_finite(value) or (kind is int and not isinstance(value, int)):
            what = "an integer" if kind is int else "a finite number"
            raise ValueError(f"{file}: {name}={value!r:.80} must be {what}")
        defaults[ours] = kind(value)
    return defaults


def _generation_config(config_file: Path) -> dict[str, Any]:
    file = config_file.with_name(_GENERATION_CONFIG)
    return read_json(file) if file.exists() else {}


def _tokens(file: Path, ids: list[int], vocab_size: Any) -> tuple[int, ...]:
    """Returns those ids that a token can have."""
    end = vocab_size if type(vocab_size) is int else math.inf
    kept = tuple(token for token in ids if 0 <= token < end)
    if left := [token for token in ids if token not in kept]:
        logger.warning(
            "%s: no token of the vocabulary of %s has the eos_token_id %s, so it ends nothing",
            file,
            vocab_size,
            ", ".join(map(str, left)),
        )
    return kept
