"""The paper's evaluation: pictures, and a table of its figures beside ours.

  python -m benchmarks.paper --all --out=DIR             # 10-minute traces, within half an hour
  python -m benchmarks.paper --quick --out=DIR           # one minute: only orders mean anything
  python -m benchmarks.paper --full --out=DIR            # hours; goes on where it was stopped
  python -m benchmarks.paper --all --figures=12,13a --out=DIR
  python -m benchmarks.paper --all --sharegpt=ShareGPT.json --alpaca=alpaca_data.json \\
      --tokenizer=FOLDER --out=DIR

Two kinds of figures, and each row of the table says which. *Simulated*: this project's scheduler,
block tables, prefix cache and shapes of steps serve the paper's models and traces, and only the
device is replaced, by a model of what a step costs (`benchmarks.simulation`). *Measured*: real
engines on this machine with a small model, where a claim is about policy and not about a chip.
What only a GPU could tell is "unmeasured".

Writes into DIR: summary.txt, summary.md, summary.json (with --figures, by names of their own), a
PNG for each figure, and curves.jsonl, the simulations by which an interrupted run goes on. The same
seed gives the same report, but for what is measured.
"""

import dataclasses
import pathlib
import re
import time

from absl import flags, logging

from benchmarks import pictures
from benchmarks.paper import jobs, measured, report, traces
from benchmarks.paper.claims import Row
from benchmarks.paper.figures.every import FIGURES, NAMES
from benchmarks.paper.scale import SCALES, Scale, Sources
from pallas_paged.models import command_line

_ALL = flags.DEFINE_bool("all", False, "10-minute traces, at most six rates for each curve.")
_FULL = flags.DEFINE_bool("full", False, "Traces of an hour, all baselines: many hours.")
_QUICK = flags.DEFINE_bool("quick", False, "Traces of a minute, few systems.")
_FIGURES = flags.DEFINE_list("figures", [], f"Only these of {', '.join(NAMES)}; without: all.")
_OUT = flags.DEFINE_string("out", None, "Folder for what is found; may have an earlier run's.")
_SEED = flags.DEFINE_integer("seed", 0, "First seed.", lower_bound=0)
_MINUTES = flags.DEFINE_float(
    "minutes", None, "Of each trace, in place of what the scale says.", lower_bound=0.1
)
_LIMIT = flags.DEFINE_float(
    "limit",
    None,
    "Normalized latency up to which a rate is sustained, s/token; without: 0.5, --quick: 0.2.",
    lower_bound=0.01,
)
_JOBS = flags.DEFINE_integer("jobs", 2, "Simulations at a time.", lower_bound=1)
_MEASURE = flags.DEFINE_bool("measure", True, "Also run real engines on this machine.")
_SHAREGPT = flags.DEFINE_string("sharegpt", None, "ShareGPT's JSON file; without: drawn lengths.")
_ALPACA = flags.DEFINE_string("alpaca", None, "Alpaca's JSON file; without: drawn lengths.")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "Folder of the tokenizer for these files.")


def chosen_scale() -> Scale:
    """Returns the flags' scale, with its seeds.

    Raises:
      ValueError: not exactly one is chosen.
    """
    asked = {"all": _ALL.value, "full": _FULL.value, "quick": _QUICK.value}
    names = [name for name, is_asked in asked.items() if is_asked]
    if len(names) != 1:
        raise ValueError("choose one of --quick, --all and --full")
    scale = SCALES[names[0]].from_seed(_SEED.value)
    if _MINUTES.value is not None:
        minutes = _MINUTES.value
        scale = dataclasses.replace(scale, minutes=minutes, beam_minutes=minutes)
    return scale if _LIMIT.value is None else dataclasses.replace(scale, limit_s=_LIMIT.value)


def chosen_sources(folder: pathlib.Path) -> Sources:
    """Returns the flags' data sets, whose lengths are counted into the folder.

    Raises:
      ValueError, FileNotFoundError: see `traces.count_lengths`; or a file has no tokenizer, or a
        tokenizer no file.
    """
    files = {"sharegpt": _SHAREGPT.value, "alpaca": _ALPACA.value}
    given = {name: path for name, path in files.items() if path is not None}
    tokenizer = _TOKENIZER.value
    if tokenizer is None:
        for name, path in given.items():
            raise ValueError(f"--{name}={path} needs --tokenizer, the folder of the model's")
        return Sources()
    if not given:
        raise ValueError("--tokenizer counts the tokens of --sharegpt and --alpaca: give one")
    data = {name: traces.count_lengths(path, tokenizer, folder) for name, path in given.items()}
    return Sources(**data)


def simulate(wanted: set[str], scale: Scale, sources: Sources, folder: pathlib.Path) -> list[Row]:
    """Returns the rows of the simulated figures, whose pictures are drawn too."""
    figures = [figure for figure in FIGURES if wanted & set(figure.names)]
    every = [job for figure in figures for job in figure.jobs(scale, sources)]
    curves = jobs.run_all(every, folder, _JOBS.value)
    if curves:
        print(jobs.slowest(curves.values()), flush=True)
    rows = []
    for figure in figures:
        picture = pictures.new_figure(*figure.size)
        figure.draw(scale, sources, curves, picture)
        pictures.save(picture, str(folder / f"{figure.file}.png"))
        found = figure.rows(scale, sources, curves)
        rows += [row for row in found if row.figure.split(",")[0] in wanted]
    return rows


def _number_of(figure: str) -> int:
    """Returns where a figure stands in the paper; behind all others what is none of the paper's."""
    digits = re.match(r"\d+", figure)
    return int(digits[0]) if digits else 100


def main() -> None:
    """Runs what the flags say, and prints the summary."""
    logging.set_verbosity(logging.WARNING)  # each engine tells its memory, and what it compiles
    scale = chosen_scale()
    unknown = sorted(set(_FIGURES.value) - set(NAMES))
    if unknown:
        raise ValueError(f"figures={','.join(unknown)}: choose among {', '.join(NAMES)}")
    if _OUT.value is None:
        raise ValueError("--out=DIR is missing: where to write what is found")
    wanted = set(_FIGURES.value or NAMES)
    folder = pathlib.Path(_OUT.value)
    folder.mkdir(parents=True, exist_ok=True)
    pictures.new_figure(1, 1)  # refused now, not after all runs
    begin = time.monotonic()
    sources = chosen_sources(folder)
    rows = simulate(wanted, scale, sources, folder)
    head = (
        f"Kwon et al. 2023, --{scale.name}: traces of {scale.minutes:g} minutes (of "
        f"{scale.beam_minutes:g} for several samples or beams), first seed {scale.seeds[0]}; "
        f"ShareGPT: {sources.data('sharegpt').source}, Alpaca: {sources.data('alpaca').source}. A "
        f"rate is sustained up to {scale.limit_s:g} s/token. ± is a 95 % confidence interval over "
        "runs with other seeds."
    )
    name = "-".join(["summary", *sorted(_FIGURES.value)])
    report.write(folder, rows, scale, head, name)  # whatever happens below
    if _MEASURE.value:
        rows += measured.run(wanted, scale)
    rows.sort(key=lambda row: (_number_of(row.figure), row.how))
    print(report.write(folder, rows, scale, head, name))
    print(f"written to {folder} in {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    command_line.run(main)
