"""Which implementation runs: named or chosen, on this machine or for a GPU that is not here."""

import logging

import jax
import jax.numpy as jnp
import pytest

from pallas_paged import attention_implementation
from pallas_paged.deviceless import TARGETS, target_device
from pallas_paged.dispatch import (
    Implementation,
    _log_choice,
    choose_implementation,
    compute_capability,
    interpret_kernels,
    kernel_family,
    unsupported_target,
)

OFFERED = {
    "mosaic_gpu": Implementation(
        lambda x: x, lambda x: None if x.ndim == 1 else f"x has {x.ndim} dimensions"
    ),
    "xla": Implementation(lambda x: x),
}
VECTOR, MATRIX = jnp.zeros(2), jnp.zeros((2, 2))


def test_the_first_that_can_is_chosen_and_logged_once_with_the_reasons(caplog):
    _log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger="pallas_paged"):
        assert choose_implementation("op", OFFERED, None, VECTOR) == "mosaic_gpu"
    assert not caplog.records  # a line for every operation would be many in an engine's start
    with caplog.at_level(logging.DEBUG, logger="pallas_paged"):
        assert choose_implementation("op", OFFERED, None, VECTOR) == "mosaic_gpu"
        assert choose_implementation("op", OFFERED, None, MATRIX) == "xla"
        assert choose_implementation("op", OFFERED, None, MATRIX) == "xla"
        assert choose_implementation("op", OFFERED, "xla", VECTOR) == "xla"
    assert [record.getMessage() for record in caplog.records] == [
        "op runs as 'mosaic_gpu' on cpu by automatic choice",
        "op runs as 'xla' on cpu by automatic choice (not 'mosaic_gpu': x has 2 dimensions)",
    ]


def test_a_named_one_runs_or_is_refused_with_the_reason():
    assert choose_implementation("op", OFFERED, "mosaic_gpu", VECTOR) == "mosaic_gpu"
    with pytest.raises(NotImplementedError, match="'mosaic_gpu' cannot do this: x has 2 dimens"):
        choose_implementation("op", OFFERED, "mosaic_gpu", MATRIX)
    with pytest.raises(NotImplementedError, match="op has no 'reference' implementation"):
        choose_implementation("op", OFFERED, "reference", VECTOR)
    with pytest.raises(ValueError, match="'triton' is unknown; use None or one of 'mosaic_gpu', "):
        choose_implementation("op", OFFERED, "triton", VECTOR)


def test_if_none_can_all_reasons_are_given():
    only = {"mosaic_gpu": OFFERED["mosaic_gpu"]}
    with pytest.raises(NotImplementedError, match="op: not 'mosaic_gpu': x has 2 dimensions"):
        choose_implementation("op", only, None, MATRIX)


def test_the_target_is_the_default_device():
    reason = unsupported_target()
    assert (
        reason == "it needs an NVIDIA GPU of compute capability 8.0, 8.6, 8.9, 9.0 or 10.0, not cpu"
    )
    with jax.default_device("cpu"):
        assert unsupported_target("hopper") is not None
    with jax.default_device(target_device("h200")):
        assert compute_capability() == (9, 0)
        assert unsupported_target("hopper") is None
    with jax.default_device(target_device("a100-80gb")):
        reason = unsupported_target("hopper")
        assert reason == "it needs compute capability 9.0, and NVIDIA A100-SXM4-80GB has 8.0"


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_has_a_family_of_kernels(target):
    with jax.default_device(target_device(target)):
        assert unsupported_target() is None
        families = {"h100": "hopper", "h200": "hopper", "b200": "blackwell"}
        assert kernel_family() == families.get(target, "ampere")


@pytest.mark.parametrize("capability", [(7, 0), (7, 5), (8, 7), (10, 3), (12, 0)])
def test_other_chips_are_refused(capability):
    with interpret_kernels(compute_capability=capability):
        reason = unsupported_target()
    has = f"what is interpreted has {capability[0]}.{capability[1]}"
    assert reason == f"it needs compute capability 8.0, 8.6, 8.9, 9.0 or 10.0, and {has}"


def test_interpreted_kernels_run_anywhere():
    with interpret_kernels():
        assert unsupported_target("hopper") is None
        assert compute_capability() == (9, 0)
    assert unsupported_target("hopper") is not None


def test_attention_tells_the_engine_what_it_runs():
    q, k_cache = jnp.zeros((1, 2, 64)), jnp.zeros((2, 1, 16, 64))
    assert attention_implementation(None, q, k_cache) == "numba"
    assert attention_implementation("reference", q, k_cache) == "reference"
