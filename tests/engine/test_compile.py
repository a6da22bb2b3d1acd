"""The program that writes bundles, and the plan that it prints instead."""

import dataclasses
import json
import logging
import pathlib

import pytest

from pallas_paged.engine import LLM
from pallas_paged.engine.device.step_report import SHAPES
from pallas_paged.models.demo import DEMO_MODEL
from pallas_paged.models.registry import config_from_hf
from tests.models.references import DATA
from tests.programs import run_program

SMALL = ["--max_num_seqs=2", "--max_num_batched_tokens=32", "--max_model_len=128"]
SMALLEST = ["--max_num_seqs=1", "--max_num_batched_tokens=16", "--max_model_len=128"]
COMPILE = "pallas_paged.engine.compile"


def test_generate_runs_from_what_compile_wrote(tmp_path: pathlib.Path) -> None:
    output = tmp_path / "bundle"
    done = run_program(COMPILE, "--model=models/demo", "--target=cpu", f"--output={output}", *SMALL)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[1].startswith("attention: numba, writes: xla, on cpu")
    manifest = json.loads((output / "manifest.json").read_text())
    assert sum(", " in line and " s, " in line for line in lines) == len(manifest["programs"]) + 1
    assert lines[-1].startswith(f"{len(manifest['programs'])} programs in ")
    assert "1 blocks" in lines[-1] or f"{manifest['num_blocks']} blocks" in lines[-1]
    prompt = ("--prompt=def main(", "--max_tokens=4", "--temperature=0", "--verbose")
    done = run_program("pallas_paged.engine.generate", f"--bundle={output}", *prompt)
    assert done.returncode == 0, done.stderr
    assert f"loaded {len(manifest['programs'])} programs of the bundle" in done.stderr
    assert "compiled mixed" not in done.stderr
    assert "compiled decode" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "give either --output, the folder for the bundle, or --plan"),
        (["--plan", "--output=x"], "give either --output"),
        (["--output=tests"], "tests exists and is no bundle"),
        (["--output=x", "--json=y"], "--largest and --json go with --plan"),
        (["--plan", "--max_model_len=100000"], "max_model_len=100000"),
        (["--plan", "--attention_implementation=mosaic_gpu"], "'mosaic_gpu' cannot do this"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(flags: list[str], said: str) -> None:
    done = run_program(COMPILE, "--model=models/demo", "--target=cpu", *flags)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert said in done.stderr


def test_a_plan_for_this_cpu(tmp_path: pathlib.Path) -> None:
    figures = plan(tmp_path, "cpu", "--largest")
    assert [step["bucket"]["is_full"] for step in figures["steps"]] == [False, False]
    assert all(step["launches"] is None for step in figures["steps"])
    assert figures["temporary_bytes"] is None


@pytest.mark.parametrize("target", ["cpu", pytest.param("h100", marks=pytest.mark.slow)])
def test_a_plan_for_devices_that_share_the_model(target: str, tmp_path: pathlib.Path) -> None:
    """What each of them has, and what they exchange: the least that they can."""
    one, two = (plan(tmp_path, target, "--largest", f"--tensor_parallel_size={n}") for n in (1, 2))
    assert (one["num_devices"], two["num_devices"]) == (1, 2)
    assert two["block_bytes"] == one["block_bytes"] / 2
    assert one["weight_bytes"] / 2 < two["weight_bytes"] < 0.6 * one["weight_bytes"]
    assert not any(step["exchanges"] or step["least_exchanges"] for step in one["steps"])
    for step in two["steps"]:
        assert step["exchanges"] == step["least_exchanges"]
        assert [kind["kind"] for kind in step["exchanges"]] == ["all-gather", "all-reduce"]
        assert {each["kind"] for each in step["collectives"]} == {"all-gather", "all-reduce"}
        steps = step["bucket"]["num_steps"]
        assert [kind["count"] for kind in step["exchanges"]] == [steps, 3 * steps]


def test_shapes_are_the_published_ones() -> None:
    published = json.loads((DATA / "published.json").read_text())
    for name, shape in SHAPES.items():
        config = config_from_hf(published[name.replace("llama-", "llama-3-")]["config"])
        assert dataclasses.replace(config, checkpoint_dtype=None) == shape


@pytest.mark.slow
def test_a_plan_for_an_h100(tmp_path: pathlib.Path) -> None:
    figures = plan(tmp_path, "h100")
    # Decode steps of one and of two sequences, and steps with prompts; each also without something.
    assert len(figures["steps"]) == 6
    without = [
        (step["bucket"]["filters"], step["bucket"]["has_decodes"]) for step in figures["steps"]
    ]
    assert without.count((False, True)) == 2
    assert without.count((True, False)) == 1
    assert all(step["launches"]["others"] for step in figures["steps"])
    assert figures["temporary_bytes"] > 0
    assert figures["num_tokens"] == 16 * (figures["num_blocks"] - 1)
    assert figures["blocks_per_sequence"] < figures["blocks_per_sequence_without_window"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "device", "kernel"),
    [
        ("h100", "NVIDIA H100 80GB HBM3", b"paged_decode"),
        ("l4", "NVIDIA L4", b"paged_attention_sm80"),
    ],
)
def test_a_bundle_for_a_gpu(
    target: str,
    device: str,
    kernel: bytes,
    tmp_path: pathlib.Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its programs are machine code, kernels of ours too, and a CPU's engine leaves them alone.

    Whether a GPU runs them is another matter: there is none here.
    """
    output = tmp_path / "bundle"
    done = run_program(
        COMPILE, "--model=models/demo", f"--target={target}", f"--output={output}", *SMALLEST
    )
    assert done.returncode == 0, done.stderr
    assert f"attention: mosaic_gpu, writes: mosaic_gpu, on {device}" in done.stdout
    assert f"runs as 'mosaic_gpu' on {device} by automatic choice" in done.stderr
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["fingerprint"]["device"] == device
    for entry in manifest["programs"]:
        content = (output / entry["file"]).read_bytes()
        assert b"\x7fELF" in content
        assert isinstance(entry["name"], list) or kernel in content
    with caplog.at_level(logging.WARNING):
        LLM(DEMO_MODEL, bundle=output, compilation_cache_dir=None)
    assert f"device: {device} in the bundle, cpu in this engine" in caplog.text
    assert "implementation: mosaic_gpu in the bundle, numba in this engine" in caplog.text


def plan(folder: pathlib.Path, target: str, *flags: str) -> dict:
    """Returns the figures of a plan, which leaves nothing else."""
    file = folder / "figures.json"
    model = ("--model=tests/models/data/mistral-sliding", "--layers=1", f"--target={target}")
    dtype = "--dtype=float32" if target == "cpu" else "--dtype=bfloat16"
    done = run_program(COMPILE, *model, dtype, "--plan", f"--json={file}", *SMALL, *flags)
    assert done.returncode == 0, done.stderr
    assert "decodes with" in done.stdout
    is_shared = "--tensor_parallel_size=2" in flags
    assert ("on each of 2 devices: weights" in done.stdout) == is_shared
    assert (": the least" in done.stdout) == is_shared
    assert list(folder.iterdir()) == [file]
    figures = json.loads(file.read_text())
    lines = [line for line in done.stdout.splitlines() if "temporaries" in line]
    assert len(lines) >= len(figures["steps"])
    return figures
