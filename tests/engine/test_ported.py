"""A ported folder is the same model to the engine as the Hugging Face folder it came from."""

from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from pallas_paged.engine import LLM, SamplingParams
from pallas_paged.models import load_model
from pallas_paged.models.attend import dense_attend, dense_metadata
from pallas_paged.models.demo import DEMO_MODEL
from pallas_paged.models.porting import port


@pytest.fixture(scope="module")
def ported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ported") / "demo"
    port(DEMO_MODEL, out)
    return out


def test_the_same_text_from_either_form(ported: Path) -> None:
    options = {"max_num_seqs": 2, "max_num_batched_tokens": 32, "num_blocks": 16}
    options |= {"compilation_cache_dir": None, "deterministic": True, "max_model_len": 64}
    params = SamplingParams(temperature=0, max_tokens=8)
    texts = []
    for folder in (DEMO_MODEL, ported):
        (output,) = LLM(folder, **options).generate("def main(", params, use_tqdm=False)
        texts.append(output.outputs[0].text)
    assert texts[0] == texts[1] != ""


def test_the_same_logits_from_either_form(ported: Path) -> None:
    @jax.jit
    def logits(state, ids):
        model = nnx.merge(graph, state)
        caches = (None,) * model.config.num_layers
        hidden, _ = model(ids, dense_metadata(1, 12), caches, attend=dense_attend)
        return model.compute_logits(hidden)

    ids = np.arange(5, 17, dtype=np.int32)
    found = []
    for folder in (DEMO_MODEL, ported):
        graph, state = nnx.split(load_model(folder, "float32"))
        found.append(np.asarray(logits(state, ids)))
    assert found[0].tobytes() == found[1].tobytes()


def test_half_a_port_is_refused(ported: Path) -> None:
    manifest = ported / "port.json"
    text = manifest.read_text()
    manifest.unlink()
    with pytest.raises(ValueError, match=r"demo is an incomplete port: it has params and no port"):
        LLM(ported)
    manifest.write_text(text)
