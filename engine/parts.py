"""What an engine is made of, for who joins the parts: `LLM` in one thread, `AsyncLLM` in two."""

import dataclasses

from pallas_paged.engine.core.engine_core import EngineCore
from pallas_paged.engine.core.grammar import Grammar
from pallas_paged.engine.core.intake import Intake
from pallas_paged.engine.core.request import SequenceGroup
from pallas_paged.engine.kv.block_memory import BlockTableMemory
from pallas_paged.engine.metrics import Counts
from pallas_paged.engine.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams
from pallas_paged.engine.text.bad_words import bad_sequences
from pallas_paged.engine.text.grammars import Grammars
from pallas_paged.engine.text.output_processor import OutputProcessor
from pallas_paged.engine.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class EngineParts:
    """The core, which knows no text, and what makes requests for it and outputs of what it gives.

    Attributes:
      core: schedules and executes.
      memory: the owner of the block tables that the core schedules over.
      intake: makes requests of what callers ask for; reads what the core changes.
      processor: makes their outputs; shares nothing with the core.
      tokenizer: for bad words; None refuses them.
      vocab_size: V.
      grammars: compiles those of requests.
      plain_logprobs: whether steps that sample several tokens give their log-probabilities, see
        `Buckets.has_logprobs`.
      counts: what happened to requests so far.
    """

    core: EngineCore
    memory: BlockTableMemory
    intake: Intake
    processor: OutputProcessor
    tokenizer: Tokenizer | None
    vocab_size: int
    grammars: Grammars
    plain_logprobs: bool = False
    counts: Counts = dataclasses.field(default_factory=Counts)

    def bad_sequences(self, params: SamplingParams | BeamSearchParams) -> list[tuple[int, ...]]:
        """Returns the tokens of a request's bad words; `ValueError` as `bad_sequences` does."""
        words = params.bad_words if isinstance(params, SamplingParams) else None
        return list(bad_sequences(words, self.tokenizer, self.vocab_size))

    def grammar(self, params: SamplingParams | BeamSearchParams) -> Grammar | None:
        """Returns what a request's output has to be, if anything; may take long the first time.

        Raises:
          ValueError: see `Grammars.compile`.
        """
        wanted = params.structured_outputs if isinstance(params, SamplingParams) else None
        return self.grammars.compile(wanted)

    def open(self, group: SequenceGroup, prompt: str | None, kind: RequestOutputKind) -> None:
        """Lets the processor expect outputs of a group, before the core gets it.

        `prompt` is its text, if it came as text; `kind` is what each output holds, but for a beam
        search, which has one.
        """
        self.processor.add(
            group.request_id,
            group.prompt_token_ids,
            group.sampling_params,
            prompt=prompt,
            num_seqs=len(group.sequences),
            is_beam_search=group.beams is not None,
            arrival_time_s=group.arrival_time,
            output_kind=kind,
        )
        self.counts.num_prompt_tokens += group.num_prompt_tokens

    def may_hold(self, group: SequenceGroup, kind: RequestOutputKind) -> bool:
        """Returns whether nobody waits for a group's tokens before a sequence of it has ended.

        And the core can keep all that comes with them until then.
        """
        params = group.sampling_params
        return (
            kind is RequestOutputKind.FINAL_ONLY
            and group.beams is None
            and not params.stop
            and (params.logprobs is None or (params.logprobs == 0 and self.plain_logprobs))
            and params.prompt_logprobs is None
        )
