"""What `make kernels-full` compiled: every named program, from today's sources.

None spills registers but those of `KNOWN_SPILLS`.
"""

import pytest

from pallas_paged.ops.attention.config import SM80, SM90
from tests.kernels import full

JAX_VERSION = "0.12.0.1"
MOST_SMEM_BYTES = {
    "h100": SM90.smem_per_cta_bytes,
    "a100-40gb": SM80.smem_per_cta_bytes,
    "a100-80gb": SM80.smem_per_cta_bytes,
}
# Known, and in pallas_paged/README.md: bytes that the conversion of a quantised cache spills.
KNOWN_SPILLS: dict[str, int] = {
    "dim256-float8_e4m3fn-bfloat16-everything": 184,
    "dim256-int8-float16": 144,
}


@pytest.fixture(scope="module")
def rows():
    return full.read_table(JAX_VERSION)


@pytest.mark.parametrize("family", full.FAMILIES)
def test_every_program_was_compiled_from_these_sources(rows, family):
    expected = {(family, program.name, program.target) for program in programs(family)}
    sources = full.fingerprint(full.FAMILIES[family].modules)
    stale = expected - {row.key for row in rows if row.sources == sources}
    assert not stale, f"{len(stale)} programs changed or are new: run make kernels-full"
    assert len(expected) == len(programs(family)), "two programs of one name"


def test_no_program_is_left_over(rows):
    assert {row.key for row in rows} == {
        (family, program.name, program.target)
        for family in full.FAMILIES
        for program in programs(family)
    }


def test_nothing_else_spills_and_everything_fits(rows):
    assert {row.program: row.spill_bytes for row in rows if row.spill_bytes} == KNOWN_SPILLS
    for row in rows:
        assert row.warnings == "", row
        assert row.registers <= 255, row
        assert row.smem_bytes <= MOST_SMEM_BYTES[row.target], row


def programs(family):
    return full.FAMILIES[family].programs()


def test_the_fingerprint_is_of_code_alone(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    texts = {
        "one": '"""Docs."""\n\n\ndef f(x):\n    """Docs."""\n    return x + 1  # why\n',
        "two": "def f( x ):\n  return x+1\n",
        "other": "def f(x):\n    return x + 2\n",
    }
    for name, text in texts.items():
        (tmp_path / f"fingerprinted_{name}.py").write_text(text)
    found = {name: full.code_of(f"fingerprinted_{name}")[0] for name in texts}
    assert found["one"] == found["two"] != found["other"]


def test_the_fingerprint_follows_imports():
    names = full.sources_of(["pallas_paged.ops.attention.mosaic_gpu_decode"])
    assert {name.rpartition(".")[2] for name in names} >= {"config", "work_list"}
