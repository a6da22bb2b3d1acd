"""No compiled step copies, transposes or converts a weight or a cache: what it reads lies ready.

Once every step transposed most of the weights, because a product's weight had three axes; nobody
saw it but by measuring. For GPUs `test_whole_step_deviceless.py` asks the same.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from pallas_paged.engine.core.buckets import Bucket
from pallas_paged.engine.core.table_edits import NUM_ENTRIES
from pallas_paged.engine.device.block_programs import BlockPrograms
from pallas_paged.engine.device.programs import StepPrograms
from pallas_paged.models.llama import LlamaConfig
from pallas_paged.models.opt import OPTConfig
from pallas_paged.models.registry import FAMILIES
from pallas_paged.moves import moves
from pallas_paged.ops.product.cpu.multiply import MAX_ROWS

# No activation has as many elements as a weight or an array of a cache.
LLAMA = LlamaConfig(
    vocab_size=2018,
    hidden_size=224,
    intermediate_size=368,
    num_layers=1,
    num_q_heads=6,
    num_kv_heads=2,
    head_dim=32,
    max_position_embeddings=512,
)
OPT = OPTConfig(
    vocab_size=2018,
    hidden_size=224,
    ffn_dim=368,
    num_layers=1,
    num_q_heads=7,
    num_kv_heads=7,
    head_dim=32,
    max_position_embeddings=1111,
    word_embed_proj_dim=96,
)
TIED = dataclasses.replace(LLAMA, tie_word_embeddings=True)


def compiled(config, bucket, dtype=jnp.float32, cache_dtype=None):
    """Returns a step's text, and what it may not move."""
    build = FAMILIES[config.architecture].model
    model = nnx.eval_shape(lambda: build(config, dtype=dtype, rngs=nnx.Rngs(0)))
    specs = config.cache_specs(16, dtype if cache_dtype is None else cache_dtype)
    caches = tuple(spec.shapes(777) for spec in specs)
    programs = StepPrograms(model, caches, 16, 20, 32)
    text = programs.lower(bucket).compile().as_text()
    assert text is not None
    return text, jax.tree.leaves((programs.params, caches))


def moved(*args, **kwargs):
    return moves(*compiled(*args, **kwargs))


@pytest.mark.parametrize("config", [LLAMA, TIED, OPT], ids=["llama", "tied", "opt"])
@pytest.mark.parametrize(
    "bucket",
    [Bucket(1, 1, 20, True), Bucket(4, 4, 20, True, True), Bucket(128, 16, 20, False)],
    ids=["one", "decode", "mixed"],
)
def test_float32_on_a_cpu(config, bucket):
    assert moved(config, bucket) == []


def test_a_quantised_cache_on_a_cpu():
    assert moved(LLAMA, Bucket(4, 4, 20, True), cache_dtype=jnp.int8) == []


def test_programs_beside_the_step_on_a_cpu():
    """Copies of blocks, and the log-probabilities of prompts."""
    build = FAMILIES[LLAMA.architecture].model
    model = nnx.eval_shape(lambda: build(LLAMA, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    caches = tuple(spec.shapes(777) for spec in LLAMA.cache_specs(16, jnp.float32))
    blocks = BlockPrograms(caches, 16, swaps=True)
    for name, size in (("copy", 4), ("gather", 8), ("scatter", 8)):
        text = blocks.lower(name, size).compile().as_text()
        assert moves(text, jax.tree.leaves(caches)) == [], name
    programs = StepPrograms(model, caches, 16, 777, 32)
    edit = programs.lower(("edit_tables", NUM_ENTRIES)).compile()
    memory, tables_bytes = edit.memory_analysis(), 4 * 17 * 777
    assert memory.alias_size_in_bytes >= tables_bytes > memory.temp_size_in_bytes
    assert re.findall(r"= s32\[(?:17,777|13209)\]\S* copy\(.*", edit.as_text()) == []
    hidden = jax.ShapeDtypeStruct((32, LLAMA.hidden_size), jnp.float32)
    programs._hidden[32] = hidden
    text = programs.lower(("prompt_logprobs", 32)).compile().as_text()
    assert moves(text, jax.tree.leaves(programs.params)) == []


def test_one_16_bit_row_converts_no_weight_that_two_do_not():
    """Whether a CPU has products of 16-bit numbers at all depends on the CPU."""
    one, two = (moved(LLAMA, Bucket(n, n, 20, True), jnp.bfloat16) for n in (1, 2))
    assert len(one) == len(two)


@pytest.mark.parametrize("num_rows", [1, 64, MAX_ROWS, 2 * MAX_ROWS])
def test_every_product_of_few_rows_is_our_own(num_rows):
    text, _ = compiled(LLAMA, Bucket(num_rows, num_rows, 20, True))
    own = len(re.findall(r"custom-call\(.*pallas_paged\.product", text))
    others = len(re.findall(r" dot\(", text))
    count = 4 * LLAMA.num_layers + 1
    assert (own, others) == ((count, 0) if num_rows <= MAX_ROWS else (0, count))
