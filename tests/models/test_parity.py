import dataclasses

import numpy as np
import pytest

from pallas_paged.models import load_model
from pallas_paged.models.parity import Reference, compare
from tests.models.references import load_reference

NAME = "qwen3-tied"


@pytest.fixture(scope="module")
def reference() -> Reference:
    """A part of a recorded one, which costs less to compare."""
    whole = load_reference(NAME)
    return Reference(whole.prompts[:4], whole.logits[:4], whole.greedy[:4], whole.margins[:4])


def test_the_recorded_model(reference):
    parity = compare(load_model(load_reference(NAME).path, "float32"), reference)
    assert parity.ok
    assert parity.max_error < 1e-4
    assert (parity.num_agreeing, parity.num_greedy) == (128, 128)
    assert 120 < parity.num_comparable <= 128
    assert str(parity).endswith("parity: yes")


def test_other_weights_and_other_tokens(reference):
    model = load_model(load_reference(NAME).path, "float32")
    norm = model.model.layers[0].self_attn.q_norm.weight
    norm.set_value(norm[...] * 1.01)
    greedy = reference.greedy.copy()
    greedy[2, -1] += 1  # the last token is nobody's context
    parity = compare(model, dataclasses.replace(reference, greedy=greedy))
    assert not parity.ok
    assert parity.tolerance < parity.max_error < 1
    assert parity.num_wrong >= 1
    norm.set_value(norm[...] * np.float32(np.nan))
    assert not compare(model, reference).ok


def test_a_wrong_token_alone_is_no_parity(reference):
    parity = compare(load_model(load_reference(NAME).path, "float32"), reference)
    assert parity.ok
    assert not dataclasses.replace(parity, num_wrong=1).ok
    assert not dataclasses.replace(parity, max_error=float("nan")).ok


def test_a_reference_of_another_model(reference):
    wider = tuple(np.pad(x, ((0, 0), (0, 1))) for x in reference.logits)
    model = load_model(load_reference(NAME).path)
    with pytest.raises(ValueError, match=r"logits are for 129 tokens, the model's vocabulary has"):
        compare(model, dataclasses.replace(reference, logits=wider))
    long = (*reference.prompts[:3], np.zeros(100, np.int32))
    with pytest.raises(ValueError, match=r"has sequences of 131 tokens, the model takes 128"):
        compare(model, dataclasses.replace(reference, prompts=long))


def test_files(tmp_path):
    file = tmp_path / "reference.npz"
    with pytest.raises(FileNotFoundError):
        Reference.load(file)
    file.write_bytes(b"not a zip archive")
    with pytest.raises(ValueError, match=r"is not a file of pallas_paged.models.record_reference"):
        Reference.load(file)
    np.savez(file, prompts=np.zeros(3))
    with pytest.raises(ValueError, match=r"is not a file of pallas_paged.models.record_reference"):
        Reference.load(file)
    with np.load(load_reference(NAME).path / "reference.npz") as arrays:
        np.savez(file, **dict(arrays) | {"dtype": np.array("int8")})
    with pytest.raises(ValueError, match=r"dtype='int8' must be one of"):
        Reference.load(file)
    assert load_reference(NAME).dtype == "float32"
