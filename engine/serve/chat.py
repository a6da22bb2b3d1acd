"""`/v1/chat/completions`: a conversation in, the model's answers out."""

import time
from collections.abc import AsyncIterator

import msgspec

from pallas_paged.engine.outputs import CompletionOutput
from pallas_paged.engine.serve.conversation import Answering, chat_prompt
from pallas_paged.engine.serve.counts import Counts
from pallas_paged.engine.serve.exchange import Exchange
from pallas_paged.engine.serve.logprobs import chat_logprobs, prompt_logprobs
from pallas_paged.engine.serve.params import chat_params
from pallas_paged.engine.serve.parsers.events import (
    ArgumentsDelta,
    CallBegins,
    ContentDelta,
    Event,
    ReasoningDelta,
    fold,
)
from pallas_paged.engine.serve.protocol import MAX_CHOICES, BadRequestError, ChatRequest
from pallas_paged.engine.serve.responses import (
    DONE,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    Delta,
    FunctionCall,
    ToolCall,
    encode,
    event,
)
from pallas_paged.engine.serve.service import Service


class ChatCall:
    """One request to `/v1/chat/completions`.

    Args:
      service: answers it.
      exchange: with its client.
      request: what it asks for.
    """

    def __init__(self, service: Service, exchange: Exchange, request: ChatRequest):
        """Raises `ValueError` if it asks for too much."""
        self._service, self._exchange, self._request = service, exchange, request
        if request.n is not None and request.n > MAX_CHOICES:
            raise BadRequestError(
                f"n={request.n} is more than the {MAX_CHOICES} answers of one request; send "
                "several",
                "n",
            )
        names = exchange.names
        names |= {"prompt": "messages", "logprobs": "top_logprobs"}
        if request.chat_template is None:
            names["chat_template"] = "messages"  # the server's, which does not accept them
        if request.max_completion_tokens is not None:
            names["max_tokens"] = "max_completion_tokens"
        if request.structured_outputs is None:
            is_free = request.response_format is None or request.response_format.type == "text"
            names["structured_outputs"] = "tools" if is_free else "response_format"
        self._created = int(time.time())
        self._counts = exchange.counts = Counts(1)
        self._answering: Answering | None = None

    async def begin(self, timeout_s: float | None) -> None:
        """Queues it; raises `ValueError` or `EngineError` if that cannot be."""
        service, request = self._service, self._request
        prompt = await chat_prompt(service, request)
        assert isinstance(prompt, dict)
        self._answering = Answering(service, request, prompt["prompt"])
        params = chat_params(
            request,
            service.defaults,
            self._answering.grammar,
            self._answering.keeps_special_tokens,
        )
        await self._exchange.submit(
            service.llm, [prompt], params, priority=request.priority, timeout_s=timeout_s
        )

    async def whole(self) -> bytes:
        """Returns the answer, when all is there."""
        async for _, last in self._exchange.outputs():
            output = last
        self._counts.note(0, output)
        choices = [self._whole_choice(index, one) for index, one in enumerate(output.outputs)]
        self._counts.finish_reasons += [choice.finish_reason for choice in choices]
        answer = self._answer("chat.completion", choices)
        answer.usage = self._counts.usage()
        answer.prompt_logprobs = prompt_logprobs(output)
        if self._request.return_token_ids:
            answer.prompt_token_ids = list(output.prompt_token_ids)
        return encode(answer)

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yields the answer as events of a stream."""
        options = self._request.stream_options
        is_continuous = options is not None and bool(options.continuous_usage_stats)
        streams: dict[int, _AnswerStream] = {}
        is_first = True
        async for _, output in self._exchange.outputs():
            self._counts.note(0, output)
            choices: list[ChatChoice] = []
            for one in output.outputs:
                stream = streams.get(one.index)
                if stream is None:
                    stream = streams[one.index] = self._new_stream(one.index)
                choices += stream.next(one)
            self._counts.finish_reasons += [
                one.finish_reason for one in choices if one.finish_reason is not None
            ]
            for choice in choices:  # one each: clients read the first choice of a piece
                piece = self._answer("chat.completion.chunk", [choice])
                if is_first:
                    is_first = False
                    piece.prompt_logprobs = prompt_logprobs(output)
                    if self._request.return_token_ids:
                        piece.prompt_token_ids = list(output.prompt_token_ids)
                if is_continuous:
                    piece.usage = self._counts.usage()
                yield event(piece)
        if options is not None and options.include_usage:
            piece = self._answer("chat.completion.chunk", [])
            piece.usage = self._counts.usage()
            yield event(piece)
        yield DONE

    def _answer(self, kind: str, choices: list[ChatChoice]) -> ChatCompletion:
        return ChatCompletion(
            f"chatcmpl-{self._exchange.request_id}",
            kind,
            self._created,
            self._service.model_name,
            choices,
        )

    def _new_stream(self, index: int) -> "_AnswerStream":
        assert self._answering is not None
        return _AnswerStream(self._request, self._answering, index)

    def _whole_choice(self, index: int, one: CompletionOutput) -> ChatChoice:
        assert self._answering is not None
        parser = self._answering.new_parser()
        message = fold([*parser.feed(one.text or ""), *parser.finish()])
        calls = [
            ToolCall(FunctionCall(call.arguments, call.name), call.id, "function")
            for call in message.tool_calls
        ]
        content = message.content
        if content is None and not calls:
            content = ""
        reasoning = message.reasoning
        if self._request.include_reasoning is False:
            reasoning = None
        return ChatChoice(
            index,
            _logprobs(self._request, one),
            _finish_reason(one, has_calls=bool(calls)),
            one.stop_reason,
            message=ChatMessage("assistant", content, reasoning, calls or msgspec.UNSET),
            token_ids=list(one.token_ids) if self._request.return_token_ids else None,
        )


class _AnswerStream:
    """Makes the pieces of one answer."""

    def __init__(self, request: ChatRequest, answering: Answering, index: int):
        self._request, self._index = request, index
        self._parser = answering.new_parser()
        self._is_begun = self._is_over = self._has_calls = False

    def next(self, one: CompletionOutput) -> list[ChatChoice]:
        """Returns what an output adds, in order; nothing if a client would see nothing of it."""
        if self._is_over:
            return []
        is_last = one.finish_reason is not None
        events = self._parser.feed(one.text or "")
        if is_last:
            events += self._parser.finish()
        deltas = [delta for each in events if (delta := self._delta(each)) is not None]
        if not self._is_begun:
            self._is_begun = True
            deltas.insert(0, Delta(role="assistant", content=""))
        logprobs = _logprobs(self._request, one)
        token_ids = list(one.token_ids) if self._request.return_token_ids else None
        if not deltas and (logprobs or token_ids or is_last):
            deltas.append(Delta())
        choices = [ChatChoice(self._index, None, None, None, delta=delta) for delta in deltas]
        if choices:  # what belongs to all of the output's tokens, once
            choices[-1].logprobs, choices[-1].token_ids = logprobs, token_ids
        if is_last:
            self._is_over = True
            choices[-1].finish_reason = _finish_reason(one, has_calls=self._has_calls)
            choices[-1].stop_reason = one.stop_reason
        return choices

    def _delta(self, found: Event) -> Delta | None:
        match found:
            case ContentDelta(text):
                return Delta(content=text)
            case ReasoningDelta(text):
                is_shown = self._request.include_reasoning is not False
                return Delta(reasoning_content=text) if is_shown else None
            case CallBegins(index, call_id, name):
                self._has_calls = True
                call = ToolCall(FunctionCall("", name), call_id, "function", index)
                return Delta(tool_calls=[call])
            case ArgumentsDelta(index, text):
                return Delta(tool_calls=[ToolCall(FunctionCall(text), index=index)])


def _logprobs(request: ChatRequest, one: CompletionOutput) -> ChatLogprobs | None:
    if not request.logprobs or not one.token_ids:
        return None
    return chat_logprobs(one, request.top_logprobs or 0)


def _finish_reason(one: CompletionOutput, *, has_calls: bool) -> str | None:
    return "tool_calls" if has_calls and one.finish_reason == "stop" else one.finish_reason
