import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_paged.models import CausalLM, load_model
from pallas_paged.models.attend import dense_attend, dense_metadata
from tests.models.paged_run import PagedRun
from tests.models.references import REFERENCES, load_reference

LOGITS_TOLERANCE = 1e-4
NUM_ROWS = 32  # one number for all tests, so that they share compiled steps


@functools.cache
def float32_model(name: str) -> CausalLM:
    return load_model(load_reference(name).path, "float32")


def test_the_references_are_there():
    assert len(REFERENCES) == 13
    for name in REFERENCES:
        reference = load_reference(name)
        assert len(reference.logits) == 8
        assert [len(x) for x in reference.logits] == [len(x) for x in reference.prompts[:8]]
        comparable = [reference.num_comparable(i) for i in range(len(reference.prompts))]
        assert np.mean(np.array(comparable) < reference.greedy.shape[1]) < 0.01


def assert_logits(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> None:
    for row, expected in enumerate(theirs):
        np.testing.assert_allclose(ours[row], expected, atol=LOGITS_TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", REFERENCES)
def test_prefill_then_greedy_decode(name):
    reference = load_reference(name)
    run = PagedRun(float32_model(name), num_seqs=NUM_ROWS)
    logits = run.in_chunks(reference.prompts, max(map(len, reference.prompts)))
    assert_logits(logits, reference.logits)

    tokens = [of_row[-1:].argmax(-1) for of_row in logits]
    generated = [tokens]
    for _ in range(reference.greedy.shape[1] - 1):
        tokens = [of_row.argmax(-1) for of_row in run(tokens, 1)]
        generated.append(tokens)
    ours = np.array(generated)[:, :, 0].T
    for row, theirs in enumerate(reference.greedy):
        n = reference.num_comparable(row)
        assert ours[row, :n].tolist() == theirs[:n].tolist()


@pytest.mark.parametrize(
    ("name", "windows"),
    [
        ("qwen2-sliding", (None, 6, 6)),  # by max_window_layers
        ("qwen3-layer-types", (5, None, 5)),
        ("mistral-sliding", (7, 7)),
        ("mistral-full", (None, None)),
        ("qwen2-tied", (None, None)),
    ],
)
def test_sliding_windows_of_the_layers(name, windows):
    assert float32_model(name).config.sliding_windows == windows
    assert len(load_reference(name).prompts[7]) > 6 * max((w or 0) for w in windows)


# One without windows, windows in all layers and in some, OPT; whole prompts are held for all.
@pytest.mark.parametrize(
    "name",
    ["llama-gqa-llama3", "mistral-sliding", "opt-postnorm-projected", "qwen3-layer-types"],
)
@pytest.mark.parametrize("chunk", [5, 1], ids=["chunked prefill", "decode"])
def test_prompt_in_parts(name, chunk):
    reference = load_reference(name)
    prompts = reference.prompts[: len(reference.logits)]
    unused_rows = (np.zeros(0, np.int32),) * (NUM_ROWS - len(prompts))
    run = PagedRun(float32_model(name), num_seqs=NUM_ROWS)
    assert_logits(run.in_chunks((*prompts, *unused_rows), chunk), reference.logits)


@pytest.mark.parametrize("name", ["llama-gqa-llama3", "opt-prenorm", "qwen3-layer-types"])
def test_dense_attention(name):
    reference, model = load_reference(name), float32_model(name)
    prompt, theirs = reference.prompts[7], reference.logits[7]

    @jax.jit
    def run(ids):
        caches = (None,) * model.config.num_layers
        hidden, _ = model(ids, dense_metadata(2, len(prompt)), caches, attend=dense_attend)
        return model.compute_logits(hidden)

    logits = run(jnp.asarray(np.tile(prompt, 2))).reshape(2, *theirs.shape)
    assert_logits(logits, [theirs, theirs])


@pytest.mark.parametrize("name", [name for name in REFERENCES if not name.startswith("opt")])
def test_rotary_angles(name):
    reference, config = load_reference(name), float32_model(name).config
    np.testing.assert_allclose(config.rope.inv_freq(config.head_dim), reference.inv_freq, rtol=5e-7)


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [
        # Relative, after 2 or 3 layers of random weights: several units of the last place, which
        # is 2^-8 of a bfloat16 and 2^-11 of a float16.
        ("llama-gqa-llama3", "bfloat16", 0.03),
        ("opt-prenorm", "bfloat16", 0.03),
        ("opt-prenorm", "float16", 0.004),
    ],
)
def test_16_bit_logits_stay_near(name, dtype, tolerance):
    reference = load_reference(name)
    model = load_model(reference.path, dtype)
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(dtype)}
    run = PagedRun(model, num_seqs=8, dtype=dtype)
    ours = np.concatenate(run.in_chunks(reference.prompts[:8], 48))
    theirs = np.concatenate(reference.logits)
    assert ours.dtype == np.float32
    assert np.sqrt(np.mean((ours - theirs) ** 2) / np.mean(theirs**2)) < tolerance


@pytest.mark.parametrize("name", ["llama-gqa-llama3", "opt-prenorm"])
@pytest.mark.parametrize(("cache_dtype", "tolerance"), [("float8_e4m3fn", 0.15), ("int8", 0.03)])
def test_logits_over_a_quantised_cache_stay_near(name, cache_dtype, tolerance):
    """Relative error of float32 logits, after 2 or 3 layers of random weights.

    A row of 16 standard-normal numbers is rounded by 2^-4 / sqrt(12) of each in float8_e4m3fn and
    by 2 / 127 / sqrt(12) in int8, 2 % and 0.5 % of their size; layers add up several of these.
    """
    reference = load_reference(name)
    run = PagedRun(float32_model(name), num_seqs=8, dtype=cache_dtype)
    ours = np.concatenate(run.in_chunks(reference.prompts[:8], 48))
    theirs = np.concatenate(reference.logits)
    assert np.sqrt(np.mean((ours - theirs) ** 2) / np.mean(theirs**2)) < tolerance
