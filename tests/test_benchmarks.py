"""Every benchmark program runs, at sizes that measure nothing, and writes what it prints."""

import json
import pathlib
import sys

import pytest

from benchmarks import pictures
from pallas_paged.models.demo import DEMO_MODEL
from tests.programs import run_program

SMALL = (
    "--random_model=tiny --num_requests=6 --length_scale=0.1 --max_num_seqs=2 --num_blocks=40 "
    "--max_num_batched_tokens=32"
)


QUICK = [
    ("attention", "--batch=2 --context=32 --heads=2/1 --layers=1 --repeats=1 --parts=decode"),
    ("block_tables", "--num_seqs=8 --num_tokens=64 --steps=4"),
    ("products", "--shapes=8x16 --rows=1,4 --dtype=bfloat16 --repeats=1 --min_mib=0"),
    (
        "cascade",
        "--parts=bytes,time --sequences=9 --prefix=40 --own=3 --heads=4/2 --head_dim=16",
    ),
    ("overlap", "--device_ms=1 --num_seqs=4 --num_steps=3"),
    ("async_cost", "--device_ms=1 --num_seqs=4 --num_steps=3 --warm_steps=2 --repeats=1"),
    (
        "step_floor",
        "--models=tiny --dtypes=float32 --rows=1,3 --contexts=20 --rounds=1 --min_ms=0 --plot=PLOT",
    ),
    ("latency", f"{SMALL} --request_rate=40 --goodput=ttft:500 --baseline=static"),
]
SLOW = [
    (
        "warm_traffic",
        "--minutes=0.1 --rate=2 --max_num_seqs=4 --max_model_len=64 --num_blocks=12",
    ),
    (
        "startup",
        "--random_model=tiny --repeats=1 --bundle --max_num_seqs=1 --max_num_batched_tokens=16",
    ),
    (
        "host_cost",
        "--num_seqs=4 --max_model_len=512 --vocab_size=1000 --kinds=plain,text,logprobs+deltas "
        "--waiting=0,5 --num_steps=3 --num_requests=2 --plot=PLOT",
    ),
    ("load_memory", "--random_model=tiny"),
    ("weights", "--random_model=tiny --num_updates=1 --num_runs=1 --batches=1 --num_tokens=8"),
    ("sampling", "--shapes=2x300 --rounds=1 --hidden=16 --layers=1 --heads=2/1 --context=4"),
    ("recovery", "--block_sizes=8 --num_requests=8 --prompt_len=9 --output_len=20"),
    ("recovery", "--parts=costs --block_sizes=8,128 --swap_tokens=100"),
    ("cost_model", "--random_model=tiny --num_requests=3"),
    ("throughput", f"{SMALL} --baseline=static,orca-max"),
    ("http_cost", "--num_seqs=4 --num_steps=60 --warm_steps=4 --repeats=1 --step_ms=5"),
    ("soak", "--seconds=27 --clients=50"),
    ("rollouts", "--samples=2,3 --rounds=1 --prompt_len=20 --output_len=3 --max_num_seqs=4"),
    ("structured", "--running=2 --prompt_len=40 --output_len=12 --rounds=1"),
    (
        "speculation",
        f"--draft_model={DEMO_MODEL} --running=2 --prompt_len=40 --output_len=12 --rounds=1",
    ),
]


@pytest.mark.parametrize(
    ("name", "flags"), QUICK + [pytest.param(*one, marks=pytest.mark.slow) for one in SLOW]
)
def test_it_runs(name: str, flags: str, tmp_path: pathlib.Path) -> None:
    file, plot = tmp_path / "figures.json", tmp_path / "plot.png"
    flags = flags.replace("PLOT", str(plot))
    done = run_program(f"benchmarks.{name}", *flags.split(), f"--json={file}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert json.loads(file.read_text())
    assert plot.exists() == ("--plot" in flags)


def test_a_missing_matplotlib_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match="the extra `bench`"):
        pictures.new_figure(1, 1)
