"""Measures the time from the start of a process to a request's first token, and what it is made of.

  python -m benchmarks.startup                             # the demo model
  python -m benchmarks.startup --random_model=smollm2      # random weights, nothing read from disk

`empty` has empty caches of compiled programs, JAX's and Numba's, as the first start after an
installation; `full` finds in them what `empty` left. With --bundle there is also a start with a
bundle of compiled programs, made by `pallas_paged.engine.compile`, and Numba's cache as it left
it. Each start is a process of its own, imports included; medians of `repeats` turns.
"""

import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from absl import flags

from benchmarks import random_models, tables
from pallas_paged.models import command_line
from pallas_paged.models.demo import DEMO_MODEL

_MODEL = flags.DEFINE_string("model", str(DEMO_MODEL), "Folder with a checkpoint.")
_RANDOM_MODEL = flags.DEFINE_enum(
    "random_model", None, list(random_models.CONFIGS), "Instead of --model: random weights."
)
_PROMPT_LEN = flags.DEFINE_integer("prompt_len", 20, "Tokens of the prompt.", lower_bound=1)
_BUNDLE = flags.DEFINE_boolean(
    "bundle", False, "Also start with a bundle, which takes some minutes to make."
)
_MAX_NUM_SEQS = flags.DEFINE_integer(
    "max_num_seqs", None, "Most sequences that run at once, by default the engine's.", lower_bound=1
)
_MAX_NUM_BATCHED_TOKENS = flags.DEFINE_integer(
    "max_num_batched_tokens", None, "Most tokens of a step, likewise.", lower_bound=1
)
_REPEATS = flags.DEFINE_integer("repeats", 3, "Starts of each kind.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "Also write the figures to this file.")

_PROGRAM = """
import json, sys, time
began = time.time() - float(sys.argv[1])
from pallas_paged.engine import LLM, SamplingParams
imported = time.time() - float(sys.argv[1])
limits = json.loads(sys.argv[6])
llm = LLM(sys.argv[2], load_format=sys.argv[3], bundle=sys.argv[5] or None, **limits)
loaded = time.time() - float(sys.argv[1])
prompt = {"prompt_token_ids": [5] * int(sys.argv[4])}
next(llm.stream(prompt, SamplingParams(temperature=0, max_tokens=2)))
first = time.time() - float(sys.argv[1])
print(json.dumps({"python": began, "imports": imported - began, "LLM": loaded - imported,
                  "first token": first - loaded, "all": first}))
"""


def start(model: str, load_format: str, caches: str, bundle: str = "") -> dict[str, float]:
    """Returns the seconds of a start with compiled programs kept in a folder, or in a bundle.

    Raises:
      ValueError: the program failed; the message is its last line.
    """
    arguments = [repr(time.time()), model, load_format, str(_PROMPT_LEN.value), bundle]
    arguments.append(json.dumps(_limits()))
    text = _run(["-c", _PROGRAM, *arguments], caches)
    figures: dict[str, float] = json.loads(text.strip().splitlines()[-1])
    return figures


def make_bundle(model: str, caches: str) -> str:
    """Returns a new folder with a bundle for this machine's CPU; `ValueError` as `start`."""
    folder = f"{caches}/bundle"
    flags = [f"--model={model}", "--target=cpu", f"--output={folder}"]
    flags += [f"--{name}={value}" for name, value in _limits().items()]
    _run(["-m", "pallas_paged.engine.compile", *flags], caches)
    return folder


def _limits() -> dict[str, int]:
    """Returns the engine's limits that were given."""
    given = (_MAX_NUM_SEQS, _MAX_NUM_BATCHED_TOKENS)
    return {flag.name: flag.value for flag in given if flag.value is not None}


def _run(arguments: list[str], caches: str) -> str:
    """Runs Python with caches in a folder; returns what it prints."""
    folders = {"JAX_COMPILATION_CACHE_DIR": f"{caches}/jax", "NUMBA_CACHE_DIR": f"{caches}/numba"}
    settings = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | folders | settings,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ValueError(f"a start failed: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout


def measure() -> list[dict[str, Any]]:
    """Returns a row with seconds for each kind of start."""
    found: dict[str, list[dict[str, float]]] = {"empty": [], "full": []}
    with contextlib.ExitStack() as stack:
        model, load_format = _MODEL.value, "auto"
        if _RANDOM_MODEL.value is not None:
            model, load_format = stack.enter_context(tempfile.TemporaryDirectory()), "dummy"
            random_models.write_config(_RANDOM_MODEL.value, pathlib.Path(model))
        bundle = ""
        if _BUNDLE.value:
            of_bundle = stack.enter_context(tempfile.TemporaryDirectory())
            bundle = make_bundle(model, of_bundle)
            found["bundle"] = []
        for _ in range(_REPEATS.value):
            with tempfile.TemporaryDirectory() as caches:
                for kind in ("empty", "full"):
                    found[kind].append(start(model, load_format, caches))
            if bundle:
                found["bundle"].append(start(model, load_format, of_bundle, bundle))
    return [
        {"caches": kind, **{name: statistics.median(t[name] for t in times) for name in times[0]}}
        for kind, times in found.items()
    ]


def main() -> None:
    """Prints the table."""
    rows = measure()
    name = _MODEL.value if _RANDOM_MODEL.value is None else f"random {_RANDOM_MODEL.value}"
    tables.show(f"seconds until the first token, {name}", rows)
    if _JSON.value:
        pathlib.Path(_JSON.value).write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    command_line.run(main)
