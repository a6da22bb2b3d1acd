"""What an evaluation asks of an engine: log-probabilities of continuations, and completions.

Nothing here needs lm_eval, whose rules these are: what is left out of a text that is too long, and
where a completion is cut.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tqdm import tqdm

from pallas_paged.engine.llm import LLM, Prompt
from pallas_paged.engine.outputs import RequestOutput
from pallas_paged.engine.sampling_params import RequestOutputKind, SamplingParams

SAMPLING_SETTINGS = (
    *("temperature", "top_k", "top_p", "min_p", "seed"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("bad_words", "logit_bias", "allowed_token_ids"),
    *("min_tokens", "ignore_eos", "stop_token_ids"),
)
"""What a task's `generation_kwargs` may hold of `SamplingParams`."""


class Continuation(NamedTuple):
    """Tokens that are scored, behind those that the model reads first.

    Attributes:
      token_ids: all of them.
      num_scored: how many of the last ones are scored.
      num_left_out: tokens that stood in front and are too many for the model.
    """

    token_ids: tuple[int, ...]
    num_scored: int
    num_left_out: int


class Score(NamedTuple):
    """How likely the model found a continuation.

    Attributes:
      logprob: the sum of its tokens' log-probabilities.
      is_greedy: whether each of its tokens was the most likely one.
    """

    logprob: float
    is_greedy: bool


class Completion(NamedTuple):
    """A completion to generate.

    Attributes:
      prompt_token_ids: what the model reads.
      num_left_out: tokens that stood in front and are too many for the model.
      params: how the completion is generated.
      until: strings of which none stays in its text.
    """

    prompt_token_ids: tuple[int, ...]
    num_left_out: int
    params: SamplingParams
    until: tuple[str, ...]


def adds_special_tokens(
    text: str, asked: bool | None, add_bos_token: bool | None, prefix: str
) -> bool:
    """Returns whether a text is split with the special tokens that the tokenizer adds.

    Args:
      text: what is split.
      asked: the caller's wish, which wins; None for none.
      add_bos_token: what is so for all texts; None leaves it to the tokenizer.
      prefix: the text of the token that stands for an empty context. A text that begins with it,
        as one from a chat template does, has its special tokens.
    """
    if asked is not None:
        return asked
    if prefix and text.startswith(prefix):
        return False
    return add_bos_token is not False


def make_continuation(
    context_ids: Sequence[int], continuation_ids: Sequence[int], max_length: int
) -> Continuation:
    """Returns what is scored of a continuation for a model that reads `max_length` tokens.

    The last token is not read, so that `max_length + 1` remain of longer ones, the last.

    Raises:
      ValueError: the context or the continuation is empty, or the continuation alone is longer
        than `max_length`.
    """
    num_scored = len(continuation_ids)
    if not context_ids or not num_scored:
        raise ValueError(
            f"a context of {len(context_ids)} tokens and a continuation of {num_scored}: both need "
            "at least one; look at doc_to_text and doc_to_target of the task"
        )
    if num_scored > max_length:
        raise ValueError(
            f"a continuation of {num_scored} tokens is longer than max_length={max_length}; "
            "evaluate with a larger max_model_len"
        )
    token_ids = (*context_ids, *continuation_ids)
    kept = token_ids[-(max_length + 1) :]
    return Continuation(kept, num_scored, len(token_ids) - len(kept))


def check_logprobs_mode(mode: str) -> None:
    """Raises `ValueError` for an engine whose log-probabilities are not the model's own."""
    if mode != "raw":
        raise ValueError(
            f"logprobs_mode={mode!r} must be 'raw' for evaluations: scores are made of the model's "
            "own log-probabilities"
        )


def scoring_request(continuation: Continuation) -> tuple[tuple[int, ...], SamplingParams]:
    """Returns a prompt and parameters whose output holds the log-probabilities.

    The last token is the only one that may be generated: it comes with the log-probability that
    it has without that rule. So a sequence may have as many tokens as the engine serves, and where
    nothing else is scored, the prompt may come from the prefix cache.
    """
    *prompt, last = continuation.token_ids
    params = SamplingParams(
        temperature=0,
        max_tokens=1,
        allowed_token_ids=(last,),
        ignore_eos=True,
        logprobs=0,
        prompt_logprobs=0 if continuation.num_scored > 1 else None,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    return tuple(prompt), params


def read_score(continuation: Continuation, output: RequestOutput) -> Score:
    """Returns the score that the output of a `scoring_request` holds.

    Raises:
      RuntimeError: the engine ended the request before.
    """
    (last,) = checked(output).outputs[0].logprobs or ()
    places: list[Any] = [last]
    if continuation.num_scored > 1:
        places = [*(output.prompt_logprobs or ())[1 - continuation.num_scored :], last]
    token_ids = continuation.token_ids[-continuation.num_scored :]
    found = [place[token] for token, place in zip(token_ids, places, strict=True)]
    return Score(sum(one.logprob for one in found), all(one.rank == 1 for one in found))


def make_completion(
    context_ids: Sequence[int], settings: Mapping[str, Any], max_length: int
) -> Completion:
    """Returns what is generated behind a context by a model of `max_length` tokens.

    Args:
      context_ids: its tokens. Of those that do not fit besides `max_gen_toks` the last are taken.
      settings: a task's `generation_kwargs`, with `until`, a list of strings, and `max_gen_toks`.
        Without a `temperature`, or with `do_sample` False, decoding is greedy.
      max_length: the most tokens, prompt and completion.

    Raises:
      ValueError: there is no token, no room, or a setting that an engine does not have.
    """
    rest = {name: value for name, value in settings.items() if value is not None}
    until = tuple(string for string in rest.pop("until", ()) if string)
    max_gen_toks = rest.pop("max_gen_toks")
    if not context_ids:
        raise ValueError(
            "the context of a completion has no tokens; look at the task's doc_to_text"
        )
    if max_gen_toks >= max_length:
        raise ValueError(
            f"max_gen_toks={max_gen_toks} leaves no room for a context in max_length={max_length}; "
            "lower it, with --gen_kwargs max_gen_toks=..., or evaluate with a larger max_model_len"
        )
    if rest.pop("num_beams", 1) != 1:
        raise ValueError(f"num_beams={settings['num_beams']!r} is not supported; use 1")
    if not rest.pop("do_sample", True):
        rest["temperature"] = 0.0
    for name, value in rest.items():
        if name not in SAMPLING_SETTINGS:
            raise ValueError(
                f"{name}={value!r:.80} in generation_kwargs is not known; there are until, "
                f"max_gen_toks, do_sample, {', '.join(SAMPLING_SETTINGS)}"
            )
    params = SamplingParams(
        **{"temperature": 0.0} | rest,
        stop=until,
        max_tokens=max_gen_toks,
        skip_special_tokens=False,  # `until` may name one
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    kept = tuple(context_ids[-(max_length - max_gen_toks) :])
    return Completion(kept, len(context_ids) - len(kept), params, until)


def read_text(completion: Completion, output: RequestOutput, tokenizer: Any) -> str:
    """Returns the text of an output, without special tokens, up to the first string of `until`.

    `tokenizer` is one of transformers. The tokens are decoded by themselves, without those in front
    of them.

    Raises:
      RuntimeError: the engine ended the request before.
    """
    token_ids = checked(output).outputs[0].token_ids
    text: str = tokenizer.decode(list(token_ids), skip_special_tokens=True)
    for string in completion.until:
        text = text.partition(string)[0]
    return text


def run(
    llm: LLM,
    requests: Sequence[tuple[Sequence[int], SamplingParams]],
    title: str,
    *,
    use_tqdm: bool = True,
) -> Iterator[tuple[int, RequestOutput]]:
    """Runs prompts as one continuously batched run.

    Yields each output when its request has ended, with the number of the request; all of them at
    once would be hundreds of bytes for every token of a prompt.
    """
    # Next to tokens, the text of a prompt is a label, which the output brings back.
    prompts: list[Prompt] = [
        {"prompt_token_ids": token_ids, "prompt": str(number)}
        for number, (token_ids, _) in enumerate(requests)
    ]
    outputs = llm.stream(prompts, [params for _, params in requests])
    for output in tqdm(outputs, title, len(prompts), unit="request", disable=not use_tqdm):
        assert output.prompt is not None
        yield int(output.prompt), output


def checked(output: RequestOutput) -> RequestOutput:
    """Returns an output; `RuntimeError` with the reason if the engine aborted the request."""
    completion = output.outputs[0]
    if completion.finish_reason == "abort":
        raise RuntimeError(f"request {output.request_id} was ended: {completion.stop_reason}")
    return output
