"""What one start compiled, the next one finds, also with a little less free memory."""

import logging
import os
import pathlib
import pwd
import subprocess
import sys
import types

import pytest

from pallas_paged.engine.device import compilation_cache
from tests.models.references import DATA

PROGRAM = """
import sys

import pytest
import jax
from pallas_paged.engine import LLM, SamplingParams

hits, misses = [], []
jax.monitoring.register_event_listener(
    lambda event, **_: {
        "/jax/compilation_cache/cache_hits": hits,
        "/jax/compilation_cache/cache_misses": misses,
    }.get(event, []).append(event)
)
llm = LLM(
    sys.argv[1],
    compilation_cache_dir=sys.argv[2],
    kv_cache_memory_bytes=int(sys.argv[3]),
    max_model_len=48,
    max_num_seqs=1,
    max_num_batched_tokens=16,
    compile_ahead=True,
)
prompts = [{"prompt_token_ids": [5, 6, 7]}, {"prompt_token_ids": [8] * 20}]
llm.generate(prompts, SamplingParams(temperature=0), use_tqdm=False)
print(len(hits), len(misses), llm.engine.memory.num_usable_blocks)
"""


CACHE_SETTINGS = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")


def start(folder: pathlib.Path, pool_bytes: int) -> tuple[int, int, int]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, DATA / "llama-mha-tied", folder, str(pool_bytes)],
        check=True,
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name not in CACHE_SETTINGS},
    )
    hits, misses, blocks = map(int, done.stdout.split()[-3:])
    return hits, misses, blocks


@pytest.mark.slow
def test_a_second_start_compiles_nothing(tmp_path: pathlib.Path) -> None:
    block_bytes = 2 * 2 * 4 * 16 * 8 * 4
    _, misses, blocks = start(tmp_path, 15 * block_bytes)
    assert misses >= 3
    again_hits, again_misses, again_blocks = start(tmp_path, 15 * block_bytes + block_bytes // 2)
    assert again_blocks == blocks
    assert again_misses == 0
    assert again_hits >= misses


class Settings:
    """Those of JAX, as far as the cache goes."""

    def __init__(self, folder: str | None) -> None:
        self.jax_compilation_cache_dir = folder
        self.jax_persistent_cache_min_compile_time_secs = 1.0

    def update(self, name: str, value: object) -> None:
        assert hasattr(self, name)
        setattr(self, name, value)


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Settings:
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = Settings(None)
    monkeypatch.setattr(compilation_cache, "jax", types.SimpleNamespace(config=settings))
    return settings


def test_a_user_without_a_home_starts_without_a_cache(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def nobody(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    compilation_cache.use_compilation_cache("auto")
    assert "compiled programs are not kept" in caplog.text
    assert vars(settings) == vars(Settings(None))


@pytest.mark.parametrize("folder", ["auto", "named"])
def test_a_folder_that_cannot_be_written_to_is_no_reason_to_stop(
    settings: Settings, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, folder: str
) -> None:
    (tmp_path / ".cache").write_text("a file in the place of the folder")
    name = "auto" if folder == "auto" else str(tmp_path / ".cache" / "x")
    compilation_cache.use_compilation_cache(name)
    assert "compiled programs are not kept" in caplog.text
    assert str(tmp_path / ".cache") in caplog.text
    assert vars(settings) == vars(Settings(None))


def test_what_is_set_is_said(
    settings: Settings, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = str(tmp_path / ".cache" / "pallas-paged")
    with caplog.at_level(logging.INFO):
        compilation_cache.use_compilation_cache("auto")
        compilation_cache.use_compilation_cache("auto")
    assert caplog.messages == [f"compiled programs of this process are kept in {folder}"]
    assert settings.jax_compilation_cache_dir == folder
    assert settings.jax_persistent_cache_min_compile_time_secs == 0


@pytest.mark.parametrize("asked", ["auto", None, "same"])
def test_the_cache_of_a_user_who_has_set_one_stays_as_it_is(
    settings: Settings, tmp_path: pathlib.Path, asked: str | None
) -> None:
    settings.jax_compilation_cache_dir = folder = str(tmp_path / "mine")
    compilation_cache.use_compilation_cache(folder if asked == "same" else asked)
    assert vars(settings) == vars(Settings(folder))
