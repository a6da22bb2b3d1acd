"""Requests to `/v1/completions`, and what `LLM` answers to each of them alone."""

import dataclasses
import json
import random
from typing import Any, NamedTuple

from pallas_paged.engine import LLM
from pallas_paged.engine.outputs import CompletionOutput
from pallas_paged.engine.serve.params import completion_params
from pallas_paged.engine.serve.protocol import CompletionRequest
from pallas_paged.engine.serve.reading import parse


class Completion(NamedTuple):
    """What is compared of a completion; the log-probabilities are those of its tokens."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str | None
    stop_reason: str | int | None


type Answer = list[Completion]


_TEXTS = (
    "def main(",
    "class Größe:\n    '''Ça va? 你好 😀'''\n",
    "import os\nimport sys\n\n\ndef read(path):\n",
    "x = [1, 2, 3]\nfor i in x:\n    print(",
)
_OPTIONS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.9, "n": 3},
    {"temperature": 0, "logprobs": 3},
    {"temperature": 1.0, "n": 2, "logprobs": 1},
    {"temperature": 1.0, "stop": ["\n", "e t", "return"]},
    {"temperature": 1.0, "stop": "é", "include_stop_str_in_output": True},
    {"temperature": 1.0, "presence_penalty": 1.0, "repetition_penalty": 1.2},
    {"temperature": 1.0, "logit_bias": {"77": 4, "300": 4}, "bad_words": ["self"]},
    {"temperature": 1.0, "ignore_eos": True, "min_tokens": 20},
    {"structured_outputs": {"regex": "(ab|cd){2,9}"}, "temperature": 1.0},
    {"structured_outputs": {"choice": ["yes", "no", "perhaps"]}, "temperature": 1.0},
    {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"schema": {"type": "object", "properties": {"a": {"type": "integer"}}}},
        },
        "temperature": 1.0,
    },
    {"use_beam_search": True, "n": 3, "temperature": 0},
)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A request, and its answer.

    Attributes:
      body: of the request, as a dictionary for JSON.
      expected: its completions, in the order of their index.
    """

    body: dict[str, Any]
    expected: Answer

    @property
    def can_stream(self) -> bool:
        """Whether its answer may come in pieces."""
        return "use_beam_search" not in self.body


def make_kinds(llm: LLM, seed: int) -> list[Kind]:
    """Returns requests of all kinds, answered one by one."""
    rng = random.Random(seed)
    kinds = []
    for options in _OPTIONS:
        for several in (False, True):
            body: dict[str, Any] = {
                "prompt": _prompts(rng, llm, 2) if several else rng.choice(_TEXTS),
                "max_tokens": rng.randint(20, 60),
                "return_token_ids": True,
            }
            if "use_beam_search" not in options:
                body["seed"] = rng.randrange(2**63)
            kinds.append(_answered(llm, body | options))
    return kinds


def _prompts(rng: random.Random, llm: LLM, count: int) -> list[list[int]]:
    """Returns prompts of tokens, long ones among them."""
    tokens = range(4, llm.model_config.vocab_size)
    return [[rng.choice(tokens) for _ in range(rng.choice((5, 40, 150)))] for _ in range(count)]


def _answered(llm: LLM, body: dict[str, Any]) -> Kind:
    request = parse(CompletionRequest, json.dumps(body).encode())
    params = completion_params(request, llm.get_default_sampling_params())
    expected: Answer = []
    given = request.prompt
    for prompt in [given] if isinstance(given, str) else given:
        (output,) = llm.generate([_as_prompt(prompt)], params, use_tqdm=False)
        expected += [_completion(one) for one in output.outputs]
    return Kind(body, expected)


def _as_prompt(prompt: Any) -> Any:
    return prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt}


def _completion(one: CompletionOutput) -> Completion:
    pairs = zip(one.token_ids, one.logprobs or (), strict=one.logprobs is not None)
    logprobs = tuple(likely[token].logprob for token, likely in pairs)
    text = one.text or ""
    return Completion(text, tuple(one.token_ids), logprobs, one.finish_reason, one.stop_reason)
