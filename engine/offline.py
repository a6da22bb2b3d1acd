"""Requests from plain Python: prompts in, completions out, one call after the other."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from pallas_paged.engine.build import Built
from pallas_paged.engine.config import EngineConfig
from pallas_paged.engine.core.request import SequenceGroup
from pallas_paged.engine.engine import Engine
from pallas_paged.engine.outputs import RequestOutput
from pallas_paged.engine.reader import RequestReader
from pallas_paged.engine.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams
from pallas_paged.engine.streams import Streams
from pallas_paged.engine.text.prompts import (
    Message,
    Params,
    Prompt,
    PromptReader,
    split_conversations,
)
from pallas_paged.engine.text.tokenizer import require_tokenizer
from pallas_paged.engine.turns import Turns

logger = logging.getLogger(__name__)


class OfflineLLM:
    """An engine in this process, for callers that wait: the part of `LLM` that takes requests.

    Several threads may use it: their requests run in one batch, and a step runs in the thread that
    waits for it. If that is interrupted, or fails, it raises there, and the other threads' requests
    end with `finish_reason="abort"` and the error as `stop_reason`. A forked child cannot use it.

    Args:
      config: what the engine is like.
      built: the engine, which is nobody else's.

    Attributes:
      config: as given.
      engine: of `built`, as are the next four.
      runner: likewise.
      tokenizer: likewise.
      model_config: likewise.
      max_model_len: likewise.
      announce: called with a line while a request waits for a compilation, after two seconds and
        where no progress bar says so; logs it, and may be replaced.
    """

    def __init__(self, config: EngineConfig, built: Built):
        self.config = config
        self.engine, self.runner = Engine(built.parts), built.runner
        self.tokenizer = built.tokenizer
        self.model_config, self.max_model_len = built.model_config, built.max_model_len
        self.announce: Callable[[str], object] = logger.info
        self._defaults = built.source.sampling_defaults
        self._prompts = PromptReader(self.tokenizer, config.model, self.model_config.vocab_size)
        self._turns = Turns()
        self._reader = RequestReader(
            self.engine,
            self._turns,
            self._prompts,
            config,
            self._defaults,
            self.max_model_len,
        )
        self._streams = Streams(self.engine, self._turns)

    def warm_up(self) -> None:
        """Compiles every program, so that no request waits for a compilation."""
        with self._turns:
            self.runner.programs.announce = self.announce
            self.runner.warm_up()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params | Sequence[Params] | None = None,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Completes prompts as one continuously batched run.

        Args:
          prompts: one or several of `Prompt`; a list of integers is one.
          sampling_params: one for all, or one per prompt; None means what
            `get_default_sampling_params` returns, of whose `max_tokens` as many as fit. Some may be
            `BeamSearchParams`.
          use_tqdm: show progress on standard error, compilations too.
          priority: one number per prompt, lower ones first; for `scheduling_policy="priority"`.

        Returns:
          One output per prompt, in the order of the prompts.

        Raises:
          ValueError: a prompt or parameter is not usable; the message says which of several.
            Nothing has been run, and the next call gives what it would have given without this.
        """
        requests = self._reader.read(prompts, sampling_params, priority)
        done: dict[str, RequestOutput] = {}
        with tqdm(total=len(requests), unit="request", disable=not use_tqdm) as progress:
            core, begin = self.engine.core, self.engine.core.num_generated_tokens
            announce = progress.set_postfix_str if use_tqdm else self.announce
            for output in self._run(requests, announce, RequestOutputKind.FINAL_ONLY):
                done[output.request_id] = output
                progress.update()
                tokens = core.num_generated_tokens - begin
                seconds = max(progress.format_dict["elapsed"], 1e-9)
                progress.set_postfix_str(f"{tokens / seconds:.1f} output tokens/s")
        return [done[group.request_id] for group, _ in requests]

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams | Sequence[BeamSearchParams],
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Searches the most likely completions of prompts, as one batch.

        Args:
          prompts: see `generate`.
          params: one for all, or one per prompt.
          use_tqdm: see `generate`.

        Returns:
          One output per prompt, in the order of the prompts. Its `num_return` completions are
          sorted by their `score`, best first.

        Raises:
          ValueError: see `generate`; or params of another kind.
        """
        for one in params if isinstance(params, list | tuple) else [params]:
            if not isinstance(one, BeamSearchParams):
                raise ValueError(f"params={one!r:.80} must be BeamSearchParams; see `generate`")
        return self.generate(prompts, params, use_tqdm)

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params | Sequence[Params] | None = None,
        priority: Sequence[int] | None = None,
    ) -> Iterator[RequestOutput]:
        """Completes prompts like `generate`, and yields each output whenever it has grown.

        What an output holds is up to the request's `output_kind`: all so far, which costs more per
        token the longer it gets, only what is new, or nothing before the end. The last output of a
        request has `finished` set. What is wrong with a prompt is raised before this returns; the
        requests run while the result is iterated over, together with those of other iterations.
        Leaving the iteration early aborts what has not finished. A beam search is yielded once,
        when it is over.
        """
        return self._run(self._reader.read(prompts, sampling_params, priority), self.announce)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params | Sequence[Params] | None = None,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation, or several as one batch.

        Args:
          messages: a conversation, `[{"role": ..., "content": ...}, ...]`, or a list of them. A
            content is a string or a list of `{"type": "text", "text": ...}`; templates that do not
            loop over the list get the texts joined by newlines.
          sampling_params: see `generate`.
          use_tqdm: see `generate`.
          chat_template: a Jinja template, or the name of one of the tokenizer's; None is its only
            one, or of several "tool_use" if there are tools, else "default".
          add_generation_prompt: end the prompt where the assistant's answer begins.
          continue_final_message: let the model go on with the last message instead; needs
            `add_generation_prompt=False`.
          tools: functions that the model may call, as JSON schemas or as Python functions with type
            hints and a docstring; what it answers is text, as always.
          chat_template_kwargs: further variables of the template, such as `enable_thinking`.
          priority: see `generate`; one number per conversation.

        Raises:
          ValueError: there is no tokenizer or no such template, the template does not accept the
            messages, or as for `generate`.
        """
        prompts = [
            self._prompts.from_chat(
                conversation,
                name,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                chat_template_kwargs=chat_template_kwargs,
            )
            for name, conversation in split_conversations(messages)
        ]
        return self.generate(prompts, sampling_params, use_tqdm, priority)

    def chat_prompt(
        self,
        messages: Sequence[Message],
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """Returns the prompt that `chat` makes of one conversation."""
        return self._prompts.from_chat(
            messages,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
        )

    def abort(self, request_id: str) -> None:
        """Ends a request that `stream` is running; unknown and finished ones are ignored.

        Raises:
          ValueError: `request_id` is no string.
        """
        if not isinstance(request_id, str):
            raise ValueError(f"request_id={request_id!r:.80} must be a string: abort one by one")
        with self._turns:
            self.engine.abort(request_id)

    def get_tokenizer(self) -> Any:
        """Returns the tokenizer, as transformers made it.

        Raises:
          ValueError: the folder has none.
        """
        return require_tokenizer(self.tokenizer, self.config.model).implementation

    def get_default_sampling_params(self) -> SamplingParams:
        """Returns `SamplingParams` with what the model's `generation_config.json` advises.

        These are its temperature, top_k, top_p, min_p, repetition_penalty and max_new_tokens, where
        it has them; see `pallas_paged.models.load_sampling_defaults`.

        Raises:
          ValueError: one of them is not usable; requests then have to bring their own.
        """
        return self._defaults()

    def _run(
        self,
        requests: list[tuple[SequenceGroup, str | None]],
        announce: Callable[[str], object],
        output_kind: RequestOutputKind | None = None,
    ) -> Iterator[RequestOutput]:
        """Runs the requests; `announce` is told of compilations in the steps of this iteration."""

        def before_step() -> None:
            self.runner.programs.announce = announce

        return self._streams.run(requests, before_step, output_kind)
