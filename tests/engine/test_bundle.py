"""Bundles: an engine that loads one compiles nothing, and one that may not load it says why."""

import dataclasses
import json
import logging
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from pallas_paged.deviceless import target_device
from pallas_paged.engine import LLM, SamplingParams
from pallas_paged.engine.compiling import HOST, Progress, compile_bundle, prepare
from pallas_paged.engine.config import EngineConfig
from pallas_paged.engine.core.buckets import Bucket
from pallas_paged.engine.device import pool_size
from pallas_paged.engine.device.device_memory import stats_of_card
from pallas_paged.engine.device.fingerprint import differences
from pallas_paged.engine.device.kernel_check import KernelCheck
from pallas_paged.engine.device.placement import Placement
from pallas_paged.engine.device.pool_size import BundledPool, num_bytes, plan_pool
from pallas_paged.engine.device.step_report import SHAPES
from pallas_paged.models import abstract_model, load_config
from tests.engine.serving import assert_idle, make_llm, nothing_compiles
from tests.models.references import DATA

MODEL = "llama-gqa-llama3"
KERNELS = "mosaic_gpu"
LIMITS = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "max_model_len": 80, "num_blocks": 99}
PROMPTS = [{"prompt_token_ids": list(range(3, 3 + length))} for length in (5, 40, 17)]
GREEDY = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
ALL_KINDS = [
    GREEDY,
    SamplingParams(
        temperature=0, max_tokens=9, presence_penalty=0.5, logprobs=2, prompt_logprobs=1
    ),
    SamplingParams(temperature=0.8, seed=7, n=3, max_tokens=20, ignore_eos=True),
]


def compile_to(
    folder: pathlib.Path,
    full: bool,
    tell: Callable[[Progress], object] = print,
    **options: Any,
) -> Any:
    config = EngineConfig(str(DATA / MODEL), swap_space=0.001, **LIMITS, **options)
    prepared = prepare(load_config(DATA / MODEL), config, HOST)
    return compile_bundle(prepared, folder, full=full, tell=tell)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A bundle of all programs, not to be changed."""
    folder = tmp_path_factory.mktemp("bundles") / "whole"
    compile_to(folder, full=True)
    return folder


@pytest.fixture
def copied(whole: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """The same, to be changed."""
    return shutil.copytree(whole, tmp_path / "bundle")


def load(folder: pathlib.Path, **options: Any) -> LLM:
    """Returns an engine with a bundle; what is not in `options` comes from there."""
    return LLM(DATA / MODEL, bundle=folder, compilation_cache_dir=None, **options)


def edit_manifest(folder: pathlib.Path, section: str = "fingerprint", **fields: Any) -> None:
    """Changes fields of a manifest, by default of the fingerprint."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest[section] |= fields
    path.write_text(json.dumps(manifest))


def tokens(llm: LLM, params: Any = GREEDY) -> list[Any]:
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    assert_idle(llm)
    return [[one.token_ids for one in output.outputs] for output in outputs]


def refused(llm: LLM) -> bool:
    """Whether an engine serves, with programs of its own."""
    tokens(llm)
    return bool(llm.runner.programs.num_traces)


def test_an_engine_with_a_bundle_traces_nothing_and_gives_the_same_tokens(
    whole: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = make_llm(MODEL, **LIMITS).generate(PROMPTS, ALL_KINDS, use_tqdm=False)
    with caplog.at_level(logging.WARNING):
        llm = load(whole, swap_space=0.001)
    assert not caplog.records
    assert llm.config.max_num_seqs == LIMITS["max_num_seqs"]
    assert llm.max_model_len == LIMITS["max_model_len"]
    before = llm.runner.kv_caches[0].k
    with nothing_compiles(llm.runner):
        found = llm.generate(PROMPTS, ALL_KINDS, use_tqdm=False)
        llm.warm_up()
    assert before.is_deleted(), "the caches are donated, as to programs of its own"
    assert llm.runner.programs.num_traces == {}
    assert llm.runner.block_programs.num_traces == {}
    for one, other in zip(found, expected, strict=True):
        assert [x.token_ids for x in one.outputs] == [x.token_ids for x in other.outputs]
        assert [x.logprobs for x in one.outputs] == [x.logprobs for x in other.outputs]
        assert one.prompt_logprobs == other.prompt_logprobs


def test_a_bundle_has_steps_with_logprobs_if_it_was_told_to(
    whole: pathlib.Path, tmp_path: pathlib.Path, ran: list[Bucket]
) -> None:
    compile_to(tmp_path / "told", full=False, token_logprobs=True)
    params = dataclasses.replace(GREEDY, logprobs=0)
    found = []
    for folder, has_logprobs in ((tmp_path / "told", True), (whole, False)):
        llm = load(folder)
        ran.clear()
        with nothing_compiles(llm.runner):
            found.append(llm.generate(PROMPTS, params, use_tqdm=False))
        assert {bucket.is_full for bucket in ran if not bucket.is_common} == {not has_logprobs}
    for one, other in zip(*found, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        assert one.outputs[0].token_logprobs == pytest.approx(other.outputs[0].token_logprobs)


def test_a_bundle_for_devices_that_share_the_model(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The engine takes their number from it, and another number is another bundle's."""
    compile_to(tmp_path / "two", full=True, tensor_parallel_size=2, deterministic=True)
    with caplog.at_level(logging.WARNING):
        llm = load(tmp_path / "two", swap_space=0.001)
    assert not caplog.records
    assert llm.config.tensor_parallel_size == llm.runner.programs.placement.num_devices == 2
    assert llm.runner.kv_caches[0].k.sharding.device_set == set(jax.devices()[:2])
    with nothing_compiles(llm.runner):
        found = [tokens(llm, params) for params in ALL_KINDS]
    assert llm.runner.programs.num_traces == llm.runner.block_programs.num_traces == {}
    alone = load(tmp_path / "two", swap_space=0.001, tensor_parallel_size=1)
    assert "tensor_parallel_size: 2 in the bundle, 1 in this engine" in caplog.text
    assert [tokens(alone, params) for params in ALL_KINDS] == found


def test_a_bundle_is_refused_where_a_model_is_on_several_processes(
    whole: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that loads it and one that compiles could wait for each other."""
    monkeypatch.setattr(Placement, "is_local", False)
    with pytest.raises(ValueError, match="is for an engine of one process, not of several"):
        load(whole)


def test_plain_programs_alone_and_the_others_when_somebody_asks(tmp_path: pathlib.Path) -> None:
    done: list[Progress] = []
    manifest = compile_to(tmp_path / "plain", full=False, tell=done.append)
    assert len(done) == len(manifest.programs) == len(list((tmp_path / "plain").iterdir())) - 1
    llm = load(tmp_path / "plain")
    tokens(llm)
    assert llm.runner.programs.num_traces == {}
    tokens(llm, ALL_KINDS[1])
    assert all(bucket.is_full for bucket in llm.runner.programs.num_traces)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_num_seqs": 3}, "max_num_seqs: 4 in the bundle, 3 in this engine"),
        ({"max_model_len": 64}, "max_blocks_per_seq: 5 in the bundle, 4 in this engine"),
        ({"num_blocks": 98}, "num_blocks: 99 in the bundle, 98 in this engine"),
        ({"dtype": "bfloat16"}, "bfloat16["),
        ({"kv_cache_dtype": "int8"}, "kv_caches: 6*float32["),
        ({"attention_implementation": "xla"}, "implementation: numba in the bundle, xla in this"),
        ({"deterministic": True}, "deterministic: False in the bundle, True in this engine"),
        ({"logprobs_mode": "processed"}, "logprobs_mode: raw in the bundle, processed in this"),
    ],
)
def test_what_differs_is_said_once_and_everything_compiled(
    options: dict[str, Any],
    said: str,
    whole: pathlib.Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        llm = load(whole, **options)
    (record,) = caplog.records
    assert said in record.getMessage()
    assert "compiles its own programs" in record.getMessage()
    if "max_num_seqs" in options:
        assert refused(llm)


def test_a_bundle_of_another_cpu_is_not_loaded(
    copied: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its instructions would end the process."""
    own = json.loads((copied / "manifest.json").read_text())["fingerprint"]["cpu_features"]
    edit_manifest(copied, jax="0.1", cpu="abacus", cpu_features=f"{own} beads")
    for path in copied.glob("*.bin"):
        path.write_bytes(b"not to be looked at")
    with caplog.at_level(logging.WARNING):
        llm = load(copied)
    (record,) = caplog.records
    for said in (
        "jax: 0.1 in the bundle",
        "cpu: abacus in the bundle",
        "cpu_features: beads in the bundle, nothing more in this engine",
    ):
        assert said in record.getMessage()
    assert refused(llm)


def test_a_model_of_the_same_shapes_with_other_constants_is_another(
    copied: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit_manifest(copied, **{"model.rms_norm_eps": "0.5"})
    with caplog.at_level(logging.WARNING):
        assert refused(load(copied))
    assert "model.rms_norm_eps: 0.5 in the bundle" in caplog.text


def test_long_fields_differ_by_what_only_one_has() -> None:
    many = " ".join(f"feature{i}" for i in range(50))
    assert differences({"f": f"{many} a", "x": "1"}, {"f": f"{many} b", "x": "1"}) == [
        "f: a in the bundle, b in this engine"
    ]
    assert differences({"old": "1"}, {}) == ["old: 1 in the bundle, nothing in this engine"]


def test_the_pool_of_the_bundle_is_taken_if_the_device_holds_it(
    copied: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And else the device's own, of fewer blocks, with other programs."""
    edit_manifest(copied, "options", num_blocks=None)
    assert load(copied).runner.kv_caches[0].k.shape[0] == LIMITS["num_blocks"]
    monkeypatch.setattr(pool_size, "_memory_bytes", lambda device: 300_000)
    monkeypatch.setattr(pool_size, "DEFAULT_CPU_KV_CACHE_BYTES", 300_000)
    with caplog.at_level(logging.WARNING):
        llm = load(copied)
    messages = [record.getMessage() for record in caplog.records]
    assert "there is room for 0.3 MiB" in messages[0]
    assert any("num_blocks: 99 in the bundle" in message for message in messages)
    assert llm.runner.kv_caches[0].k.shape[0] < 99


def test_the_check_of_kernels_is_in_the_bundle(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a GPU, though what runs here for its kernels are XLA's programs."""
    monkeypatch.setattr("pallas_paged.engine.device.choices.choose_writes", lambda *args: KERNELS)
    options = {"attention_implementation": "xla", **LIMITS}
    config = EngineConfig(str(DATA / MODEL), swap_space=0, **options)
    prepared = prepare(load_config(DATA / MODEL), config, HOST)
    folder = tmp_path / "bundle"
    manifest = compile_bundle(prepared, folder, full=False, tell=print)
    assert ["verify_kernels", 0] in [entry.name for entry in manifest.programs]

    def fail(check: KernelCheck) -> Any:
        raise AssertionError(f"{check.name} is compiled")

    monkeypatch.setattr(KernelCheck, "lower", fail)
    caplog.set_level(logging.INFO)
    load(folder, **options)
    assert "4 kernels agree with XLA on cpu" in caplog.text
    assert f"loaded {len(manifest.programs) - 1} programs of the bundle" in caplog.text
    path = folder / next(e.file for e in manifest.programs if e.name == ["verify_kernels", 0])
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{path.name} is damaged"):
        load(folder, **options)


def test_the_pool_of_a_bundle_on_a_gpu() -> None:
    """Nothing is compiled to know it: the bundle says what the largest step takes."""
    model = abstract_model(SHAPES["llama-8b"], "bfloat16")
    placement = Placement.on(target_device("h100"))
    fraction = {"XLA_CLIENT_MEM_FRACTION": "0.9"}

    def num_blocks(bundled: int, card_bytes: int) -> int:
        stats = stats_of_card(card_bytes, num_bytes(nnx.state(model)), fraction)
        return plan_pool(
            EngineConfig("m", dtype="bfloat16"),
            model,
            8192,
            jnp.dtype(jnp.bfloat16),
            "mosaic_gpu",
            placement,
            bundled=BundledPool(bundled, temporary_bytes=1 << 30),
            stats=stats,
        ).num_blocks

    own = num_blocks(10**9, 80 << 30)
    assert 10_000 < own < 40_000
    assert num_blocks(own - 1, 80 << 30) == own - 1
    assert num_blocks(own, 40 << 30) < own


@pytest.mark.parametrize("size", [0, 1000, -1])
def test_a_damaged_program_is_an_error(size: int, copied: pathlib.Path) -> None:
    path = sorted(copied.glob("step-*.bin"))[0]
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"!" if size < 0 else content[:size])
    with pytest.raises(ValueError, match=rf"{path.name} is damaged: .* compile the bundle again"):
        load(copied)


def test_a_missing_program_is_an_error(copied: pathlib.Path) -> None:
    path = sorted(copied.glob("other-*.bin"))[0]
    path.unlink()
    with pytest.raises(ValueError, match=f"{path.name} is missing"):
        load(copied)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "JSONDecodeError"),
        ('{"format": 1, "programs": [', "JSONDecodeError"),
        ("[]", "TypeError"),
        ("{}", "KeyError: 'format'"),
        ('{"format": 0, "programs": []}', "its format is 0, and 1 is read"),
        ('{"format": 1, "options": {}, "programs": []}', "missing 3 required"),
        ('{"format": 1, "options": {}, "programs": [{"file": "a"}]}', "TypeError"),
        ('{"format": 1, "options": {"bogus": 1}, "programs": []}', "no engine has: ['bogus']"),
    ],
)
def test_a_damaged_manifest_is_an_error(text: str, said: str, copied: pathlib.Path) -> None:
    (copied / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json cannot be read") as raised:
        load(copied)
    assert said in str(raised.value)


def test_a_folder_that_is_no_bundle_is_an_error(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is no bundle, it has no manifest\.json"):
        load(tmp_path)


def test_a_bundle_is_written_whole_or_not_at_all(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "bundle"

    def stop(done: Progress) -> None:
        raise KeyError(done.name)

    with pytest.raises(KeyError):
        compile_to(folder, full=False, tell=stop)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_bundle_is_not_replaced(tmp_path: pathlib.Path) -> None:
    (tmp_path / "thesis.txt").write_text("my only copy")
    with pytest.raises(ValueError, match="is not one of ours to replace"):
        compile_to(tmp_path, full=False)
    assert (tmp_path / "thesis.txt").read_text() == "my only copy"


def test_steps_that_a_bundle_lacks_are_named_and_compiled_when_needed(
    copied: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = copied / "manifest.json"
    manifest = json.loads(path.read_text())
    steps = [entry for entry in manifest["programs"] if isinstance(entry["name"], dict)]
    missing = next(e for e in steps if e["name"]["is_decode"] and not e["name"]["is_full"])
    manifest["programs"].remove(missing)
    path.write_text(json.dumps(manifest))
    with caplog.at_level(logging.WARNING):
        llm = load(copied)
    bucket = Bucket(**missing["name"])
    assert f"has no programs of {bucket}" in caplog.text
    tokens(llm)
    assert list(llm.runner.programs.num_traces) == [bucket]
