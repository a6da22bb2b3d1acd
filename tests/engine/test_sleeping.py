"""An engine gives its memory back and gets it again: nothing is compiled, nothing is stale."""

import gc
from typing import Any

import jax
import pytest
from flax import nnx

from pallas_paged.engine import LLM, SamplingParams
from pallas_paged.engine.device.pool_size import num_bytes
from pallas_paged.models import CausalLM, load_model
from pallas_paged.models.demo import DEMO_MODEL

PROMPTS = ["def main():\n", "class Tree:\n    def __init__(self" * 3]
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
PENALISED = SamplingParams(temperature=0, max_tokens=20, frequency_penalty=1, ignore_eos=True)
OPTIONS: dict[str, Any] = {"max_num_seqs": 2, "num_blocks": 65, "background_compilation": False}


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return load_model(DEMO_MODEL, "float32")


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(DEMO_MODEL, dtype="float32", **OPTIONS)


def tokens(llm: LLM) -> list[tuple[int, ...]]:
    params = [GREEDY, PENALISED]  # the second has state on the device
    return [o.outputs[0].token_ids for o in llm.generate(PROMPTS, params, use_tqdm=False)]


def live_bytes() -> int:
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


@pytest.mark.parametrize("level", [1, 2])
def test_memory_is_given_back_and_comes_again(llm: LLM, level: int) -> None:
    expected, awake = tokens(llm), live_bytes()
    pool, weights = num_bytes(llm.runner.kv_caches), num_bytes(llm.runner.programs.params)
    traces = dict(llm.runner.programs.num_traces)
    freed = llm.sleep(level)
    assert llm.is_sleeping
    assert freed.kv_cache_bytes == pool
    assert (freed.weights_bytes, freed.shared_weights_bytes) == (weights if level == 2 else 0, 0)
    given_back = freed.kv_cache_bytes + freed.weights_bytes
    assert awake - live_bytes() >= given_back  # the rows' state too
    assert f"freed {pool / 2**20:.1f} MiB of the KV pool" in str(freed)
    with pytest.raises(RuntimeError, match="the engine sleeps, without kv_cache"):
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    with pytest.raises(RuntimeError, match="the engine sleeps"):
        llm.pin_prefix(PROMPTS[1])
    assert llm.sleep(1).kv_cache_bytes == 0
    llm.wake_up()
    assert not llm.is_sleeping
    assert tokens(llm) == expected
    assert live_bytes() == awake
    assert llm.runner.programs.num_traces == traces
    llm.engine.check_idle()


def test_what_tags_name_comes_first(llm: LLM) -> None:
    expected, version = tokens(llm), llm.weights_version
    llm.sleep(2)
    llm.wake_up(["weights"])
    assert llm.weights_version == version + 1  # read again, which may be others
    with pytest.raises(RuntimeError, match="without kv_cache"):
        tokens(llm)
    llm.wake_up(["weights"])
    assert llm.weights_version == version + 1
    llm.wake_up(["kv_cache"])
    assert tokens(llm) == expected


def test_a_trainer_brings_the_weights_back(model: CausalLM) -> None:
    llm = LLM.from_model(model, DEMO_MODEL, **OPTIONS)
    expected = tokens(llm)
    freed = llm.sleep(2)
    assert freed.weights_bytes == 0
    assert freed.shared_weights_bytes == num_bytes(nnx.state(model))
    with pytest.raises(RuntimeError, match="call update_weights"):
        llm.wake_up()
    llm.update_weights(model)
    assert llm.is_sleeping
    llm.wake_up(["kv_cache"])
    assert tokens(llm) == expected


def test_pinned_prefixes_wake_up_too(llm: LLM) -> None:
    num_kept = llm.pin_prefix(PROMPTS[1])
    llm.sleep(1)
    llm.wake_up()
    (output,) = llm.generate(PROMPTS[1], GREEDY, use_tqdm=False)
    assert output.num_cached_tokens >= num_kept > 0
    llm.unpin_prefix(PROMPTS[1])
    llm.engine.check_idle()


def test_nobody_sleeps_while_requests_run(llm: LLM) -> None:
    stream = llm.stream(PROMPTS, GREEDY)
    next(stream)
    with pytest.raises(RuntimeError, match="requests are unfinished"):
        llm.sleep()
    assert sum(output.finished for output in stream) == len(PROMPTS)


@pytest.mark.parametrize("level", [0, 3, "1", True])
def test_unknown_levels(llm: LLM, level: Any) -> None:
    with pytest.raises(ValueError, match="level="):
        llm.sleep(level)


@pytest.mark.parametrize("tags", ["weights", ["pool"], ["weights", "x"]])
def test_unknown_tags(llm: LLM, tags: Any) -> None:
    with pytest.raises(ValueError, match="tags="):
        llm.wake_up(tags)
