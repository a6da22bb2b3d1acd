"""What devices exchange, read from the texts of compiled programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_paged.collectives import Collective, collectives

P = PartitionSpec
WHOLE_SPEC = P()


def compiled_text(function, *, out_specs=WHOLE_SPEC) -> str:
    """Returns the program of a function of each device's half of f32[8, 16], for two CPUs."""
    mesh = Mesh(np.array(jax.devices("cpu")[:2]), ("x",))
    on_each = jax.shard_map(
        function, mesh=mesh, in_specs=P("x"), out_specs=out_specs, check_vma=False
    )
    x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=NamedSharding(mesh, P("x")))
    return jax.jit(on_each).lower(x).compile().as_text()


HALF, WHOLE = 4 * 16 * 4, 8 * 16 * 4


def test_each_kind_with_what_it_gives() -> None:
    def run(x):
        summed = jax.lax.psum(x, "x")
        joined = jax.lax.all_gather(x, "x", axis=0, tiled=True)
        part = jax.lax.psum_scatter(x, "x", scatter_dimension=0, tiled=True)
        turned = jax.lax.ppermute(x, "x", [(0, 1), (1, 0)])
        return summed, joined, part, turned

    found = collectives(compiled_text(run, out_specs=(P(), P(), P("x"), P("x"))))
    assert sorted(found) == [
        Collective("all-gather", WHOLE),
        Collective("all-reduce", HALF),
        Collective("collective-permute", HALF),
        Collective("reduce-scatter", HALF // 2),
    ]


def test_a_program_without_any() -> None:
    assert collectives(compiled_text(lambda x: x + 1.0, out_specs=P("x"))) == []


def test_a_loop_counts_as_often_as_it_turns() -> None:
    """And a loop whose turns depend on data as nobody knows how often."""

    def run(x):
        x = jax.lax.fori_loop(0, 3, lambda _, y: jax.lax.psum(2.0 * y, "x"), jax.lax.psum(x, "x"))
        return jax.lax.while_loop(
            lambda y: jnp.sum(y) < 100.0, lambda y: jax.lax.psum(y + 1.0, "x"), x
        )

    found = collectives(compiled_text(run))
    assert {(one.kind, one.num_bytes) for one in found} == {("all-reduce", HALF)}
    assert sorted((one.num_times for one in found), key=str) == [1, 3, None]


def test_a_loop_in_a_loop() -> None:
    def turn(_, x):
        return jax.lax.fori_loop(0, 3, lambda i, y: jax.lax.psum(2.0 * y, "x"), x)

    (found,) = collectives(compiled_text(lambda x: jax.lax.fori_loop(0, 5, turn, x)))
    assert found.num_times == 15


@pytest.mark.parametrize(
    ("shape", "kind", "num_bytes"),
    [
        ("f32[4]{0}", "all-reduce-start", 16),
        ("(f32[4]{0}, bf16[8]{0})", "all-reduce-start", 32),
        ("((bf16[64,96]{1,0}), bf16[64,96]{1,0})", "all-reduce-start", 64 * 96 * 2),
        ("((f32[4]{0}, f32[8]{0}), (f32[4]{0}, f32[8]{0}))", "all-reduce-start", 48),
        ("(f32[2]{0}, f32[4]{0})", "all-gather-start", 16),
        ("((f32[2]{0}, s8[3]{0}), (f32[4]{0}, s8[6]{0}))", "all-gather-start", 22),
        ("(f32[4,2]{1,0}, f32[4,2]{1,0}, u32[], u32[])", "collective-permute-start", 32),
        ("((f32[8]{0}), f32[2]{0}, u32[])", "reduce-scatter-start", 8),
        ("(f32[4]{0}, bf16[8]{0})", "all-reduce", 32),
        ("f8e4m3fn[64,128]{1,0:T(8,128)}", "all-gather", 64 * 128),
        ("pred[]", "all-reduce", 1),
    ],
)
def test_the_forms_of_xlas_texts(shape: str, kind: str, num_bytes: int) -> None:
    """The halves of an exchange that is under way while others are computed, once."""
    text = f"""
ENTRY %main (p: f32[4]) -> f32[4] {{
  %p = f32[4]{{0}} parameter(0)
  %x.1 = {shape} {kind}(%p), channel_id=1, replica_groups={{{{0,1}}}}, to_apply=%add
  ROOT %y.1 = f32[4]{{0}} {kind.replace("start", "done")}(%x.1)
}}

%add (a: f32[], b: f32[]) -> f32[] {{
  ROOT %sum = f32[] add(%a, %b)
}}
"""
    if not kind.endswith("start"):
        text = text.replace(f"{kind}(%x.1)", "copy(%x.1)")
    assert collectives(text) == [Collective(kind.removesuffix("-start"), num_bytes)]


def test_a_part_that_a_first_half_calls() -> None:
    """The other form of an exchange in two halves."""
    text = """
%wrapped (p: f32[4]) -> f32[4] {
  ROOT %sum = f32[4]{0} all-reduce(%p), channel_id=1
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %begun = ((f32[4]{0}), f32[4]{0}) async-start(%p), calls=%wrapped
  ROOT %done = f32[4]{0} async-done(%begun)
}
"""
    assert collectives(text) == [Collective("all-reduce", 16)]
