"""What the compiled steps hold: the caches in place, and temporaries that do not grow with them.

And which logits they refuse.
"""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_paged.engine import SamplingParams
from pallas_paged.engine.core.buckets import Bucket
from pallas_paged.engine.core.step_inputs import packed_size, views
from pallas_paged.engine.device import step
from pallas_paged.engine.device.sampling import cannot_sample
from pallas_paged.engine.device.unpack import attention_metadata, unpack, wanted_tokens
from pallas_paged.models.attend import paged_attend
from pallas_paged.models.decoder import Decoder
from pallas_paged.models.llama import LlamaConfig
from tests.engine.serving import assert_idle, make_llm

DECODE = Bucket(4, 4, 64, is_decode=True)
MIXED = Bucket(32, 4, 64, is_decode=False)


@pytest.mark.parametrize("bucket", [DECODE, MIXED], ids=["decode", "mixed"])
@pytest.mark.parametrize("name", ["llama-gqa-llama3", "opt-prenorm"])
def test_the_caches_are_updated_in_place(name: str, bucket: Bucket) -> None:
    llm = make_llm(name, max_num_seqs=4, max_num_batched_tokens=32, num_blocks=600)
    caches = llm.runner.kv_caches
    compiled = llm.runner.programs.lower(bucket).compile()
    text = compiled.as_text()
    shape = ",".join(map(str, caches[0].k.shape))
    aliases = re.search(r"input_output_alias=\{(.*?)\}, entry", text).group(1)
    rows = llm.runner.rows
    num_donated = 2 * len(caches) + len(rows)
    assert aliases.count("may-alias") + aliases.count("must-alias") >= num_donated
    tables = ",".join(map(str, rows.block_tables.shape))
    copies = re.findall(rf"= (?:f32\[{shape}\]|s32\[{tables}\])\S* copy\(.*", text)
    assert not copies
    one_cache = caches[0].k.nbytes
    assert compiled.memory_analysis().temp_size_in_bytes < one_cache


def test_temporaries_do_not_grow_with_the_pool() -> None:
    temporaries = []
    for num_blocks in (100, 900):
        llm = make_llm(
            "llama-gqa-llama3", max_num_seqs=4, max_num_batched_tokens=32, num_blocks=num_blocks
        )
        temporaries.append(llm.runner.programs.temporary_bytes(DECODE))
    assert temporaries[1] <= temporaries[0] * 1.02


def test_the_programs_keep_no_cache_alive() -> None:
    """A runner that recovers has room for one pool, not for two."""
    llm = make_llm("opt-prenorm", max_num_seqs=4, max_num_batched_tokens=32, num_blocks=50)
    kept = jax.tree.leaves(llm.runner.programs.kv_caches)
    assert len(kept) == 2 * llm.model_config.num_layers
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in kept)


@pytest.mark.parametrize("lost", ["kv_caches", "rows", "row_state"])
def test_an_engine_goes_on_after_a_step_that_took_its_arrays(lost: str) -> None:
    llm = make_llm("llama-gqa-llama3", max_num_seqs=4, max_num_batched_tokens=32)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, presence_penalty=0.5)
    prompts = [{"prompt_token_ids": list(range(5, 25))}, {"prompt_token_ids": [7, 8, 9]}]
    before = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
    for leaf in jax.tree.leaves(getattr(llm.runner, lost)):
        leaf.delete()
    with pytest.raises(RuntimeError, match="deleted"):
        llm.generate(prompts, params)
    assert [output.outputs[0].token_ids for output in llm.generate(prompts, params)] == before
    assert_idle(llm)


@pytest.mark.parametrize("size", [3, 300])
def test_rows_that_cannot_be_sampled(size: int) -> None:
    inf = np.inf
    ends = [(0, 0), (0, -inf), (-inf, -3e38), (0, np.nan), (-inf, np.nan), (0, inf), (inf, -inf)]
    rows = np.full((8, size), -inf, np.float32)
    for row, (first, last) in zip(rows, ends, strict=False):
        row[0], row[-1] = first, last
    refused = np.asarray(jax.jit(cannot_sample)(jnp.asarray(rows)))
    assert refused.tolist() == [False] * 3 + [True] * 5


def test_the_last_layer_attends_to_the_tokens_that_are_sampled_behind() -> None:
    """Of a prompt, of a fork of it without tokens of its own, and of a decoded sequence."""
    shape = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        num_layers=3,
        num_q_heads=2,
        num_kv_heads=1,
        head_dim=4,
        max_position_embeddings=32,
        intermediate_size=12,
    )
    model = Decoder(shape, dtype=jnp.float32, rngs=nnx.Rngs(0))
    bucket, count = Bucket(12, 4, 3, is_decode=False), 6
    packed = np.zeros(packed_size(bucket), np.int32)
    x = views(packed, bucket)
    x.input_ids[:count] = [3, 1, 4, 1, 5, 9]
    x.positions[:count] = [0, 1, 2, 3, 4, 6]
    x.slot_mapping[:count] = [4, 5, 6, 7, 8, 14]
    x.seq_lens[:3] = [5, 0, 7]
    x.query_start_loc[:] = [0, 5, 5, 6, 6]
    x.logits_indices[:3] = [4, 4, 5]
    tables = jnp.array([[1, 2, 0], [0, 0, 0], [4, 3, 0], [0, 0, 0]], jnp.int32)
    x.rows[:] = [0, 1, 2, 3]
    caches = tuple(
        jax.tree.map(lambda a, key=key: jax.random.normal(key, a.shape), spec.zeros(5))
        for spec, key in zip(
            shape.cache_specs(4, jnp.float32), jax.random.split(jax.random.key(0), 3), strict=True
        )
    )
    seen = []

    def attend(q: jax.Array, *args: Any, **options: Any) -> Any:
        seen.append(len(q))
        return paged_attend(q, *args, **options)

    inputs = unpack(jnp.asarray(packed), bucket)
    metadata = attention_metadata(inputs, tables, bucket)
    wanted = wanted_tokens(inputs, metadata, bucket)
    assert wanted is not None
    every, full = model(inputs.input_ids, metadata, jax.tree.map(jnp.copy, caches), attend=attend)
    hidden, updated = model(inputs.input_ids, metadata, caches, attend=attend, wanted=wanted)
    assert seen == [12, 12, 12, 12, 12, 4]
    places = inputs.logits_indices[:3]
    np.testing.assert_allclose(hidden[:3], every[places], rtol=1e-5, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, updated, full)
    assert wanted.metadata is not None
    np.testing.assert_array_equal(wanted.metadata.query_start_loc, [0, 1, 2, 3, 3])
    np.testing.assert_array_equal(wanted.metadata.seq_lens, [5, 5, 7, 0])
    assert wanted_tokens(inputs, metadata, Bucket(12, 4, 3, False, is_full=True)) is None
    assert wanted_tokens(inputs, metadata, Bucket(4, 4, 3, is_decode=True)) is None


@pytest.mark.parametrize(
    ("bucket", "expected"),
    [
        (Bucket(32, 4, 64, is_decode=False), [{32: 3, 4: 2}, {4: 2}]),
        (Bucket(4, 4, 64, is_decode=False), [{4: 3}, {4: 2}]),
        (Bucket(32, 4, 64, is_decode=False, is_full=True), [{32: 3}, {4: 2}]),
        (Bucket(4, 4, 64, is_decode=True), [{4: 3}, {4: 2}]),
    ],
    ids=str,
)
def test_products_leave_out_what_is_padding(
    monkeypatch: pytest.MonkeyPatch, bucket: Bucket, expected: list[dict[int, int]]
) -> None:
    """Two of four sequences are there, with three tokens (a made-up step)."""
    llm = make_llm("llama-mqa-linear", max_num_seqs=4, max_num_batched_tokens=32, num_blocks=600)
    programs, seen = llm.runner.programs, []

    @contextlib.contextmanager
    def noted(counts: dict[int, jax.Array]) -> Iterator[None]:
        jax.debug.callback(seen.append, counts, ordered=True)
        yield

    monkeypatch.setattr(step, "rows_in_use", noted)
    packed = np.zeros(packed_size(bucket), np.int32)
    x = views(packed, bucket)
    x.query_start_loc[:] = [0, 2, 3, 3, 3]
    x.seq_lens[:2] = [2, 1]
    x.logits_indices[:2] = [1, 2]
    x.rows[:] = x.sample_rows[:] = [0, 1, 4, 4]
    state = programs.new_row_state() if bucket.is_full else None
    jax.block_until_ready(
        programs(bucket, llm.runner.kv_caches, llm.runner.rows, jnp.asarray(packed), state)
    )
    jax.effects_barrier()
    assert [{n: int(count) for n, count in counts.items()} for counts in seen] == expected
