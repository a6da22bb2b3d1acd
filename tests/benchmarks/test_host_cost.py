"""What `benchmarks.host_cost` is made of: its tokenizer and its verdicts."""

import pathlib

import pytest

from benchmarks import calibration, made_up_tokenizer
from pallas_paged.engine.text.tokenizer import load_tokenizer


@pytest.mark.parametrize("vocab_size", [300, 5000, 40_000])
def test_made_up_tokenizers_have_as_many_tokens_and_read_their_own_text(
    vocab_size: int, tmp_path: pathlib.Path
) -> None:
    made_up_tokenizer.write(tmp_path, vocab_size)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    assert (tokenizer.vocab_size, tokenizer.eos_token_id) == (vocab_size, 1)
    texts = {tokenizer.decode([token]) for token in range(made_up_tokenizer.FIRST_WORD, vocab_size)}
    assert len(texts) == vocab_size - made_up_tokenizer.FIRST_WORD
    last = tokenizer.decode([vocab_size - 1])
    assert last.strip().isalpha()
    assert tokenizer.encode(last) == [vocab_size - 1]
    assert tokenizer.decode(tokenizer.encode(" babe, naïve 你好")) == " babe, naïve 你好"


def test_targets_are_ratios_to_the_loop() -> None:
    slow = calibration.judged({"ratio": 0.11}, 1.0)
    assert (slow["target"], slow[""]) == (1.0 / calibration.QUIET_MS, "missed")
    assert calibration.judged({"ratio": 0.09}, 1.0)[""] == "met"
    assert calibration.judged({"ratio": 0.09}, None)["target"] is None
