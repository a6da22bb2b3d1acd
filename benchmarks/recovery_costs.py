"""What it costs to swap a request, and to compute it again: the micro-benchmark of Fig. 19.

The PagedAttention paper (Kwon et al., 2023) times swaps of 256 tokens out and back in, by block
size, beside their recomputation. `measure_costs` does that on an engine, which `engine_for` makes.
"""

import math
from typing import Any, NamedTuple

from pallas_paged.engine import LLM
from pallas_paged.engine.core.policies import Recovery, RecoveryCosts
from pallas_paged.engine.device.recovery_costs import (
    longest_prompt,
    measured_costs,
    recompute_s,
    swap_s,
)
from pallas_paged.engine.kv.host_pool import HostPool
from pallas_paged.engine.kv.sharing import blocks_for
from pallas_paged.models import load_config

_SWAP_SPACE_GIB, _LONGEST = 4, 4096


class SwapCosts(NamedTuple):
    """Of one group of tokens in blocks of one size.

    Attributes:
      block_size: tokens of a block.
      num_tokens: of the group.
      swap_s: measured seconds to copy its blocks out to the host and back in.
      recompute_s: measured seconds to compute its tokens again.
      costs: what an engine with `preemption_mode="auto"` measures.
      choice: what that engine does with the group.
      crossover: tokens from which on it swaps all groups of one sequence, however long; infinity if
        it does not even swap the longest.
    """

    block_size: int
    num_tokens: int
    swap_s: float
    recompute_s: float
    costs: RecoveryCosts
    choice: Recovery
    crossover: float

    def row(self) -> dict[str, Any]:
        """Returns a line of a table, in milliseconds; "inf" for a crossover that is not there."""
        never = math.isinf(self.crossover)
        return {
            "block size": self.block_size,
            f"swap {self.num_tokens} tokens, ms": 1e3 * self.swap_s,
            f"recompute {self.num_tokens} tokens, ms": 1e3 * self.recompute_s,
            "auto": self.choice,
            "swap from tokens": "inf" if never else int(self.crossover),
            "us/token": 1e6 * self.costs.seconds_per_token,
            "us/swap": 1e6 * self.costs.seconds_per_swap,
            "us/block, both ways": 2e6 * self.costs.seconds_per_block,
        }


def engine_for(
    folder: str, block_size: int, max_model_len: int | None = None, **options: Any
) -> LLM:
    """Returns an engine to measure, with a pool and host memory for two sequences.

    Args:
      folder: of a model; its weights are drawn, unless `load_format` says otherwise.
      block_size: tokens of a block.
      max_model_len: None for as many as the model was made for, but no more than 4096.
      **options: see `EngineConfig`.
    """
    if max_model_len is None:
        max_model_len = min(_LONGEST, load_config(folder).default_max_model_len)
    fixed = {
        "load_format": "dummy",
        "max_num_seqs": 2,
        "num_blocks": 1 + 2 * blocks_for(max_model_len, block_size),
        "swap_space": _SWAP_SPACE_GIB,
        "preemption_mode": "swap",  # "auto" would measure, which `measure_costs` does
    }
    return LLM(folder, block_size=block_size, max_model_len=max_model_len, **fixed | options)


def measure_costs(llm: LLM, num_tokens: int = 256) -> SwapCosts:
    """Returns what a group of one sequence with so many tokens costs on an engine that is idle.

    What requests have left in its caches stays. What "auto" does is told by what it would measure
    now, see `pallas_paged.engine.device.recovery_costs`, whatever the engine's own mode is.

    Args:
      llm: an engine with `swap_space`.
      num_tokens: at most as many as its pool and a sequence hold.

    Raises:
      ValueError: no such group fits the pool, a sequence or the host memory.
    """
    stats, runner = llm.kv_stats(), llm.runner
    host_pool = llm.engine.core.scheduler.host_pool
    longest = min(longest_prompt(runner), stats.num_blocks * stats.block_size)
    if not 0 < num_tokens <= longest:
        raise ValueError(
            f"num_tokens={num_tokens} must be from 1 to {longest}, as the engine holds"
        )
    num_blocks = blocks_for(num_tokens, stats.block_size)
    num_copied = host_pool.padded(num_blocks)
    if num_copied > host_pool.num_blocks:
        raise ValueError(
            f"swap_space={llm.config.swap_space} holds {host_pool.num_blocks} blocks, and a swap "
            f"of {num_tokens} tokens takes {num_copied}; give it more"
        )
    costs = measured_costs(runner, host_pool.num_blocks)
    return SwapCosts(
        stats.block_size,
        num_tokens,
        swap_s(runner, num_blocks),
        recompute_s(runner, num_tokens),
        costs,
        costs.cheaper(num_tokens, num_copied),
        crossover(costs, stats.block_size, longest, host_pool),
    )


def crossover(costs: RecoveryCosts, block_size: int, longest: int, host_pool: HostPool) -> float:
    """Returns the tokens from which on swapping one sequence is cheaper, up to `longest` tokens."""
    first = math.inf
    for num_tokens in range(longest, 0, -1):
        num_blocks = host_pool.padded(blocks_for(num_tokens, block_size))
        if costs.cheaper(num_tokens, num_blocks) == "recompute":
            break
        first = num_tokens
    return first
