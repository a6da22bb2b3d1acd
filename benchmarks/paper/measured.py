"""What the claims are about policy for: real engines on this machine, a small model, ratios.

Each comparison runs the same requests through the same model and pool in turns, once per seed.
Weights are random, tokens greedy, EOS ignored. Seconds depend on the machine, which is not the
paper's, and a CPU gains less by larger batches than a GPU: the order of the systems is what can be
compared, and the ratios say what paging is worth here.
"""

import dataclasses
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks import beam_runs, random_models, workloads
from benchmarks.drive import BASELINES, baseline_engine, drive
from benchmarks.paper.claims import Range, Row
from benchmarks.paper.scale import Scale
from benchmarks.recovery_costs import engine_for, measure_costs
from benchmarks.simulation.calibration import calibrate
from benchmarks.simulation.calibration import make_llm as make_timed_llm
from benchmarks.workloads import Workload
from pallas_paged.engine import LLM, RequestOutputKind, SamplingParams
from pallas_paged.engine.kv.sharing import blocks_for

MODEL = "20m"
MAX_MODEL_LEN = 512
NUM_PLACES = 6
"""How many of the longest sequences the pool holds."""
LENGTH_SCALE = 0.25
NUM_OUTPUT = 32
NUM_PREFIX = 192
_ORDER = Range.order("above 1")
COST_MODEL = "cost"
"""In the place of a figure: the simulation's cost model."""
MEASURED = ("12", "13", "14", "15", "16", "18a", "18b", "19", COST_MODEL)
"""Figures of which something is measured here."""


def run(wanted: Collection[str], scale: Scale) -> list[Row]:
    """Returns the summary's rows of the wanted figures, a value per seed."""
    seeds, count, sizes = scale.measured_seeds, scale.measured_requests, scale.block_sizes
    parts: dict[tuple[str, ...], Callable[[str], list[Row]]] = {
        ("12", "13"): lambda folder: throughput(folder, seeds, count),
        ("14", "16"): lambda folder: sharing(folder, seeds, count),
        ("15",): lambda folder: beams(seeds, max(4, count // 4)),
        ("18a",): lambda folder: kernel(),
        ("18b",): lambda folder: by_block_size(folder, seeds, count, sizes),
        ("19",): lambda folder: recovery(folder, seeds, sizes),
        (COST_MODEL,): lambda folder: cost_model(folder, seeds, count),
    }
    assert {name for names in parts for name in names} == set(MEASURED)
    chosen = [part for names, part in parts.items() if not set(names).isdisjoint(wanted)]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        random_models.write_config(MODEL, pathlib.Path(folder))
        for part in tqdm(chosen, unit="comparison", disable=None):
            rows += part(folder)
    return [row for row in rows if row.figure in wanted]


def make_llm(folder: str, *, block_size: int = 16, **options: Any) -> LLM:
    """Returns an engine whose pool holds `NUM_PLACES` of the longest sequences, compiled."""
    fixed: dict[str, Any] = {
        "load_format": "dummy",
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": 32,
        "max_num_batched_tokens": 512,
        "num_blocks": 1 + NUM_PLACES * blocks_for(MAX_MODEL_LEN, block_size),
        "enable_prefix_caching": False,
    }
    llm = LLM(folder, block_size=block_size, **fixed | options)
    llm.runner.programs.compile(bucket for bucket in llm.runner.buckets.all() if bucket.is_common)
    return llm


def make_workload(num_requests: int, seed: int) -> Workload:
    """Returns requests with a quarter of ShareGPT's lengths."""
    vocab_size = random_models.CONFIGS[MODEL]["vocab_size"]
    return workloads.draw(
        "sharegpt",
        num_requests,
        scale=LENGTH_SCALE,
        max_model_len=MAX_MODEL_LEN,
        vocab_size=vocab_size,
        seed=seed,
    )


def throughput(folder: str, seeds: Sequence[int], num_requests: int) -> list[Row]:
    """Paging beside the baselines: output tokens per second, all requests there at the start."""
    llm = make_llm(folder)
    _serve(llm, make_workload(8, 99), "paged")  # first touches of memory cost extra
    ratios: dict[str, list[float]] = {name: [] for name in BASELINES}
    running: dict[str, list[float]] = {name: [] for name in ("paged", *BASELINES)}
    for seed in seeds:
        workload = make_workload(num_requests, seed)
        seconds = {}
        for name in ("paged", *BASELINES):
            llm.engine.core.reset()
            seconds[name], mean_running = _serve(llm, workload, name)
            running[name].append(mean_running)
        for name in BASELINES:
            ratios[name].append(seconds[name] / seconds["paged"])
    rows = [_row("12", f"tokens/s / {name}", _ORDER, ratios[name], "x") for name in BASELINES]
    return rows + [
        _row("13", f"mean batch, {name}", None, values) for name, values in running.items()
    ]


def _serve(llm: LLM, workload: Workload, name: str) -> tuple[float, float]:
    """Returns the seconds and the mean batch of a workload through one of the systems."""
    engine, static = llm.engine, None
    if name != "paged":
        engine, places = baseline_engine(llm, BASELINES[name])
        static = places if name == "static" else None
    found = drive(
        engine,
        workload,
        [0.0] * len(workload.requests),
        output_kind=RequestOutputKind.FINAL_ONLY,
        static_batch_size=static,
    )
    return found.duration_s, found.mean_running


def by_block_size(
    folder: str, seeds: Sequence[int], num_requests: int, block_sizes: Sequence[int]
) -> list[Row]:
    """Seconds of one workload by block size, beside those with blocks of 16."""
    seconds: dict[int, list[float]] = {}
    for size in block_sizes:
        llm = make_llm(folder, block_size=size)
        _serve(llm, make_workload(8, 99), "paged")
        seconds[size] = [
            _serve(llm, make_workload(num_requests, seed), "paged")[0] for seed in seeds
        ]
    return [
        _row(
            "18b",
            f"seconds / blocks of 16, blocks of {size}",
            None,
            [mine / base for mine, base in zip(values, seconds[16], strict=True)],
            "x",
        )
        for size, values in seconds.items()
        if size != 16
    ]


def sharing(folder: str, seeds: Sequence[int], num_requests: int) -> list[Row]:
    """A common prefix found in the cache, or computed each time; n samples, or n requests."""
    cached, plain = make_llm(folder, enable_prefix_caching=True), make_llm(folder)
    greedy = SamplingParams(temperature=0, max_tokens=NUM_OUTPUT, ignore_eos=True)
    prefix_gains, computed, sample_gains = [], [], []
    vocab_size = random_models.CONFIGS[MODEL]["vocab_size"]
    for seed in (1000, *seeds):  # the first warms up
        rng = np.random.default_rng(seed)
        prefix = rng.integers(0, vocab_size, NUM_PREFIX).tolist()
        prompts = [
            {"prompt_token_ids": prefix + rng.integers(0, vocab_size, 32).tolist()}
            for _ in range(num_requests)
        ]
        seconds = {}
        for name, llm in (("cached", cached), ("plain", plain)):
            begin = time.perf_counter()
            outputs = llm.generate(prompts, greedy, use_tqdm=False)
            seconds[name] = time.perf_counter() - begin
            if name == "cached":
                found = sum(output.num_cached_tokens for output in outputs)
                total = sum(len(output.prompt_token_ids) for output in outputs)
        prefix_gains.append(seconds["plain"] / seconds["cached"])
        computed.append(100 * found / total)
        sampled = SamplingParams(
            temperature=1.0, max_tokens=NUM_OUTPUT, ignore_eos=True, seed=seed, n=4
        )
        few = prompts[: max(2, num_requests // 4)]
        begin = time.perf_counter()
        plain.generate(few, sampled, use_tqdm=False)
        middle = time.perf_counter()
        alone = SamplingParams(temperature=1.0, max_tokens=NUM_OUTPUT, ignore_eos=True, seed=seed)
        plain.generate([prompt for prompt in few for _ in range(4)], alone, use_tqdm=False)
        sample_gains.append((time.perf_counter() - middle) / (middle - begin))
    return [
        _row("16", f"tokens/s / no cache, prefix of {NUM_PREFIX}", _ORDER, prefix_gains[1:], "x"),
        _row("16", "prompt tokens found, all requests at once", None, computed[1:], " %"),
        _row("14", "tokens/s, 4 samples / 4 requests", _ORDER, sample_gains[1:], "x"),
    ]


def beams(seeds: Sequence[int], num_requests: int) -> list[Row]:
    """Blocks that the demo model's beams save."""
    llm = beam_runs.make_llm(16, 48)
    rows = []
    for width in (2, 4, 6):
        saved = []
        for seed in seeds:
            requests = workloads.draw(
                "alpaca",
                num_requests,
                scale=1.0,
                max_model_len=beam_runs.MAX_MODEL_LEN,
                vocab_size=llm.model_config.vocab_size,
                seed=seed,
            ).requests
            pool = beam_runs.run(llm, requests, width, seed)
            entries = sum(stats.num_table_entries for stats in pool)
            saved.append(100 * (1 - sum(stats.num_allocated_blocks for stats in pool) / entries))
        claim = Range("37.6-55.2 %", 37.6, 55.2)
        row = _row("15", f"blocks saved, alpaca, {width} beams", claim, saved, " %")
        rows.append(dataclasses.replace(row, data="demo model, Python text, drawn lengths"))
    return rows


def recovery(folder: str, seeds: Sequence[int], block_sizes: Sequence[int]) -> list[Row]:
    """One request of 256 tokens swapped out and in, or computed again, by block size."""
    seconds: dict[int, list[float]] = {}
    crossovers: dict[int, list[float]] = {}
    for size in block_sizes:
        llm = engine_for(folder, size)
        found = [measure_costs(llm, 256) for _ in seeds]
        seconds[size] = [one.recompute_s / one.swap_s for one in found]
        crossovers[size] = [one.crossover for one in found]
    rows = [
        _row(
            "19",
            f"time, recompute / swap, 256 tokens, blocks of {size}",
            None,
            values,
            "x",
            "all blocks of a request are one copy here",
        )
        for size, values in seconds.items()
    ]
    return rows + [
        _row(
            "19",
            f"tokens from which on auto swaps, blocks of {size}",
            None,
            [value for value in values if np.isfinite(value)],
            note=f"never in {sum(map(np.isinf, values))} of {len(values)} runs",
        )
        for size, values in crossovers.items()
    ]


def kernel() -> list[Row]:
    """Attention over blocks beside attention over one piece; on a GPU nobody has measured it."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "attention.json"
        arguments = ["--parts=decode", "--batch=16", "--context=256,1024", "--heads=12/4"]
        subprocess.run(
            [sys.executable, "-m", "benchmarks.attention", *arguments, f"--json={path}"],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        ratios = [row["paged/contiguous"] for row in json.loads(path.read_text())["decode"]]
    note = "XLA's contiguous attention; median of two context lengths"
    return [
        Row(
            "18a",
            "kernel's time on a GPU / contiguous",
            Range("1.20-1.26", 1.0, 1.26),
            (),
            "unmeasured",
            "-",
        ),
        _row("18a", "kernel's time / contiguous", None, [statistics.median(ratios)], "x", note),
    ]


def cost_model(folder: str, seeds: Sequence[int], num_requests: int) -> list[Row]:
    """How far simulated steps are from measured ones, once the cost model is calibrated here."""
    llm = make_timed_llm(folder)
    found = [calibrate(llm, max(8, num_requests // 2), seed) for seed in seeds]
    about = Range.about(1.0, "1 is exact", 0.15)
    return [
        _row(COST_MODEL, "median error of a step", None, [100 * f.step_error for f in found], " %"),
        _row(COST_MODEL, "a run, simulated / measured", about, [f.run_ratio for f in found], "x"),
    ]


def _row(
    figure: str,
    what: str,
    paper: Range | None,
    values: Sequence[float],
    unit: str = "",
    note: str = "",
) -> Row:
    data = f"random {MODEL}, drawn lengths"
    return Row(figure, what, paper, tuple(values), "measured on this CPU", data, unit, note)
