"""`/tokenize` and `/detokenize`: a text's tokens, and back."""

import asyncio
from typing import Any

from pallas_paged.engine.serve.conversation import chat_prompt
from pallas_paged.engine.serve.protocol import BadRequestError, DetokenizeRequest, TokenizeRequest
from pallas_paged.engine.serve.responses import Text, Tokens, encode
from pallas_paged.engine.serve.service import Service
from pallas_paged.engine.text.tokenizer import require_tokenizer

_OF_PROMPT = ("add_special_tokens",)
_OF_MESSAGES = (
    *("tools", "add_generation_prompt", "continue_final_message"),
    "chat_template_kwargs",
)
_MANY_TOKENS = 4096


async def tokenize(service: Service, request: TokenizeRequest) -> bytes:
    """Returns the answer to a request; `ValueError` if it is not usable."""
    llm = service.llm
    tokenizer = require_tokenizer(llm.tokenizer, llm.config.model)
    if (request.prompt is None) == (request.messages is None):
        raise BadRequestError("send a prompt or messages, and not both", "prompt")
    for field in _OF_PROMPT if request.messages is not None else _OF_MESSAGES:
        if getattr(request, field) is not None:
            lack = "a prompt" if request.prompt is None else "messages"
            raise BadRequestError(f"{field} needs {lack}; leave it out", field)
    if request.prompt is not None:
        adds = request.add_special_tokens is not False
        ids = await llm.token_ids(request.prompt, add_special_tokens=adds)
    else:
        prompt: Any = await chat_prompt(service, request)
        ids = list(prompt["prompt_token_ids"])
    answer = Tokens(len(ids), llm.max_model_len, ids)
    if request.return_token_strs:
        answer.token_strs = [tokenizer.decode_token(token_id) for token_id in ids]
    return encode(answer)


async def detokenize(service: Service, request: DetokenizeRequest) -> bytes:
    """Returns the answer to a request; `ValueError` if it is not usable."""
    llm = service.llm
    tokenizer = require_tokenizer(llm.tokenizer, llm.config.model)
    for token_id in request.tokens:
        if token_id >= llm.vocab_size:
            raise BadRequestError(
                f"tokens holds {token_id}, which is outside the vocabulary of {llm.vocab_size}",
                "tokens",
            )

    def answer() -> bytes:
        return encode(Text(tokenizer.decode(request.tokens, skip_special_tokens=False)))

    if len(request.tokens) > _MANY_TOKENS:  # while others are answered
        return await asyncio.to_thread(answer)
    return answer()
