"""Every dtype is named: with `jax_enable_x64` no program of an engine computes in 64 bits."""

from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from pallas_paged.engine.config import LOGPROBS_MODES
from pallas_paged.engine.core.buckets import Bucket
from pallas_paged.engine.device.programs import StepPrograms
from pallas_paged.models import ModelConfig
from pallas_paged.models.llama import LlamaConfig
from pallas_paged.models.opt import OPTConfig
from pallas_paged.models.registry import FAMILIES
from pallas_paged.models.rope_scaling import YarnRope
from tests.wide_types import wide_types

BUCKETS = (
    Bucket(4, 4, 16, is_decode=True),
    Bucket(4, 4, 16, is_decode=True, is_full=True),
    Bucket(16, 4, 16, is_decode=False, is_full=True),
    Bucket(4, 4, 16, is_decode=True, num_steps=2, has_logprobs=True),
    Bucket(16, 4, 16, is_decode=False, has_logprobs=True),
    Bucket(16, 4, 16, is_decode=False, num_drafts=2, has_logprobs=True),
)
SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_layers": 1,
    "num_q_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
YARN = YarnRope(factor=4.0, original_max_position_embeddings=32)
SHAPES = (
    LlamaConfig(**SIZES, num_kv_heads=2, intermediate_size=64, rope=YARN),
    OPTConfig(**SIZES, num_kv_heads=4, ffn_dim=64, word_embed_proj_dim=32),
)


@pytest.mark.parametrize("mode", LOGPROBS_MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.architecture)
def test_the_programs_of_a_step(
    shape: ModelConfig, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: set[str] = set()
    hidden = jax.ShapeDtypeStruct((16, 32), jnp.bfloat16)

    def trace(_: Any, jitted: Any, *args: Any) -> Any:
        found.update(wide_types(jitted, *args))
        return mock.Mock(**{"out_info.hidden": hidden})

    monkeypatch.setattr(StepPrograms, "_lower", trace)
    with jax.enable_x64(True):
        family: Any = FAMILIES[shape.architecture].model
        model = nnx.eval_shape(lambda: family(shape, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
        caches = tuple(spec.shapes(20) for spec in shape.cache_specs(8, jnp.int8))
        programs = StepPrograms(model, caches, 4, 20, logprobs_width=32, logprobs_mode=mode)
        for name in (*BUCKETS, *programs.others(BUCKETS)):
            programs.lower(name)
    assert found == set()
