"""Workloads: both published forms, everything else refused, means of drawn lengths."""

import json

import numpy as np
import pytest

from benchmarks import workloads
from benchmarks.workloads import LENGTHS, draw, load

SHAREGPT = [
    {
        "id": "a",
        "conversations": [
            {"from": "human", "value": "one two"},
            {"from": "gpt", "value": "three four five"},
            {"from": "human", "value": "never"},
        ],
    },
    {
        "id": "b",
        "conversations": [
            {"from": "system", "value": "no question"},
            {"from": "gpt", "value": "an answer to nothing"},
            {"from": "human", "value": "six"},
            {"from": "gpt", "value": "seven"},
        ],
    },
    {"id": "nobody answers", "conversations": [{"from": "human", "value": "hello"}]},
    {"id": "empty", "conversations": []},
    {
        "id": "long",
        "conversations": [
            {"from": "human", "value": "w " * 60},
            {"from": "gpt", "value": "w " * 60},
        ],
    },
]
ALPACA = [
    {"instruction": "Say it", "input": "", "output": "it", "text": "ignored"},
    {"instruction": "Add these", "input": "1 2", "output": "it is 3"},
    {"instruction": "Nothing comes", "input": "", "output": ""},
]


def words(text: str) -> list[int]:
    if "refused" in text:
        raise ValueError("the tokenizer refuses it")
    return [len(word) for word in text.split()]


def read(tmp_path, content, num_requests, **options):
    path = tmp_path / "data.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return load(path, num_requests, **{"encode": words, "max_model_len": 100, "seed": 0} | options)


def test_sharegpt_uses_the_first_answered_human_turn(tmp_path):
    workload = read(tmp_path, SHAREGPT, 2)
    assert sorted(workload.requests) == [((3,), 1), ((3, 3), 3)]
    assert "ShareGPT file data.json" in workload.source


def test_what_is_left_out_is_counted(tmp_path):
    with pytest.raises(ValueError, match=r"left out 2 without .*, 1 over 100 tokens.*=3; ask"):
        read(tmp_path, SHAREGPT, 3)
    assert len(read(tmp_path, SHAREGPT, 3, max_model_len=120).requests) == 3


def test_alpaca_puts_the_input_below_the_instruction(tmp_path):
    workload = read(tmp_path, ALPACA, 2)
    assert sorted(workload.requests) == [((3, 2), 1), ((3, 5, 1, 1), 3)]
    assert "Alpaca" in workload.source


def test_a_seed_fixes_which_entries_are_used(tmp_path):
    entries = [{"instruction": "w " * (1 + i), "input": "", "output": "answer"} for i in range(50)]
    first, again, other = (read(tmp_path, entries, 20, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert len(set(first.requests)) == 20
    assert first.requests != other.requests


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not one JSON document"),
        ('{"a": 1}\n{"a": 2}\n', "JSON Lines"),
        ({"conversations": []}, "must hold a list .* not dict"),
        ([], "an empty list"),
        ([{"prompt": "a", "completion": "b"}], "neither ShareGPT .* nor Alpaca"),
        (["a string"], "neither ShareGPT .* nor Alpaca"),
        ([SHAREGPT[0], {"conversations": [{"role": "user"}]}], "entry 1 must hold"),
        ([SHAREGPT[0], ALPACA[0]], "entry 1 must hold 'conversations'"),
        ([ALPACA[0], {"instruction": "a"}], "entry 1 must hold 'instruction' and 'output'"),
        ([{"instruction": 3, "output": "a"}] * 2, "entry . holds 3 in the place of a text"),
        ([{"conversations": [{"from": "human", "value": 3}, {"from": "gpt", "value": "a"}]}] * 2,
         "entry . holds 3 in the place of a text"),
        ([{"instruction": "refused", "output": "a"}] * 2, "entry .: the tokenizer refuses it"),
        ("[" * 100_000, "not one JSON document .*recursion"),
    ],
)  # fmt: skip
def test_other_files_are_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, content, 2)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.json", 1, encode=words, max_model_len=9, seed=0)


@pytest.mark.parametrize("name", ["sharegpt", "alpaca"])
def test_drawn_lengths_have_the_papers_means(name):
    """Far below the clip, within five standard errors."""
    count = 60_000
    rng = np.random.default_rng(7)
    for mixture in LENGTHS[name]:
        lengths = mixture.draw(rng, count)
        assert lengths.mean() == pytest.approx(mixture.mean, abs=5 * lengths.std() / count**0.5)
        # Long-tailed: the median is well below the mean.
        assert np.median(lengths) < 0.85 * mixture.mean


def options(**changed):
    defaults = {"scale": 1.0, "max_model_len": 2048, "vocab_size": 50, "seed": 3}
    return defaults | changed


def test_drawn_requests_fit_and_repeat():
    workload = draw("sharegpt", 300, **options(max_model_len=200))
    assert workload == draw("sharegpt", 300, **options(max_model_len=200))
    for prompt, num_output_tokens in workload.requests:
        assert 1 <= len(prompt) < 200
        assert 1 <= num_output_tokens <= 200 - len(prompt)
        assert all(0 <= token < 50 for token in prompt)
    clipped = sum(len(p) + n == 200 for p, n in workload.requests)
    assert clipped > 50
    assert f"{clipped} of 300 clipped at 200" in workload.source


def test_scale_shrinks_lengths():
    whole, quarter = (draw("alpaca", 400, **options(scale=scale)) for scale in (1.0, 0.25))
    for mean, scaled in zip(whole.mean_lengths, quarter.mean_lengths, strict=True):
        assert scaled == pytest.approx(mean / 4, rel=0.1)
    assert "times 0.25" in quarter.source
    with pytest.raises(ValueError, match="length_scale=0"):
        workloads.check_scale(0.0)
