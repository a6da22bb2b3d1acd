"""`/v1/completions`: prompts in, texts that go on with them out."""

import functools
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from typing import Any

from pallas_paged.engine.outputs import CompletionOutput, RequestOutput
from pallas_paged.engine.sampling_params import BeamSearchParams
from pallas_paged.engine.serve.counts import Counts
from pallas_paged.engine.serve.exchange import Exchange
from pallas_paged.engine.serve.logprobs import completion_logprobs, prompt_logprobs
from pallas_paged.engine.serve.params import completion_params
from pallas_paged.engine.serve.protocol import (
    MAX_CHOICES,
    BadRequestError,
    CompletionRequest,
)
from pallas_paged.engine.serve.responses import (
    DONE,
    Choice,
    Completion,
    Logprobs,
    Usage,
    encode,
    event,
)
from pallas_paged.engine.serve.service import Service
from pallas_paged.engine.text.prompts import Prompt


class CompletionCall:
    """One request to `/v1/completions`.

    Args:
      service: answers it.
      exchange: with its client.
      request: what it asks for.
    """

    def __init__(self, service: Service, exchange: Exchange, request: CompletionRequest):
        """Raises `ValueError` if its parameters are not usable."""
        self._service, self._exchange, self._request = service, exchange, request
        self._prompts = _split(request)
        self._n = 1 if request.n is None else request.n
        self._check_num_choices()
        if request.best_of is not None:
            exchange.names["beam_width"] = "best_of"
        if request.structured_outputs is None:
            exchange.names["structured_outputs"] = "response_format"
        self._params = completion_params(request, service.defaults)
        self._is_prompt_only = request.max_tokens == 0 and bool(request.echo)
        self._created = int(time.time())
        self._counts = exchange.counts = Counts(len(self._prompts))

    async def begin(self, timeout_s: float | None) -> None:
        """Queues it; raises `ValueError` or `EngineError` if that cannot be."""
        prompts = self._prompts
        if self._request.add_special_tokens is False:
            prompts = [await self._without_special_tokens(prompt) for prompt in prompts]
        await self._exchange.submit(
            self._service.llm,
            prompts,
            self._params,
            priority=self._request.priority,
            timeout_s=timeout_s,
        )

    async def whole(self) -> bytes:
        """Returns the answer, when all is there."""
        outputs: dict[int, RequestOutput] = {}
        async for index, output in self._exchange.outputs():
            outputs[index] = output
        choices: list[Choice] = []
        for place in range(len(self._prompts)):
            output = outputs[place]
            self._counts.note(place, output)
            for index, one in enumerate(self._best(output)):
                choices.append(self._whole_choice(place * self._n + index, output, one))
        self._counts.finish_reasons += [choice.finish_reason for choice in choices]
        return encode(self._answer(choices, self._usage()))

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yields the answer as events of a stream."""
        options = self._request.stream_options
        has_usage = options is not None and bool(options.include_usage)
        is_continuous = options is not None and bool(options.continuous_usage_stats)
        streams: dict[int, _ChoiceStream] = {}
        async for place, output in self._exchange.outputs():
            self._counts.note(place, output)
            for one in output.outputs:
                index = place * self._n + one.index
                stream = streams.get(index)
                if stream is None:
                    stream = streams[index] = _ChoiceStream(self, index)
                choice = stream.next(output, one)
                if choice is None:
                    continue
                if choice.finish_reason is not None:
                    self._counts.finish_reasons.append(choice.finish_reason)
                usage = self._usage() if is_continuous else None
                # One each: clients read the first choice of a piece.
                yield event(self._answer([choice], usage))
        if has_usage:
            yield event(self._answer([], self._usage()))
        yield DONE

    def _check_num_choices(self) -> None:
        """Raises `BadRequestError` if so many completions are too many for one request."""
        num_prompts, best_of = len(self._prompts), self._request.best_of
        field, each = ("n", self._n) if best_of is None else ("best_of", best_of)
        if num_prompts * each > MAX_CHOICES:
            raise BadRequestError(
                f"{num_prompts} prompts with {field}={each} are {num_prompts * each} completions, "
                f"and {MAX_CHOICES} are the most of one request; send several",
                field if each > 1 else "prompt",
            )

    async def _without_special_tokens(self, prompt: Prompt) -> Prompt:
        assert isinstance(prompt, dict)
        if "prompt_token_ids" in prompt:
            return prompt
        text = prompt["prompt"]
        ids = await self._service.llm.token_ids(text, add_special_tokens=False)
        return prompt | {"prompt_token_ids": ids}

    def _answer(self, choices: list[Choice], usage: Usage | None) -> Completion:
        return Completion(
            id=f"cmpl-{self._exchange.request_id}",
            created=self._created,
            model=self._service.model_name,
            choices=choices,
            usage=usage,
        )

    def _usage(self) -> Usage:
        usage = self._counts.usage()
        if self._is_prompt_only:  # the token that had to be made is nobody's
            usage.completion_tokens, usage.total_tokens = 0, usage.prompt_tokens
        return usage

    def _best(self, output: RequestOutput) -> Sequence[CompletionOutput]:
        """Returns the completions to give out: of `best_of`, the likeliest by token."""
        if isinstance(self._params, BeamSearchParams) or len(output.outputs) == self._n:
            return output.outputs

        def likelihood(one: CompletionOutput) -> float:
            assert one.cumulative_logprob is not None
            return one.cumulative_logprob / max(1, len(one.token_ids))

        return sorted(output.outputs, key=likelihood, reverse=True)[: self._n]

    def _whole_choice(self, index: int, output: RequestOutput, one: CompletionOutput) -> Choice:
        choice = _ChoiceStream(self, index).next(output, one)
        assert choice is not None
        return choice

    def prompt_text(self, output: RequestOutput) -> str:
        """Returns the text of a prompt that came as text or as tokens."""
        if output.prompt is not None:
            return output.prompt
        tokenizer = self._service.llm.tokenizer
        if tokenizer is None:
            return ""
        skips = self._request.skip_special_tokens is not False
        return tokenizer.decode(output.prompt_token_ids, skip_special_tokens=skips)

    @property
    def decode_token(self) -> Callable[[int], str] | None:
        """Gives the text of a token; None without a tokenizer."""
        tokenizer = self._service.llm.tokenizer
        return None if tokenizer is None else tokenizer.decode_token

    @functools.cached_property
    def special_ids(self) -> Collection[int]:
        """The tokenizer's special tokens."""
        tokenizer = self._service.llm.tokenizer
        return frozenset(() if tokenizer is None else tokenizer.implementation.all_special_ids)

    @property
    def request(self) -> CompletionRequest:
        """What it asks for."""
        return self._request

    @property
    def is_prompt_only(self) -> bool:
        """Whether it asks for an echo and no tokens."""
        return self._is_prompt_only


class _ChoiceStream:
    """Makes the pieces of one choice; the whole is one piece."""

    def __init__(self, call: CompletionCall, index: int):
        self._call, self._index = call, index
        self._offset = 0
        self._is_begun = self._is_over = False

    def next(self, output: RequestOutput, one: CompletionOutput) -> Choice | None:
        """Returns what an output adds; None if nothing that a client would see."""
        if self._is_over:
            return None
        request, call = self._call.request, self._call
        text, token_ids = one.text or "", list(one.token_ids)
        found: list[Any] = list(one.logprobs or ())
        reason = "length" if call.is_prompt_only else one.finish_reason
        if call.is_prompt_only:
            text, token_ids, found = "", [], []
        is_first, self._is_begun = not self._is_begun, True
        begin, logprob_ids = "", token_ids
        if is_first and request.echo:
            begin = call.prompt_text(output)
            if output.prompt_logprobs is not None:
                found = [*output.prompt_logprobs, *found]
                logprob_ids = [*output.prompt_token_ids, *token_ids]
        logprobs: Logprobs | None = None
        if request.logprobs is not None:
            logprobs, self._offset = completion_logprobs(
                logprob_ids,
                found,
                self._offset,
                call.decode_token,
                begin + text if is_first else "",
                call.special_ids if is_first or request.skip_special_tokens is not False else (),
            )
        self._is_over = reason is not None
        if not (text or begin or reason or logprobs or request.return_token_ids):
            return None
        wants_prompt = is_first and request.prompt_logprobs is not None
        return Choice(
            self._index,
            begin + text,
            logprobs,
            reason,
            one.stop_reason if reason else None,
            prompt_logprobs(output) if wants_prompt else None,
            list(output.prompt_token_ids) if is_first and request.return_token_ids else None,
            token_ids if request.return_token_ids else None,
        )


def _split(request: CompletionRequest) -> list[Prompt]:
    """Returns the prompts, as the engine takes them."""
    given: Any = request.prompt
    several = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given
    if not several:
        raise BadRequestError("prompt is empty; give it at least one token", "prompt")
    prompts: list[Prompt] = []
    for one in several:
        prompt: dict[str, Any] = (
            {"prompt": one} if isinstance(one, str) else {"prompt_token_ids": one}
        )
        if request.cache_salt is not None:
            prompt["cache_salt"] = request.cache_salt
        prompts.append(prompt)
    return prompts
