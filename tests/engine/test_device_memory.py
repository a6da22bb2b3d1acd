"""What suits a device: a share of the whole card, and limits of a step."""

import logging

import pytest

from pallas_paged.engine import EngineConfig
from pallas_paged.engine.device.device_memory import card_bytes, usable_bytes, with_limits

GIB = 1 << 30
SETTING = "XLA_CLIENT_MEM_FRACTION"


def test_the_share_is_of_the_card_and_not_of_what_jax_may_use() -> None:
    stats = {"bytes_limit": 76 * GIB}
    assert card_bytes(stats, {SETTING: "0.95"}) == 80 * GIB
    assert usable_bytes(stats, 0.5, {SETTING: "0.95"}) == 40 * GIB
    assert card_bytes({"bytes_limit": 60 * GIB}, {}) == 80 * GIB
    assert card_bytes({"bytes_limit": 40 * GIB}, {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".5"}) == (
        80 * GIB
    )


def test_more_than_jax_may_use_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert usable_bytes({"bytes_limit": 60 * GIB}, 0.9, {}) == 60 * GIB
    assert "set the environment variable XLA_CLIENT_MEM_FRACTION=0.9" in caplog.text
    old_name = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}
    with caplog.at_level(logging.WARNING):
        assert usable_bytes({"bytes_limit": 40 * GIB}, 0.9, old_name) == 40 * GIB
    assert "set the environment variable XLA_PYTHON_CLIENT_MEM_FRACTION=0.9" in caplog.text


@pytest.mark.parametrize(
    ("gib", "options", "expected"),
    [
        (None, {}, (64, 512)),
        (80, {}, (256, 8192)),
        (24, {}, (256, 2048)),
        (80, {"max_num_seqs": 32, "max_num_batched_tokens": None}, (32, 8192)),
        (None, {"max_num_seqs": 1000}, (1000, 1000)),
        (None, {"max_num_batched_tokens": 16}, (16, 16)),
        (80, {"max_num_seqs": 3, "max_num_batched_tokens": 5}, (3, 5)),
    ],
)
def test_limits_of_a_step(
    gib: int | None,
    options: dict[str, int],
    expected: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in (SETTING, "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    stats = None if gib is None else {"bytes_limit": gib * GIB * 3 // 4}
    config = EngineConfig("m", **with_limits({"block_size": 8, **options}, stats))
    assert (config.max_num_seqs, config.max_num_batched_tokens) == expected
    assert config.block_size == 8


def test_a_wrong_limit_is_refused_by_name() -> None:
    for value in (0, "many", True):
        with pytest.raises(ValueError, match=f"max_num_seqs={value!r}"):
            EngineConfig("m", **with_limits({"max_num_seqs": value}, None))
