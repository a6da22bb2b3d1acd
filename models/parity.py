"""Holds a model against logits and greedy tokens that transformers computed with its checkpoint."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from pallas_paged.kv_cache import AttentionMetadata
from pallas_paged.models.config import DTYPES
from pallas_paged.models.interface import CausalLM

TOLERANCES = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.3}
"""By the dtype of weights and activations: the largest error of a logit, as a share of the root
mean square of the logits. Errors of rounding grow with depth; wrong weights give 1 and more."""

BLOCK_SIZE = 16


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """What transformers computes with one checkpoint, as `record_reference.record` describes it.

    Attributes:
      prompts: i32[length] each, of many lengths.
      logits: f32[length, V] at every position of each of the first `len(logits)` prompts.
      greedy: i32[P, G], the greedy continuation of each prompt; no token ends it.
      margins: f32[P, G], difference of the top two logits where each greedy token was chosen.
      dtype: of the weights and activations.
    """

    prompts: tuple[np.ndarray, ...]
    logits: tuple[np.ndarray, ...]
    greedy: np.ndarray
    margins: np.ndarray
    dtype: str = "float32"

    @classmethod
    def load(cls, file: Path) -> "Reference":
        """Returns what a file holds.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: it is not one that `record_reference` wrote.
        """
        try:
            with np.load(file) as arrays:
                ends = np.cumsum(arrays["prompt_lengths"])
                with_logits = ends[ends <= len(arrays["logits"])]
                reference = cls(
                    prompts=tuple(np.split(arrays["prompts"], ends[:-1])),
                    logits=tuple(np.split(arrays["logits"], with_logits[:-1])),
                    greedy=arrays["greedy"],
                    margins=arrays["margins"],
                    dtype=str(arrays["dtype"]) if "dtype" in arrays else "float32",
                )
        except FileNotFoundError:
            raise
        except Exception as error:  # zip, pickle and numpy errors of many kinds
            raise ValueError(
                f"{file} is not a file of pallas_paged.models.record_reference: {error}"
            ) from error
        if reference.dtype not in DTYPES:
            raise ValueError(f"{file}: dtype={reference.dtype!r} must be one of {DTYPES}")
        return reference

    @property
    def longest(self) -> int:
        """The most tokens of a sequence: a prompt and its continuation without the last token."""
        return max(map(len, self.prompts)) + self.greedy.shape[1] - 1


@dataclasses.dataclass(frozen=True)
class Parity:
    """How far a model is from a reference.

    Attributes:
      max_error: of a logit, in absolute terms.
      tolerance: the largest error that is still right.
      rms: root mean square of the recorded logits.
      num_positions: at which logits were compared.
      num_agreeing: greedy tokens that are the model's choice after the same tokens.
      num_comparable: greedy tokens whose recorded margin is more than twice `tolerance`: within it,
        the model must choose the same.
      num_greedy: all of them.
      num_wrong: comparable ones that are not the model's choice.
    """

    max_error: float
    tolerance: float
    rms: float
    num_positions: int
    num_agreeing: int
    num_comparable: int
    num_greedy: int
    num_wrong: int

    @property
    def ok(self) -> bool:
        """Whether logits and tokens are those of the reference, within the tolerance."""
        return self.max_error <= self.tolerance and self.num_wrong == 0

    def __str__(self) -> str:
        return (
            f"logits: max error {self.max_error:.3g} at {self.num_positions} positions, tolerance "
            f"{self.tolerance:.3g} (recorded: root mean square {self.rms:.3g})\n"
            f"greedy tokens: {self.num_agreeing} of {self.num_greedy} agree; "
            f"{self.num_comparable} have a margin above twice the tolerance, "
            f"{self.num_wrong} of these differ\n"
            f"parity: {'yes' if self.ok else 'NO'}"
        )


def compare(model: CausalLM, reference: Reference, tolerance: float | None = None) -> Parity:
    """Runs the reference's prompts and greedy tokens through the model, with paged attention.

    Args:
      model: with weights of the reference's dtype.
      reference: what to compare with.
      tolerance: the largest error of a logit, as a share of the recorded logits' root mean square;
        by default `TOLERANCES` at the reference's dtype.

    Raises:
      ValueError: the reference is of a model with another vocabulary, or of longer sequences.
    """
    vocab_size, longest = model.config.vocab_size, model.config.max_model_len
    sequences = [
        np.concatenate([prompt, greedy[:-1]])
        for prompt, greedy in zip(reference.prompts, reference.greedy, strict=True)
    ]
    if reference.logits[0].shape[1] != vocab_size:
        raise ValueError(
            f"the reference was recorded with another model: its logits are for "
            f"{reference.logits[0].shape[1]} tokens, the model's vocabulary has {vocab_size}"
        )
    if reference.longest > longest:
        raise ValueError(
            f"the reference has sequences of {reference.longest} tokens, the model takes {longest}"
        )
    recorded = np.concatenate(reference.logits)
    rms = float(np.sqrt(np.mean(recorded.astype(np.float64) ** 2)))
    allowed = rms * (TOLERANCES[reference.dtype] if tolerance is None else tolerance)

    run = _Prefill(model, reference.longest)
    errors, choices = [], []
    for index, sequence in enumerate(tqdm(sequences, desc="compare", unit="prompt")):
        logits = run(sequence)
        if index < len(reference.logits):
            theirs = reference.logits[index]
            errors.append(np.abs(logits[: len(theirs)] - theirs).max())
        choices.append(logits[len(reference.prompts[index]) - 1 :].argmax(-1))
    agree = np.stack(choices) == reference.greedy
    comparable = reference.margins > 2 * allowed
    return Parity(
        max_error=float(np.max(errors)),
        tolerance=allowed,
        rms=rms,
        num_positions=len(recorded),
        num_agreeing=int(agree.sum()),
        num_comparable=int(comparable.sum()),
        num_greedy=agree.size,
        num_wrong=int((comparable & ~agree).sum()),
    )


class _Prefill:
    """Runs one sequence at a time through a paged cache; one program for all lengths."""

    def __init__(self, model: CausalLM, max_len: int):
        graph, self._state = nnx.split(model)
        self._max_len = max_len
        num_blocks = -(-max_len // BLOCK_SIZE)
        self._block_tables = 1 + np.arange(num_blocks, dtype=np.int32)[None]

        def run(state: Any, input_ids: Any, places: Any) -> Any:
            model = nnx.merge(graph, state)
            dtype = jax.tree.leaves(state)[0].dtype
            specs = model.config.cache_specs(BLOCK_SIZE, dtype)
            caches = tuple(spec.zeros(1 + num_blocks) for spec in specs)
            metadata = AttentionMetadata(**places, max_query_len=max_len)
            hidden, _ = model(input_ids, metadata, caches)
            return model.compute_logits(hidden)

        self._run = jax.jit(run)

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """Returns the logits at each of the tokens, f32[length, V]."""
        length = len(tokens)
        input_ids, positions, slots = np.zeros((3, self._max_len), np.int32)
        input_ids[:length], positions[:length] = tokens, np.arange(length)
        slots[:length] = BLOCK_SIZE + np.arange(length)  # block 1 is the first
        places = {
            "positions": jnp.asarray(positions),
            "slot_mapping": jnp.asarray(slots),
            "block_tables": jnp.asarray(self._block_tables),
            "seq_lens": jnp.asarray([length], jnp.int32),
            "query_start_loc": jnp.asarray([0, length], jnp.int32),
        }
        return np.asarray(self._run(self._state, jnp.asarray(input_ids), places))[:length]
