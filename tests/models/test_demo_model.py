"""The model that ships with the package: it loads, it has learnt Python, its tokenizer fits it."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import transformers

from pallas_paged.models import load_config, load_eos_token_ids, load_model
from pallas_paged.models.attend import dense_attend, dense_metadata
from pallas_paged.models.demo import DEMO_MODEL as FOLDER

MAX_BYTES = 8_000_000

TEXT = '''\
"""Count how often the words of a text occur."""

import collections
import sys


class WordCounter:
    """A table of words and their counts."""

    def __init__(self, ignore=()):
        self.counts = collections.Counter()
        self.ignore = set(ignore)

    def feed(self, text):
        """Count the words of text, without regard to case."""
        for word in text.lower().split():
            if word not in self.ignore:
                self.counts[word] += 1

    def most_common(self, limit=10):
        """Return the most frequent words, the first of them first."""
        if limit < 0:
            raise ValueError("limit must not be negative")
        return [word for word, count in self.counts.most_common(limit)]


def main(argv=None):
    counter = WordCounter(ignore=["the", "a"])
    for name in argv or sys.argv[1:]:
        try:
            with open(name, encoding="utf-8") as file:
                counter.feed(file.read())
        except OSError as error:
            print(f"cannot read {name}: {error}", file=sys.stderr)
            return 1
    print("\\n".join(counter.most_common()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
'''
"""Written for this test, so that no training run has seen it."""

MEASURED_BITS_PER_BYTE = 1.063
MARGIN = 1.02
"""Without any one layer's attention or MLP the model needs 4 % more bits, or many more."""


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(FOLDER)


def test_folder_is_small_and_attributes_its_text():
    files = {file.name: file.stat().st_size for file in FOLDER.iterdir() if file.is_file()}
    assert set(files) == {
        "NOTICE",
        "__init__.py",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(files.values()) <= MAX_BYTES
    assert "Python Software Foundation" in (FOLDER / "NOTICE").read_text()


def test_predicts_python(tokenizer):
    model = load_model(FOLDER, dtype="float32")
    ids = jnp.asarray(tokenizer(TEXT)["input_ids"], jnp.int32)
    assert len(ids) <= model.config.max_position_embeddings
    caches = (None,) * model.config.num_layers
    hidden, _ = model(ids, dense_metadata(1, len(ids)), caches, attend=dense_attend)
    losses = optax.softmax_cross_entropy_with_integer_labels(
        model.compute_logits(hidden[:-1]), ids[1:]
    )
    bits_per_byte = float(losses.sum()) / np.log(2) / len(TEXT.encode())
    assert bits_per_byte <= MARGIN * MEASURED_BITS_PER_BYTE


def test_weights_are_bfloat16_and_sizes_agree(tokenizer):
    config = load_config(FOLDER)
    assert config.checkpoint_dtype == "bfloat16"
    assert config.vocab_size == len(tokenizer)
    assert tokenizer.model_max_length == config.max_position_embeddings
    assert load_eos_token_ids(FOLDER) == (tokenizer.eos_token_id,)


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        "    x = 1\n        y = 2\n",
        "trailing spaces   \n\n\n  \n",
        " a  b   c",
        "\ttabs\r\nand 1234567890 digits\n",
        "naïve — 日本語 🐍\x00\x7f",
        "it 's n't , clean . up ?",
        "",
    ],
)
def test_tokenizer_gives_back_every_character(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_indentation_is_one_token(tokenizer):
    for depth in (4, 8, 12, 16):
        ids = tokenizer("x:\n" + " " * depth + "y", add_special_tokens=False)["input_ids"]
        assert len(ids) == 5


def test_chat_template_renders_what_is_said_as_comments(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Add two numbers.\nName it add."},
        {"role": "assistant", "content": "def add(a, b):\n    return a + b"},
        {"role": "user", "content": "Now subtract."},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|bos|># Be brief.\n# Add two numbers.\n# Name it add.\n"
        "def add(a, b):\n    return a + b\n# Now subtract.\n"
    )
