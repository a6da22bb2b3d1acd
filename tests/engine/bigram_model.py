"""A model whose logits are a table: row t holds those of what follows token t.

So everything behind the logits can be held against NumPy, from requests to outputs, with programs
that compile in a second.
"""

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_paged.engine import BeamSearchParams, SamplingParams
from pallas_paged.engine.build import join
from pallas_paged.engine.core.buckets import Buckets
from pallas_paged.engine.core.policies import always_recompute, always_swap
from pallas_paged.engine.core.scheduler import Scheduler
from pallas_paged.engine.core.speculation import Proposer
from pallas_paged.engine.device.drafted import Drafted
from pallas_paged.engine.device.runner import ModelRunner
from pallas_paged.engine.device.sampling import SamplingInputs, sample
from pallas_paged.engine.engine import Engine
from pallas_paged.engine.kv.block_memory import BlockTableMemory
from pallas_paged.engine.kv.host_pool import HostPool
from pallas_paged.engine.outputs import RequestOutput
from pallas_paged.models import ModelConfig
from pallas_paged.models.interface import Wanted

VOCAB_SIZE = 24
MAX_MODEL_LEN = 64
EOS = 0
MAX = np.finfo(np.float32).max


class BigramConfig(ModelConfig):
    """The least that a model has."""

    architecture: ClassVar[str] = "Bigram"


class Bigram(nnx.Module):
    """Hidden states are the logits."""

    def __init__(self, table: np.ndarray) -> None:
        self.config = BigramConfig(
            vocab_size=len(table),
            hidden_size=len(table),
            num_layers=1,
            num_q_heads=1,
            num_kv_heads=1,
            head_dim=8,
            max_position_embeddings=MAX_MODEL_LEN,
        )
        self.table = nnx.Param(jnp.asarray(table))

    def __call__(
        self,
        input_ids: jax.Array,
        metadata: Any,
        kv_caches: Any,
        *,
        attend: Any,
        wanted: Wanted | None = None,
    ) -> Any:
        wanted_ids = input_ids if wanted is None else input_ids[wanted.places]
        return self.table.get_value()[wanted_ids], kv_caches

    def compute_logits(self, hidden: jax.Array) -> jax.Array:
        return hidden


def make_table(seed: int = 0) -> np.ndarray:
    """Logits of both signs, spread enough for greedy runs that a penalty turns."""
    table = np.random.default_rng(seed).standard_normal((VOCAB_SIZE, VOCAB_SIZE)) * 2
    return table.astype(np.float32)


def make_engine(
    table: np.ndarray,
    *,
    num_blocks: int = 65,
    max_logprobs: int = 20,
    tokenizer: Any = None,
    num_scheduler_steps: int = 1,
    proposer: Proposer | None = None,
    draft: np.ndarray | None = None,
    eos_token_ids: Sequence[int] = (EOS,),
    num_host_blocks: int = 0,
    token_logprobs: bool = False,
    logprobs_mode: str = "raw",
    **options: bool,
) -> Engine:
    """Returns an engine with rows for 4 sequences and prompts in chunks of 8 tokens.

    With a table `draft` that one guesses. With `num_host_blocks` it swaps. `options` are those of
    `join`, and `enable_prefix_caching`.
    """
    memory = BlockTableMemory(
        num_blocks=num_blocks,
        block_size=4,
        max_num_seqs=4,
        max_model_len=MAX_MODEL_LEN,
        enable_prefix_caching=options.pop("enable_prefix_caching", False),
    )
    width = memory.tables.shape[1]
    num_drafts = 0 if proposer is None else proposer.num_speculative_tokens
    buckets = Buckets.for_limits(
        4,
        8,
        width,
        num_steps=num_scheduler_steps,
        num_drafts=num_drafts,
        proposes=draft is not None,
        has_logprobs=token_logprobs,
    )
    runner = ModelRunner(
        Bigram(table) if draft is None else Drafted(Bigram(table), Bigram(draft)),
        num_blocks=num_blocks,
        block_size=4,
        kv_cache_dtype=jnp.dtype(jnp.float32),
        max_num_seqs=4,
        buckets=buckets,
        max_logprobs=max_logprobs,
        logprobs_mode=logprobs_mode,
        swaps=num_host_blocks > 0,
    )
    scheduler = Scheduler(
        memory,
        max_num_seqs=4,
        max_num_batched_tokens=8,
        max_model_len=MAX_MODEL_LEN,
        num_scheduler_steps=num_scheduler_steps,
        proposer=proposer,
        choose_recovery=always_swap if num_host_blocks else always_recompute,
        host_pool=HostPool(num_host_blocks, memory.num_usable_blocks),
    )
    return Engine(
        join(
            scheduler,
            memory,
            runner,
            buckets,
            vocab_size=len(table),
            max_model_len=MAX_MODEL_LEN,
            eos_token_ids=eos_token_ids,
            tokenizer=tokenizer,
            max_logprobs=max_logprobs,
            **options,
        )
    )


def run(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams | BeamSearchParams],
) -> list[RequestOutput]:
    """Completes the prompts in one run."""
    sequences = [engine.make_group(p, one) for p, one in zip(prompts, params, strict=True)]
    for sequence in sequences:
        engine.add(sequence)
    done = {}
    while engine.has_unfinished:
        done |= {output.request_id: output for output in engine.step()}
    engine.check_idle()
    return [done[sequence.request_id] for sequence in sequences]


def chi_square(table: np.ndarray, last: int, tokens: Sequence[int], step: int) -> float:
    """Returns how far samples are from their distribution `step` tokens behind a prompt's last."""
    logits = np.exp(table.astype(np.float64))
    transition = logits / logits.sum(axis=1, keepdims=True)
    expected = np.linalg.matrix_power(transition, step)[last] * len(tokens)
    counts = np.bincount(tokens, minlength=VOCAB_SIZE)
    return float(((counts - expected) ** 2 / expected).sum())


# ---- the same in NumPy -------------------------------------------------------------------------


def ruled_logits(
    logits: np.ndarray,
    prompt: Sequence[int],
    output: Sequence[int],
    params: SamplingParams,
    bad_sequences: Sequence[Sequence[int]] = (),
) -> np.ndarray:
    """Returns the logits of the next token under the request's rules, one rule after the other."""
    logits = logits.astype(np.float32).copy()
    for token, bias in (params.logit_bias or {}).items():
        logits[token] += np.float32(bias)
    for token in range(VOCAB_SIZE):
        if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
            logits[token] = -np.inf
    for *before, token in bad_sequences:
        if list(output)[len(output) - len(before) :] == before:
            logits[token] = -np.inf
    if len(output) < params.min_tokens:
        for token in {*params.stop_token_ids, *(() if params.ignore_eos else (EOS,))}:
            logits[token] = -np.inf
    for token in range(VOCAB_SIZE):
        if token in prompt or token in output:
            factor = np.float32(params.repetition_penalty)
            if logits[token] != -np.inf:
                with np.errstate(over="ignore"):  # the largest float stands for what is larger
                    x = logits[token] / factor if logits[token] > 0 else logits[token] * factor
                logits[token] = np.clip(x, -MAX, MAX)
        times = np.float32(list(output).count(token))
        logits[token] -= np.float32(params.frequency_penalty) * times
        logits[token] -= np.float32(params.presence_penalty) if times else np.float32(0)
    return logits


@functools.cache
def _sample() -> Any:
    return jax.jit(sample)


def next_token(
    logits: np.ndarray, position: int, params: SamplingParams, sample_index: int = 0
) -> int:
    """Returns the token that the sampler draws from ruled logits; its own tests are elsewhere."""
    if params.temperature == 0:
        return int(logits.argmax())
    inputs = SamplingInputs(
        temperature=np.full(1, params.temperature, np.float32),
        top_k=np.full(1, params.top_k, np.int32),
        top_p=np.full(1, params.top_p, np.float32),
        min_p=np.full(1, params.min_p, np.float32),
        seeds=np.array([divmod(params.seed, 2**32)], np.uint32),
        sample_index=np.full(1, sample_index, np.int32),
        positions=np.full(1, position, np.int32),
    )
    return int(_sample()(logits[None], inputs)[0])


def expected(
    table: np.ndarray,
    prompt: Sequence[int],
    params: SamplingParams,
    bad_sequences: Sequence[Sequence[int]] = (),
    sample_index: int = 0,
) -> list[int]:
    """Returns the output tokens of one of a request's completions."""
    output: list[int] = []
    ending = {*params.stop_token_ids, *(() if params.ignore_eos else (EOS,))}
    while len(output) < params.max_tokens:
        context = [*prompt, *output]
        logits = ruled_logits(table[context[-1]], prompt, output, params, bad_sequences)
        output.append(next_token(logits, len(context), params, sample_index))
        if output[-1] in ending:
            break
    return output
