"""An engine as a model of lm-evaluation-harness, which must be installed: the extra `eval`."""

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from pallas_paged.engine.evaluation.scoring import (
    adds_special_tokens,
    check_logprobs_mode,
    make_completion,
    make_continuation,
    read_score,
    read_text,
    run,
    scoring_request,
)
from pallas_paged.engine.llm import LLM
from pallas_paged.engine.text.tokenizer import require_tokenizer

logger = logging.getLogger("lm_eval.models.pallas_paged")  # below the one that lm_eval shows

Pair = tuple[tuple[str, str] | None, list[int], list[int]]
"""The key of a request in lm_eval's cache, the tokens of its context and of its continuation."""


class PallasPagedLM(TemplateLM):
    """An `LLM` that answers what tasks ask for.

    Scores, texts and what is left out of long ones are those of lm_eval's `hf` model with the same
    `max_length`, which is one less than the engine's `max_model_len`: lm_eval scores the token
    behind the last one that a model reads.

    Args:
      pretrained: folder with a checkpoint and tokenizer files, see `LLM`.
      max_length: the most tokens that the model reads; instead of `max_model_len`.
      max_gen_toks: most tokens to generate for tasks that do not say so.
      add_bos_token: split all texts with BOS in front, or without special tokens; None leaves it to
        the tokenizer. A text that begins with BOS gets no other one.
      prefix_token_id: what is read in place of an empty context; None means BOS, or EOS if there is
        none.
      chat_template_args: further variables of the chat template.
      enable_thinking: one of them.
      batch_size, max_batch_size, device: lm_eval always gives these. They are not used, and a line
        is logged that says so.
      **options: all other options of `LLM`, such as `dtype`, `num_blocks` and `seed`.

    Attributes:
      llm: the engine.
      tokenizer: of transformers.

    Raises:
      ValueError, TypeError, FileNotFoundError: an option or the checkpoint is not usable.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        chat_template_args: Mapping[str, Any] | None = None,
        enable_thinking: bool | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **options: Any,
    ):
        super().__init__()
        # lm_eval resamples some metrics in forked processes; one forked beside JAX's threads may
        # wait for ever.
        os.environ.setdefault("DISABLE_MULTIPROC", "1")
        if max_length is not None:
            if options.get("max_model_len") is not None:
                raise ValueError(
                    f"max_length={max_length} and max_model_len={options['max_model_len']} are "
                    "both given; choose one: max_model_len is max_length + 1"
                )
            options["max_model_len"] = max_length + 1
        given = {"batch_size": batch_size, "max_batch_size": max_batch_size, "device": device}
        unused = [f"{name}={value}" for name, value in given.items() if value is not None]
        if unused:
            logger.info(
                "%s: not used. The engine forms batches of up to max_num_seqs requests itself, on "
                "JAX's default device, which JAX_PLATFORMS chooses",
                ", ".join(unused),
            )
        self.llm = LLM(pretrained, **options)
        check_logprobs_mode(self.llm.config.logprobs_mode)
        self._text = require_tokenizer(self.llm.tokenizer, self.llm.config.model)
        self.tokenizer = self._text.implementation
        self.max_gen_toks = max_gen_toks
        self._add_bos_token = add_bos_token
        self._template_variables = dict(chat_template_args or {})
        if enable_thinking is not None:
            self._template_variables["enable_thinking"] = enable_thinking
        self._template_name: str | None = None
        self._prefix_token_id = self._choose_prefix(prefix_token_id)
        self._prefix = self.tokenizer.decode([self._prefix_token_id])

    def _choose_prefix(self, prefix_token_id: int | None) -> int:
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        for token_id in (prefix_token_id, bos, eos):
            if token_id is not None:
                return int(token_id)
        raise ValueError(
            f"the tokenizer of {self._text.path} has neither BOS nor EOS to stand for an empty "
            "context; pass prefix_token_id"
        )

    @property
    def max_length(self) -> int:
        """The most tokens that the model reads."""
        return self.llm.max_model_len - 1

    @property
    def eot_token_id(self) -> int | None:
        """EOS; None if the tokenizer has none."""
        return self._text.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What is read in place of an empty context."""
        return self._prefix_token_id

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in lm_eval's caches of requests."""
        return str(self._text.path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Returns the template that lm_eval names, and takes it for all conversations."""
        if isinstance(chat_template, str) and isinstance(self.tokenizer.chat_template, Mapping):
            self._template_name = chat_template
        template: str | None = super().chat_template(chat_template)
        return template

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """Returns the text of a conversation.

        Where the template does not accept it, that is done again without its system messages, as
        lm_eval's `hf` model does, and a warning says so.
        """

        def render(messages: Sequence[Mapping[str, Any]]) -> str:
            return self._text.render_chat(
                messages,
                chat_template=self._template_name,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                chat_template_kwargs=self._template_variables,
            )

        others = [message for message in chat_history if message["role"] != "system"]
        try:
            return render(chat_history)
        except ValueError as error:
            if len(others) == len(chat_history):
                raise
            logger.warning("the system messages of a conversation are left out: %s", error)
            return render(others)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Returns the tokens of a text; see `adds_special_tokens`."""
        adds = adds_special_tokens(string, add_special_tokens, self._add_bos_token, self._prefix)
        token_ids = self._text.encode(string, add_special_tokens=adds)
        if adds and add_special_tokens is None and self._add_bos_token:
            bos = self.tokenizer.bos_token_id
            if bos is None:
                raise ValueError(
                    f"add_bos_token=True, and the tokenizer of {self._text.path} has no BOS; leave "
                    "it out"
                )
            return token_ids if token_ids[:1] == [bos] else [bos, *token_ids]
        return token_ids

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Returns the log-probability of each text, in windows of `max_length` tokens."""
        windows: list[Pair] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            windows += [(None, *make_disjoint_window(pair)) for pair in pairs]
            owners += [number] * (len(windows) - len(owners))
        totals = [0.0] * len(requests)
        scores = self._score(windows, "loglikelihood_rolling", disable_tqdm)
        for number, (logprob, _) in zip(owners, scores, strict=True):
            totals[number] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Returns the scores of continuations; `loglikelihood` of the base class asks for them."""
        return self._score(requests, "loglikelihood", disable_tqdm)

    def _score(
        self, requests: Sequence[Pair], title: str, disable_tqdm: bool
    ) -> list[tuple[float, bool]]:
        continuations = [
            make_continuation(context_ids, continuation_ids, self.max_length)
            for _, context_ids, continuation_ids in requests
        ]
        self._tell_left_out(continuation.num_left_out for continuation in continuations)

        def read(number: int, output: Any) -> tuple[float, bool]:
            logprob, is_greedy = read_score(continuations[number], output)
            score = logprob, is_greedy  # a plain tuple, as lm_eval's caches hold
            if (key := requests[number][0]) is not None:
                self.cache_hook.add_partial("loglikelihood", key, score)
            return score

        return self._run(map(scoring_request, continuations), title, read, disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns completions, each up to the first of its `until` strings."""
        completions = [
            make_completion(
                self.tok_encode(context) or [self.prefix_token_id],
                normalize_gen_kwargs(settings, self.max_gen_toks),
                self.max_length,
            )
            for context, settings in (request.args for request in requests)
        ]
        self._tell_left_out(completion.num_left_out for completion in completions)

        def read(number: int, output: Any) -> str:
            text = read_text(completions[number], output, self.tokenizer)
            self.cache_hook.add_partial("generate_until", requests[number].args, text)
            return text

        prompts = [(completion.prompt_token_ids, completion.params) for completion in completions]
        return self._run(prompts, "generate_until", read, disable_tqdm)

    def _run(
        self,
        requests: Iterable[Any],
        title: str,
        read: Callable[[int, Any], Any],
        disable_tqdm: bool,
    ) -> list[Any]:
        """Returns what `read` makes of the outputs, in the order of the requests."""
        outputs = run(self.llm, list(requests), title, use_tqdm=not disable_tqdm)
        results = {number: read(number, output) for number, output in outputs}
        return [results[number] for number in range(len(results))]

    def _tell_left_out(self, numbers: Iterable[int]) -> None:
        """Warns of the texts that were too long."""
        counts = list(numbers)
        if any(counts):
            logger.warning(
                "%d of %d contexts were too long for max_length=%d: their first tokens, %d in all, "
                "were left out",
                sum(map(bool, counts)),
                len(counts),
                self.max_length,
                sum(counts),
            )
