"""What the compiled steps hold: the caches in place, and temporaries that do not grow with them.

And which logits they refuse.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_paged.engine import SamplingParams
from pallas_paged.engine.core.buckets import Bucket
from pallas_paged.engine.device.step import cannot_sample
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
