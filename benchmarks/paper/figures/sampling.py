"""Figs. 14 and 15: several samples or beams per prompt, and the blocks that they share."""

import math
from typing import TYPE_CHECKING

from benchmarks.paper.claims import Range, Row
from benchmarks.paper.figures.figure import Curves, Figure, bounds, draw_curve, ratios
from benchmarks.paper.jobs import Job
from benchmarks.paper.scale import Scale, Sources
from benchmarks.simulation.serve import Kind
from benchmarks.simulation.systems import OF_PAPER, ORCA_ORACLE, PAPER, System

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Picture

_KINDS = (
    Kind(),
    *(Kind(count) for count in (2, 4, 6)),
    *(Kind(width, is_beam_search=True) for width in (2, 4, 6)),
)
_GAINS = {
    Kind(): Range("1.3", 1.1, 1.6, 1.3),
    Kind(6, is_beam_search=True): Range.about(2.3, "2.3"),
}
_SAVED = {
    ("alpaca", False): Range("6.1-9.8 %", 6.1, 9.8),
    ("alpaca", True): Range("37.6-55.2 %", 37.6, 55.2),
    ("sharegpt", False): Range("16.2-30.5 %", 16.2, 30.5),
    ("sharegpt", True): Range("44.3-66.3 %", 44.3, 66.3),
}
_NOTES = {
    ("sharegpt", True): "beams die as on Alpaca",
    ("alpaca", False): "by drawn prompts, of which more may fill a block than in the data set",
    ("sharegpt", False): "by drawn prompts",
}
_RATES = {1: (2.0, 80.0), 2: (1.0, 40.0), 4: (0.5, 24.0), 6: (0.3, 16.0)}
_SAVED_RATE = {"alpaca": 12.0, "sharegpt": 0.7}
"""Requests per second, for each sequence, of the runs on which savings are counted."""


def title_of(kind: Kind) -> str:
    """Returns what each request asks for, in words."""
    if kind.num_seqs == 1:
        return "one sample"
    return f"{kind.num_seqs} {'beams' if kind.is_beam_search else 'samples'}"


def kinds(scale: Scale) -> tuple[Kind, ...]:
    """Returns those that are run."""
    return (_KINDS[0], _KINDS[-1]) if scale.name == "quick" else _KINDS


def job(system: System, kind: Kind, scale: Scale, sources: Sources, seed: int) -> Job:
    """Returns the search for a system's sustained rate on Alpaca.

    Beams that share nothing cost what as many samples do.
    """
    if not system.shares:
        kind = Kind(kind.num_seqs)
    return Job(
        system,
        "opt-13b",
        sources.data("alpaca"),
        kind,
        scale.beam_minutes,
        seed,
        _RATES[kind.num_seqs],
        scale.searches + 1,  # from a wider bracket
        limit_s=scale.limit_s,
    )


def saving_job(data: str, kind: Kind, scale: Scale, sources: Sources, seed: int) -> Job:
    """Returns the run at one rate on which savings are counted."""
    return Job(
        PAPER,
        "opt-13b",
        sources.data(data),
        kind,
        scale.beam_minutes,
        seed,
        (_SAVED_RATE[data] / kind.num_seqs,),
        num_requests=20 if scale.name == "quick" else 200,
        limit_s=math.inf,
    )


def jobs(scale: Scale, sources: Sources) -> list[Job]:
    """Returns all searches, and the runs on which savings are counted."""
    systems = OF_PAPER if scale.every_system else (PAPER, ORCA_ORACLE)
    found = [
        job(system, kind, scale, sources, seed)
        for kind in kinds(scale)
        for system in systems
        for seed in scale.few_seeds
    ]
    several = [kind for kind in kinds(scale) if kind.num_seqs > 1]
    return found + [
        saving_job(data, kind, scale, sources, seed)
        for data in _SAVED_RATE
        for kind in several
        for seed in scale.few_seeds
    ]


def rows(scale: Scale, sources: Sources, curves: Curves) -> list[Row]:
    """Returns the gains over Orca (Oracle), then the blocks saved."""
    found = []
    for kind in kinds(scale):
        paged, other = (
            [job(system, kind, scale, sources, seed) for seed in scale.few_seeds]
            for system in (PAPER, ORCA_ORACLE)
        )
        left_out = "beams of the baseline copy nothing" if kind.is_beam_search else ""
        notes = (left_out, bounds([*paged, *other], curves))
        found.append(
            Row(
                "14",
                f"sustained rate / orca-oracle, alpaca, {title_of(kind)}",
                _GAINS.get(kind),
                ratios(paged, other, curves),
                "simulated",
                paged[0].data.source,
                "x",
                "; ".join(filter(None, notes)),
            )
        )
    for data in _SAVED_RATE:
        for kind in kinds(scale):
            if kind.num_seqs == 1:
                continue
            runs = [curves[saving_job(data, kind, scale, sources, s)] for s in scale.few_seeds]
            is_beam = kind.is_beam_search
            found.append(
                Row(
                    "15",
                    f"blocks saved, {data}, {title_of(kind)}",
                    _SAVED[data, is_beam],
                    tuple(100 * run.points[0].outcome.saved_share for run in runs),
                    "simulated",
                    runs[0].job.data.source,
                    " %",
                    _NOTES.get((data, is_beam), ""),
                    "how beams die is" if (data, is_beam) == ("alpaca", True) else "",
                )
            )
    return found


def draw(scale: Scale, sources: Sources, curves: Curves, picture: "Picture") -> None:
    """Draws gains and savings, of the first seed."""
    left, middle, right = picture.subplots(1, 3)
    seed = scale.seeds[0]
    for kind in (kinds(scale)[0], kinds(scale)[-1]):
        for system, style in ((PAPER, "-"), (ORCA_ORACLE, "--")):
            curve = curves[job(system, kind, scale, sources, seed)]
            draw_curve(left, curve, f"{system.name}, {title_of(kind)}", linestyle=style)
    left.legend(fontsize="x-small")
    for kind in kinds(scale):
        pair = [job(system, kind, scale, sources, seed) for system in (PAPER, ORCA_ORACLE)]
        (gain,) = ratios(pair[:1], pair[1:], curves)
        middle.bar(title_of(kind), gain, color="tab:red")
    middle.set(ylabel="sustained rate / orca-oracle", title="Fig. 14, alpaca: simulated")
    for place, data in enumerate(_SAVED_RATE):
        several = [kind for kind in kinds(scale) if kind.num_seqs > 1]
        saved = [
            100 * curves[saving_job(data, kind, scale, sources, seed)].points[0].outcome.saved_share
            for kind in several
        ]
        places = [index + 0.4 * place for index in range(len(several))]
        right.bar(places, saved, width=0.4, label=data)
        right.set_xticks(places, [title_of(kind) for kind in several])
    right.set(ylabel="blocks saved, %", title="Fig. 15: simulated")
    right.legend(fontsize="small")
    for axes in (middle, right):
        axes.tick_params(axis="x", labelrotation=30)


FIGURE = Figure(("14", "15"), "fig14-fig15-sampling", jobs, rows, draw, (14, 4.5))
