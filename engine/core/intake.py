"""From what a caller asks for to a group of sequences; whatever cannot be is refused here."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence

import numpy as np

from pallas_paged.engine.core import logprobs
from pallas_paged.engine.core.beam_search import BeamSearch
from pallas_paged.engine.core.grammar import Grammar
from pallas_paged.engine.core.logit_rules import resolve
from pallas_paged.engine.core.request import SequenceGroup
from pallas_paged.engine.core.scheduler import Scheduler
from pallas_paged.engine.sampling_params import BeamSearchParams, SamplingParams


class Intake:
    """Knows the limits of an engine, and none of its requests.

    Args:
      scheduler: asked whether it could run a group; nothing is queued.
      vocab_size: V; token ids are below it.
      max_model_len: most tokens of a sequence.
      eos_token_ids: tokens that end an output unless `ignore_eos`.
      has_text: whether outputs have text, in which stop strings can be found.
      seed: where the seeds of requests that bring none are drawn from.
      max_logprobs: see `EngineConfig`.
      speculates: whether tokens are guessed of requests that need nothing else of the host.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        vocab_size: int,
        max_model_len: int,
        eos_token_ids: Sequence[int],
        has_text: bool,
        seed: int,
        max_logprobs: int,
        speculates: bool = False,
    ):
        self._scheduler = scheduler
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._eos_token_ids = frozenset(eos_token_ids)
        self._has_text = has_text
        self._seeds = np.random.default_rng(seed)
        self._max_logprobs = max_logprobs
        self._speculates = speculates
        self._num_named = 0  # requests that came without an id

    def make_group(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams | BeamSearchParams,
        request_id: str | None = None,
        cache_salt: str | None = None,
        bad_sequences: Sequence[tuple[int, ...]] = (),
        grammar: Grammar | None = None,
    ) -> SequenceGroup:
        """Returns a group of `n` sequences, or beams, that `add` accepts; queues nothing.

        A request without an id or a seed draws one, unless it is refused. Requests share cached
        blocks only with those of the same `cache_salt`. `bad_sequences` are the tokens of the
        request's `bad_words`, `grammar` is that of its `structured_outputs`. `max_tokens=None`
        means as many as the model allows and as fit beside what is pinned for other prompts.

        Raises:
          ValueError: the prompt is empty, too long for the model, or for the pool together with
            `max_tokens` and `n`; `n`, or the beams, are more than can run at once; a token id is
            outside the vocabulary; stop strings without a tokenizer; more log-probabilities than
            `max_logprobs`; rules for the logits that cannot be, see `logit_rules.resolve`.
            The message names field, value and way out.
        """
        ids = checked_token_ids(prompt_token_ids, self._vocab_size)
        for token_id in params.stop_token_ids or ():
            if token_id >= self._vocab_size:
                raise ValueError(
                    f"stop_token_ids holds {token_id}, which is outside the vocabulary of "
                    f"{self._vocab_size} tokens"
                )
        eos_token_ids = frozenset() if params.ignore_eos else self._eos_token_ids
        stop_token_ids = frozenset(params.stop_token_ids or ())
        params, beams = self._checked_params(params, eos_token_ids | stop_token_ids)
        num_seqs = params.n if beams is None else beams.width
        name = f"request-{self._num_named}" if request_id is None else request_id
        self._scheduler.admission.check_num_seqs(name, num_seqs)  # each has a copy of the prompt
        group = SequenceGroup(
            request_id=name,
            prompt_token_ids=ids,
            max_tokens=1 if params.max_tokens is None else params.max_tokens,
            eos_token_ids=eos_token_ids,
            stop_token_ids=stop_token_ids,
            arrival_time=time.monotonic(),
            sampling_params=params,
            num_seqs=num_seqs,
            beams=beams,
            cache_salt=cache_salt,
            reads_cache=not params.skip_reading_prefix_cache and params.prompt_logprobs is None,
            writes_cache=not params.skip_writing_prefix_cache,
            logit_rules=resolve(
                params,
                bad_sequences=bad_sequences,
                vocab_size=self._vocab_size,
                ending_ids=eos_token_ids | stop_token_ids,
                grammar=grammar,
            ),
        )
        asks = params.logprobs is not None or params.prompt_logprobs is not None
        if self._speculates and group.logit_rules is None and not asks:
            group.waits_for_host = True
        if params.max_tokens is None:
            group.max_tokens = max(1, self._scheduler.admission.longest_output(group))
        self._check_lengths(group)
        self._num_named += request_id is None
        group.num_prompt_logprobs = params.logprob_targets(ids)[0] - 1
        group.sampling_params = self._with_seed(params)
        return group

    @contextlib.contextmanager
    def all_or_none(self) -> Iterator[None]:
        """Lets no request that is made inside draw an id or a seed if one of them is refused."""
        before = self._num_named, self._seeds.bit_generator.state
        try:
            yield
        except BaseException:
            self._num_named, self._seeds.bit_generator.state = before
            raise

    def _check_lengths(self, group: SequenceGroup) -> None:
        """Refuses a group that the scheduler would, or that asks for more than the model takes."""
        prompt_len, max_tokens = group.num_prompt_tokens, group.max_tokens
        min_tokens = group.sampling_params.min_tokens
        if min_tokens > max_tokens:
            raise ValueError(
                f"min_tokens={min_tokens} is more than the {max_tokens} tokens that fit behind the "
                "prompt; lower it, or shorten the prompt"
            )
        self._scheduler.check(group)
        if prompt_len + max_tokens > self._max_model_len:
            fitting = "" if group.beams else ", or pass max_tokens=None for as many as fit"
            raise ValueError(
                f"the prompt's {prompt_len} tokens and max_tokens={max_tokens} are more than "
                f"max_model_len={self._max_model_len}; shorten one of them{fitting}"
            )

    def _checked_params(
        self, params: SamplingParams | BeamSearchParams, ending_ids: frozenset[int]
    ) -> tuple[SamplingParams, BeamSearch | None]:
        """Returns what each sequence asks of its steps, and the search whose beams they are."""
        if isinstance(params, BeamSearchParams):
            beams = params.search(ending_ids)
            logprobs.check_beams(
                beams.width, beams.num_candidates, self._max_logprobs, self._vocab_size
            )
            return params.of_each_beam(beams.num_candidates), beams
        if params.stop and not self._has_text:
            raise ValueError(f"stop={params.stop!r} needs a tokenizer; use stop_token_ids")
        for field in ("logprobs", "prompt_logprobs"):
            asked = getattr(params, field)
            logprobs.check(field, asked, self._max_logprobs, self._vocab_size)
        return params, None

    def _with_seed(self, params: SamplingParams) -> SamplingParams:
        if params.seed is not None:
            return params
        return dataclasses.replace(params, seed=int(self._seeds.integers(1 << 63)))


def checked_token_ids(token_ids: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    """Returns a prompt's tokens.

    Raises:
      ValueError: there are none, they are no flat list of integers, or one is not below
        `vocab_size`.
    """
    types = set(map(type, token_ids)) if isinstance(token_ids, list | tuple) else set()
    if not types.isdisjoint({bool, np.bool_}):  # integers to Python and NumPy
        raise ValueError(
            f"prompt_token_ids={token_ids!r:.80} must be a flat list of integers; True and False "
            "are none"
        )
    try:
        ids = np.asarray(token_ids)
    except ValueError as error:
        raise ValueError(f"prompt_token_ids must be a flat list of integers: {error}") from error
    if ids.size == 0:
        raise ValueError("the prompt is empty; give it at least one token")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"prompt_token_ids must be a flat list of integers, not {token_ids!r:.80}")
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if outside.size:
        raise ValueError(
            f"prompt_token_ids holds {outside[0]}, which is outside the vocabulary of "
            f"{vocab_size} tokens"
        )
    return tuple(ids.tolist())
