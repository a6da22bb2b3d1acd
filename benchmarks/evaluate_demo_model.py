"""Measures the demo model: bits per byte on held-out files, and how much of what it writes parses.

    python -m benchmarks.evaluate_demo_model

Bits per byte are over the files of the running interpreter's standard library that training leaves
out, computed in float32. The completions come out of the engine, all 50 in one batch. One counts
as parsing if prompt and completion, cut after the last full line, are the start of some valid
Python module: either they compile, or they end where a module may not end but may go on (in a
bracket or a triple-quoted string, behind a block's header), by `codeop`'s rules.
"""

import codeop
import textwrap
import warnings

import tokenizers
from absl import flags

from benchmarks import demo_corpus, demo_score
from pallas_paged.engine import LLM, SamplingParams
from pallas_paged.models import command_line, load_model
from pallas_paged.models.demo import DEMO_MODEL

_MODEL = flags.DEFINE_string("model", str(DEMO_MODEL), "Folder of the model.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.5, "Temperature of the samples.")
_TOP_P = flags.DEFINE_float("top_p", 0.9, "Share of the probability that is sampled from.")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 96, "Tokens per completion.")
_SHOWN = flags.DEFINE_integer("shown", 3, "Completions to print.")

PROMPTS = (
    "def read_lines(path):\n",
    "def count_words(text):\n",
    "def is_empty(self):\n",
    "def remove_prefix(name, prefix):\n",
    "def find_all(pattern, text, flags=0):\n",
    "def load_settings(filename, default=None):\n",
    "def average(values):\n    total = 0\n",
    "def merge(left, right):\n    result = []\n",
    "def copy_file(source, target):\n    with open(source, 'rb') as f:\n",
    "def parse_header(line):\n    if not line:\n",
    "def open_socket(host, port, timeout=None):\n    try:\n",
    "def walk_tree(node):\n    for child in node.children:\n",
    "def format_size(num_bytes):\n    ",
    "def get_version():\n    return",
    "def flatten(items):\n    for item in items:\n        if isinstance(item, list):\n",
    "def wait_for(event, timeout):\n    while True:\n",
    "def check_type(value, expected):\n    if not isinstance(value, expected):\n        raise",
    'def encode(data, errors=\'strict\'):\n    """',
    'def shuffle(seq, random=None):\n    """Shuffle the sequence in place.\n',
    "def main():\n    import argparse\n",
    "async def fetch(reader, size):\n",
    "async def close_all(connections):\n    for connection in connections:\n",
    "@property\ndef name(self):\n",
    "@contextlib.contextmanager\ndef changed_directory(path):\n",
    "class Point:\n",
    "class Stack:\n    def __init__(self):\n",
    "class Counter:\n    def __init__(self, start=0):\n        self.value = start\n\n",
    "class Node:\n    def __init__(self, value, next=None):\n",
    "class ConfigError(Exception):\n",
    'class Reader:\n    """',
    "class Queue:\n    def put(self, item):\n",
    "class Account:\n    def __init__(self):\n        self.balance = 0\n\n    def deposit(",
    "class Matrix:\n    def __init__(self, rows, columns):\n",
    "class Timer:\n    def __enter__(self):\n",
    "class Cache(dict):\n    def __getitem__(self, key):\n",
    "class Handler(object):\n    def handle(self, request):\n",
    "class StringTest(unittest.TestCase):\n    def test_upper(self):\n",
    "class ListTest(unittest.TestCase):\n    def setUp(self):\n",
    "class PathTests(unittest.TestCase):\n\n    def test_join(self):\n        self.assertEqual(",
    "import os\nimport sys\n",
    "import re\n\n",
    "from collections import",
    "import unittest\n\nclass",
    "import socket\nimport threading\n\n",
    '"""Tools for working with dates."""\n\nimport datetime\n\n',
    "LIMIT = 10\nNAMES = [\n",
    "# Read the file and print its lines in reverse.\n",
    "for name in names:\n",
    "if __name__ == '__main__':\n",
    "try:\n    import json\nexcept ImportError:\n",
)
"""Written for this purpose, not taken from the text."""


def starts_a_module(text: str) -> bool:
    """Returns whether `text`, cut after its last full line, can begin a valid Python module."""
    lines = text[: text.rfind("\n") + 1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as those about invalid escapes in strings
        try:
            codeop.compile_command(lines, symbol="exec")
        except (SyntaxError, ValueError, OverflowError):
            return False
    return True


def held_out_bits_per_byte(folder: str) -> float:
    """Returns the bits per byte of the model in `folder` on the files that training leaves out."""
    tokenizer = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
    documents = [
        demo_corpus.tokenize(document, tokenizer)
        for document in demo_corpus.read_documents()
        if document.held_out
    ]
    bos = demo_corpus.special_token_id(tokenizer, demo_corpus.BOS)
    return demo_score.bits_per_byte(load_model(folder, dtype="float32"), documents, bos)


def complete(folder: str) -> list[str]:
    """Returns each prompt with its completion, sampled with the prompt's index as seed."""
    params = [
        SamplingParams(
            temperature=_TEMPERATURE.value,
            top_p=_TOP_P.value,
            max_tokens=_MAX_TOKENS.value,
            seed=seed,
        )
        for seed in range(len(PROMPTS))
    ]
    outputs = LLM(model=folder).generate(list(PROMPTS), params)
    return [f"{prompt}{o.outputs[0].text}" for prompt, o in zip(PROMPTS, outputs, strict=True)]


def main() -> None:
    """Prints both measures and some of the completions."""
    texts = complete(_MODEL.value)
    parsing = [starts_a_module(text) for text in texts]
    step = len(texts) // max(_SHOWN.value, 1)
    for text, parses in list(zip(texts, parsing, strict=True))[::step][: _SHOWN.value]:
        print(f"--- {'parses' if parses else 'does not parse'}:")
        print(textwrap.indent(text, "    "))
    lines = sum(text.count("\n") for text in texts) - sum(p.count("\n") for p in PROMPTS)
    print(f"held-out bits per byte: {held_out_bits_per_byte(_MODEL.value):.3f}")
    print(
        f"completions that parse up to their last full line: {sum(parsing)} of {len(parsing)} "
        f"({100 * sum(parsing) / len(parsing):.0f} %) at temperature {_TEMPERATURE.value}, "
        f"top_p {_TOP_P.value}, max_tokens {_MAX_TOKENS.value}; {lines / len(texts):.1f} lines each"
    )


if __name__ == "__main__":
    command_line.run(main)
