"""The check of kernels at an engine's start, with kernels that the interpreter runs."""

import dataclasses
import functools
import re
import threading
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_paged.cache_spec import CacheSpec
from pallas_paged.deviceless import target_device
from pallas_paged.dispatch import interpret_kernels
from pallas_paged.engine.config import EngineConfig
from pallas_paged.engine.device import checks_ahead, choices, kernel_check
from pallas_paged.engine.device.checks_ahead import ChecksAhead, begin_checks
from pallas_paged.engine.device.kernel_check import (
    KernelCheck,
    KernelCheckError,
    check_kernels,
    kernel_checks,
)
from pallas_paged.engine.device.kernel_problem import AttentionKind, attention_kinds, make_problem
from pallas_paged.engine.device.placement import Placement
from pallas_paged.kv_cache import StaticScales
from pallas_paged.models import abstract_model
from pallas_paged.models.mistral import MistralConfig
from tests.engine.serving import make_llm

SHAPE = MistralConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=64,
    num_layers=3,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=64,
    max_position_embeddings=512,
    sliding_windows=(None, 40, None),
)
# The rows of a tile without a token hold whatever shared memory held, NaN here.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


def checks(
    dtype: str = "bfloat16",
    cache_dtype: str | None = None,
    num_layers: int = 1,
    shares_prefix: bool = False,
    *,
    is_scaled: bool = False,
) -> tuple[KernelCheck, ...]:
    shape = SHAPE.first_layers(num_layers)
    if is_scaled:
        shape = dataclasses.replace(shape, kv_cache_dtype=cache_dtype)
    model = abstract_model(shape, dtype)
    specs = shape.cache_specs(16, jnp.dtype(cache_dtype or dtype))
    return kernel_checks(
        EngineConfig("m", disable_cascade_attn=not shares_prefix),
        model,
        specs,
        jnp.dtype(dtype),
        attention="mosaic_gpu",
        writes="mosaic_gpu",
        platform="gpu",
    )


def check(**options: Any) -> None:
    with interpret_kernels():
        check_kernels(checks(**options))


def test_each_kind_of_attention_once() -> None:
    model = abstract_model(SHAPE, "bfloat16")
    specs = SHAPE.cache_specs(16, jnp.bfloat16)
    kinds = attention_kinds(model, specs, jnp.bfloat16)
    assert [dict(kind.options) for kind in kinds] == [{}, {"sliding_window": 40}]
    assert {kind.spec for kind in kinds} == set(specs)
    assert all(kind.num_q_heads == 4 for kind in kinds)
    assert all(kind.dtype == jnp.bfloat16 for kind in kinds)
    assert all(kind.rotates for kind in kinds)


@pytest.mark.parametrize(("cache_dtype", "num_kernels"), [(None, 7), ("int8", 6)])
def test_right_kernels_pass(
    cache_dtype: str | None, num_kernels: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", kernel_check.__name__)
    check(cache_dtype=cache_dtype, shares_prefix=num_kernels == 7)
    assert re.search(
        rf"{num_kernels} kernels agree with XLA on \w+; checked in \d+\.\d s", caplog.text
    )


def writes_alone(cache_dtype: str) -> KernelCheck:
    """Returns a check of kernels that use static scales, without attention."""
    (only,) = checks(cache_dtype=cache_dtype, is_scaled=True)
    assert "static scales" in str(only.kind)
    return dataclasses.replace(only, attention="xla")


def test_kernels_that_use_static_scales_pass() -> None:
    with interpret_kernels():
        check_kernels((writes_alone("float8_e4m3fn"),))


@pytest.mark.parametrize("name", ["write_kv", "rotate_and_write"])
def test_a_kernel_that_does_not_use_static_scales_is_named(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(kernel_check, name)

    def write(*args: Any, implementation: str | None, **options: Any) -> Any:
        if implementation != "xla":
            options["static_scales"] = None
        return right(*args, implementation="xla", **options)

    monkeypatch.setattr(kernel_check, name, write)
    with (
        interpret_kernels(),
        pytest.raises(KernelCheckError, match=f"{name} on cpu: differs .*static scales"),
    ):
        check_kernels((writes_alone("int8"),))


@pytest.mark.parametrize("cache_dtype", ["int8", "float8_e4m3fn"])
def test_caches_that_were_written_with_other_scales_differ(cache_dtype: str) -> None:
    problem = make_problem(writes_alone(cache_dtype).kind)
    k, v = map(jnp.asarray, problem.static_scales)

    def difference(scales: StaticScales | None) -> float:
        theirs, ours = (
            kernel_check._written(problem._replace(static_scales=given), "xla")
            for given in (StaticScales(k, v), scales)
        )
        ours, theirs = (jax.tree.map(lambda a: a[1:], cache) for cache in (ours, theirs))
        return float(kernel_check._quantised_difference(problem, ours, theirs))

    assert difference(StaticScales(k, v)) == 0
    for wrong in (
        None,
        StaticScales(v, k),
        StaticScales(k[::-1], v[::-1]),
        StaticScales(jnp.broadcast_to(k[0], k.shape), v),
        StaticScales(k, v * 1.001),
    ):
        assert difference(wrong) > 1


def broken(function: Callable[..., Any], change: Callable[[Any], Any]) -> Callable[..., Any]:
    """Returns the function, with another result where it does not run as XLA's."""

    @functools.wraps(function)
    def run(*args: Any, implementation: str | None = None, **kwargs: Any) -> Any:
        result = function(*args, implementation="xla", **kwargs)
        return result if implementation == "xla" else change(result)

    return run


def one_number_less(cache: Any) -> Any:
    """The first number of the last block, which is a free one, is another one."""
    return cache._replace(k=cache.k.at[-1, 0, 0, 0].set(1))


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("write_kv", one_number_less, "write_kv on cpu: differs"),
        (
            "rotate_and_write",
            lambda of_both: (of_both[0].at[5, 3, 7].add(0.1), of_both[1]),
            "rotate_and_write on cpu: differs",
        ),
        (
            "rotate_and_write",
            lambda of_both: (of_both[0], one_number_less(of_both[1])),
            "rotate_and_write on cpu: differs",
        ),
        ("copy_blocks", one_number_less, "copy_blocks on cpu: differs"),
        ("gather_blocks", one_number_less, "gather_blocks on cpu: differs"),
        ("scatter_blocks", one_number_less, "scatter_blocks on cpu: differs"),
        ("paged_attention", lambda out: out.at[0, 0, 0].add(0.1), "paged_attention on cpu"),
        ("paged_attention", lambda out: out.at[0, 0, 0].set(jnp.nan), "by inf times"),
        ("paged_attention", lambda out: out.at[-1].set(1), "paged_attention on cpu"),
    ],
    ids=["write", "queries", "keys", "copy", "gather", "scatter", "attention", "nan", "padding"],
)
def test_a_wrong_kernel_is_named(
    name: str, change: Callable[[Any], Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = "write_kv", "rotate_and_write"
    for function in (*writes, "copy_blocks", "gather_blocks", "scatter_blocks"):
        whole = broken(getattr(kernel_check, function), lambda x: x)
        monkeypatch.setattr(kernel_check, function, whole)
    whole = broken(kernel_check.paged_attention, lambda x: x)
    monkeypatch.setattr(kernel_check, "paged_attention", whole)
    check()
    monkeypatch.setattr(kernel_check, name, broken(getattr(kernel_check, name), change))
    with pytest.raises(KernelCheckError) as error:
        check()
    text = str(error.value)
    assert said in text
    for part in ("4 query heads on 2 KV heads of 64, blocks of 16", f"jax {jax.__version__}"):
        assert part in text
    assert "attention_implementation='xla'" in text
    assert "verify_kernels=False" in text


def test_a_kernel_that_cannot_run_is_an_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("ptxas: no such instruction")

    monkeypatch.setattr(kernel_check, "write_kv", fail)
    with pytest.raises(KernelCheckError, match="cannot run: ptxas: no such instruction"):
        check()


def test_an_engine_checks_what_it_will_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """None where XLA runs; and not where it is switched off."""
    calls: list[Any] = []
    monkeypatch.setattr(
        "pallas_paged.engine.loading.check_kernels", lambda *args: calls.append(args)
    )
    make_llm("llama-mqa-linear")
    assert calls == []
    monkeypatch.setattr(choices, "choose_writes", lambda *args: "mosaic_gpu")
    make_llm("llama-mqa-linear")
    (((only,), compiled),) = calls
    assert only.name == ("verify_kernels", 0)
    assert compiled() == {}
    make_llm("llama-mqa-linear", verify_kernels=False)
    assert len(calls) == 1


def test_a_program_that_is_there_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise AssertionError("traced")

    both = checks(num_layers=2)
    assert [check.name for check in both] == [("verify_kernels", 0), ("verify_kernels", 1)]
    assert checks(shares_prefix=True)[0].name not in {check.name for check in both}
    monkeypatch.setattr(KernelCheck, "lower", fail)
    sizes = []

    def result(found: float) -> Callable[..., dict[str, float]]:
        def run(*arrays: jax.Array) -> dict[str, float]:
            sizes.append(len(arrays))
            return {"write_kv": found}

        return run

    compiled = {both[0].name: result(0.5), both[1].name: result(0.75)}
    check_kernels(both, lambda: compiled)
    assert len(sizes) == 2
    assert min(sizes) > 5
    with pytest.raises(KernelCheckError, match=r"write_kv on cpu: .* 1\.5 times .*window=40"):
        check_kernels(both, lambda: compiled | {both[1].name: result(1.5)})


def chosen(checked: tuple[KernelCheck, ...]) -> choices.Choices:
    dtype = jnp.dtype("bfloat16")
    return choices.Choices(dtype, dtype, (), SHAPE, (), "mosaic_gpu", "mosaic_gpu", checked)


def test_programs_are_compiled_while_weights_are_read(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And one that fails there is compiled again, which says what is wrong."""
    both = checks(num_layers=2)
    go, devices = threading.Event(), []

    def compile_lowered(lowered: KernelCheck, device: jax.Device) -> KernelCheck:
        assert go.wait(60)
        devices.append(device)
        if lowered is both[1]:
            raise RuntimeError("ptxas: no such instruction")
        return lowered

    monkeypatch.setattr(KernelCheck, "lower", lambda check: check)
    monkeypatch.setattr(checks_ahead, "compile_lowered", compile_lowered)
    device = jax.devices("cpu")[0]
    ahead = ChecksAhead(chosen(both), Placement.on(device))
    assert not devices
    go.set()
    assert ahead.programs() == {both[0].name: both[0]}
    assert devices == [device] * 2
    assert "was not compiled in the background" in caplog.text


def test_checks_begin_before_the_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ChecksAhead, "_compile", lambda *args: None)
    shape, h100 = SHAPE, Placement.on(target_device("h100"))

    def begin(shape: MistralConfig = shape, placement: Placement = h100, **options: Any) -> Any:
        config = EngineConfig("m", **{"dtype": "bfloat16"} | options)
        with placement.as_target():
            return begin_checks(config, shape, 512, placement)

    made = begin().choices
    assert [check.name[1] for check in made.checks] == [0, 1]
    assert (made.attention, made.writes) == ("mosaic_gpu", "mosaic_gpu")
    scaled = dataclasses.replace(shape, kv_cache_dtype="float8_e4m3fn", checkpoint_dtype="bfloat16")
    assert begin(scaled, dtype="auto").choices.cache_dtype == "float8_e4m3fn"
    assert begin(dtype="auto") is None  # the weights say which it is
    assert begin(verify_kernels=False) is None
    assert begin(bundle="folder") is None
    assert begin(placement=Placement.on(jax.devices("cpu")[0])) is None


def test_an_engine_uses_what_was_compiled_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(
        "pallas_paged.engine.loading.check_kernels", lambda *args: calls.append(args)
    )
    real = make_llm("llama-mqa-linear").config

    def begin(*args: Any) -> Any:
        config, shape, _, placement = args
        network = abstract_model(shape, "float32")
        made = choices.choose(config, network, placement)._replace(checks=checks())
        return types.SimpleNamespace(choices=made, programs=lambda: {"name": "program"})

    monkeypatch.setattr("pallas_paged.engine.loading.begin_checks", begin)
    assert make_llm("llama-mqa-linear").config == real
    ((checked, compiled),) = calls
    assert (checked, compiled()) == (checks(), {"name": "program"})


def test_the_switch_is_a_switch() -> None:
    with pytest.raises(ValueError, match="verify_kernels=1 must be True or False"):
        EngineConfig("m", verify_kernels=1)  # type: ignore[arg-type]


def test_options_that_are_arrays_are_drawn() -> None:
    spec = CacheSpec.attention(2, 16, 64, jnp.bfloat16)
    slopes = jax.ShapeDtypeStruct((4,), jnp.float32)
    kind = AttentionKind(4, jnp.dtype(jnp.bfloat16), spec, (("alibi_slopes", slopes),))
    made = make_problem(kind)
    assert made.options["alibi_slopes"].shape == (4,)
    assert np.isnan(np.asarray(made.caches.k, np.float32)).all()
    assert made.metadata.max_query_len == len(made.q)
