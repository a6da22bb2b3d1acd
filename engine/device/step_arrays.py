"""What the programs of steps leave on the device."""

from typing import NamedTuple

import jax

from pallas_paged.engine.device.rows import Rows
from pallas_paged.kv_cache import KVCache

Caches = tuple[KVCache, ...]


class StepArrays(NamedTuple):
    """What a step leaves on the device.

    Attributes:
      kv_caches: in the place of those that were donated.
      rows: with this step's samples and entries of block tables.
      tokens: i32[B, K], the samples of the bucket's `num_steps`, or `num_drafts` + 1, and what it
        proposes behind them, as many as `num_drafts`. A sequence
        whose logits are not finite gets V, one whose rules leave no token V + 1, which are no
        tokens: the host turns them into errors. 0 for steps that it does not make.
      logprobs: i32[B, K, 3 + 2 W], of each sample what `logprobs.pack` gives, whose first column
        are the `tokens`. After a full step, which samples once; zeros if it `looks` and no row asks
        for them. After a plain one with `Bucket.has_logprobs`, W being 0; else None.
      counts: see `RowState`, with this step's input tokens; None after a plain step.
      hidden: of all T tokens, for `prompt_logprobs`; of full steps that are not decode steps.
    """

    kv_caches: Caches
    rows: Rows
    tokens: jax.Array
    logprobs: jax.Array | None
    counts: jax.Array | None
    hidden: jax.Array | None
