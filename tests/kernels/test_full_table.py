"""What `make kernels-full` made: every named program compiled and every named case interpreted.

From today's sources, with each JAX of `JAX_VERSIONS`. None spills registers.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from benchmarks.attention_cases.decode import decode_cases
from pallas_paged.deviceless import KernelResources
from pallas_paged.ops.attention.ampere import problem as ampere_problem
from pallas_paged.ops.attention.blackwell import problem as blackwell_problem
from pallas_paged.ops.attention.blackwell.problem import SM100
from pallas_paged.ops.attention.config import SM80, SM86, SM90, shared_memory_bytes
from pallas_paged.ops.attention.hopper import decode_problem
from tests.kernels import ampere_cases, full, interpreted_cases
from tests.kernels.covering import covering, pairs
from tests.kernels.fingerprint import code_of, kernels_hash, sources_of

JAX_VERSIONS = ("0.11.2", "0.12.0.1")  # the oldest that we support, and the newest
MOST_SMEM_BYTES = {
    "h100": SM90.smem_per_cta_bytes,
    "a100-40gb": SM80.smem_per_cta_bytes,
    "a100-80gb": SM80.smem_per_cta_bytes,
    "a10": SM86.smem_per_cta_bytes,
    "l4": SM86.smem_per_cta_bytes,
    "b200": SM100.smem_per_cta_bytes,
}

each_version = pytest.mark.parametrize("version", JAX_VERSIONS)


@each_version
@pytest.mark.parametrize("family", full.FAMILIES)
def test_every_program_is_there_from_these_sources(version, family):
    table, sources = full.FAMILIES[family].table, full.FAMILIES[family].fingerprint
    up_to_date = {
        full.key_of(row) for row in full.read_table(table, version) if row.sources == sources
    }
    stale = keys(family) - up_to_date
    assert not stale, f"{len(stale)} programs changed or are new: run make kernels-full"
    assert len(keys(family)) == len(named(family)), "two programs of one name"


@each_version
@pytest.mark.parametrize("table", full.TABLES)
def test_no_program_is_left_over(version, table):
    families = [name for name, family in full.FAMILIES.items() if family.table == table]
    rows = full.read_table(table, version)
    assert {full.key_of(row) for row in rows} == set().union(*map(keys, families))


@each_version
def test_nothing_spills_and_everything_fits(version):
    for row in full.read_table("compiled", version):
        assert row.spill_bytes == 0, row
        assert row.warnings == "", row
        assert row.registers <= 255, row
        assert row.smem_bytes <= MOST_SMEM_BYTES[row.target], row


@each_version
def test_attention_takes_the_shared_memory_that_was_computed(version):
    """By which a configuration is checked; sm_90a's and sm_100a's code has barriers elsewhere.

    And the registers of an SM are enough for its CTAs, given out by 8 a thread.
    """
    rows = {full.key_of(row): row for row in full.read_table("compiled", version)}
    for case in decode_cases():
        computed = shared_memory_bytes(decode_problem.scratch_types(case.problem, case.config))
        barriers = 8 * (3 * case.config.num_stages + 1)
        assert rows["decode", case.name, "h100"].smem_bytes == computed - barriers, case.name
    for case in ampere_cases.compile_cases():
        config, row = case.chosen_config, rows["ampere", case.name, case.target]
        computed = shared_memory_bytes(ampere_problem.scratch_types(case.problem, config))
        assert row.smem_bytes == computed, case.name
        assert config.ctas_per_sm * -(-row.registers // 8) * 8 * 128 <= 65536, case.name
    for case in ampere_cases.blackwell_cases():
        config, row = case.chosen_config, rows["blackwell", case.name, case.target]
        computed = shared_memory_bytes(blackwell_problem.shared_types(case.problem, config))
        barriers = 8 * (2 * config.num_stages + 3)
        assert row.smem_bytes == computed - barriers, case.name
        assert config.ctas_per_sm * -(-row.registers // 8) * 8 * 128 <= 65536, case.name


@each_version
def test_every_error_is_tolerated(version):
    assert all(0 < row.error <= 1 for row in full.read_table("interpreted", version))


@functools.cache
def named(family):
    """Returns the names and targets of a family's programs; to build these takes seconds."""
    return [(program.name, program.target) for program in full.FAMILIES[family].programs()]


def keys(family):
    return {(family, name, target) for name, target in named(family)}


def test_the_fingerprint_is_of_code_alone(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    texts = {
        "one": '"""Docs."""\n\n\ndef f(x):\n    """Docs."""\n    return x + 1  # why\n',
        "two": "def f( x ):\n  return x+1\n",
        "other": "def f(x):\n    return x + 2\n",
    }
    for name, text in texts.items():
        (tmp_path / f"fingerprinted_{name}.py").write_text(text)
    found = {name: code_of(f"fingerprinted_{name}")[0] for name in texts}
    assert found["one"] == found["two"] != found["other"]


def test_the_fingerprint_follows_imports():
    names = sources_of(["pallas_paged.ops.attention.hopper.decode"])
    assert {name.rpartition(".")[2] for name in names} >= {"config", "work_list"}


def adding(number):
    """Returns a function of f32[128] that adds a number in a kernel."""

    def body(source, destination):
        destination[...] = source[...] + number

    return kernel(body)


def kernel(body):
    out_type = jax.ShapeDtypeStruct((128,), jnp.float32)
    return plgpu.kernel(body, out_type=out_type, grid=(1,), grid_names=("cta",))


def test_the_hash_of_kernels_is_of_what_they_compute_alone():
    def body(source, destination):
        destination[...] = source[...] + 1.0

    x = jax.ShapeDtypeStruct((128,), jnp.float32)
    known = kernels_hash("h100", adding(1.0), x)
    assert kernels_hash("h100", kernel(body), x) == known  # from other lines of code
    assert kernels_hash("h100", lambda x: 2 * adding(1.0)(x * x), x) == known
    assert kernels_hash("h100", adding(2.0), x) != known
    assert kernels_hash("h100", lambda x: adding(1.0)(adding(1.0)(x)), x) != known
    with pytest.raises(AssertionError, match="no Mosaic GPU kernel"):
        kernels_hash("h100", lambda x: x + 1, x)


def test_kernels_that_are_known_are_not_compiled_again(monkeypatch):
    compiled = KernelResources("name", registers=3, spill_bytes=0, smem_bytes=5, warnings=())
    monkeypatch.setattr(full, "kernel_resources", lambda *args: (compiled,))
    monkeypatch.setattr(full, "kernels_hash", lambda *args: "today's")
    program = full._compile("program", "h100", lambda: None)
    before = full.CompiledRow("decode", "program", "h100", "old", "today's", 1, 0, 2, "")
    assert program.measure(before) == before[4:]
    for other in (None, before._replace(kernels="other")):
        assert program.measure(other) == ("today's", 3, 0, 5, "")


def test_every_two_values_of_the_interpreted_cases_meet():
    """But those that the decode kernel leaves to the prefill kernel: many columns."""
    for kernel, factors in interpreted_cases.FACTORS.items():
        met = set().union(*(pairs(case.values) for case in interpreted_cases.cases(kernel)))
        every = set().union(*map(pairs, product_of_two(factors)))
        missing = [dict(pair) for pair in every - met]
        if kernel == "decode":
            assert all(pair["queries"] == 8 for pair in missing)
            assert sorted(pair["group"] for pair in missing) == [7, 8, 16]
        else:
            assert not missing


def test_every_window_leaves_something_out():
    for kernel in interpreted_cases.FACTORS:
        for case in interpreted_cases.cases(kernel):
            window = case.spec.sliding_window
            assert window is None or 1 < window < max(case.spec.seq_lens), case.name


def product_of_two(factors):
    for one, other in itertools.combinations(factors, 2):
        for values in itertools.product(factors[one], factors[other]):
            yield dict(zip((one, other), values, strict=True))


def test_rows_that_are_not_allowed_are_left_out():
    factors = {"a": (1, 2, 3), "b": (1, 2), "c": (1, 2)}
    rows = covering(factors, lambda row: row["a"] != 3 or row["b"] == 1)
    assert rows == covering(factors, lambda row: row["a"] != 3 or row["b"] == 1)
    met = set().union(*map(pairs, rows))
    every = set().union(*map(pairs, product_of_two(factors)))
    assert every - met == {frozenset({("a", 3), ("b", 2)})}
