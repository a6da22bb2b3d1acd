"""Times the block tables beside an allocator of plain Python lists with the same semantics.

Each row is one call of the allocator as an engine makes it, with `num_seqs` sequences of
`num_tokens` tokens in the state. `list` keeps a list of blocks per sequence and changes it in
place; its tables do not yet have the form that the device takes, so making the padded array is a
row of its own (the functional tables are that array). `jax` is jitted, on JAX's default device,
and waited for.

  python -m benchmarks.block_tables --num_seqs=256 --num_tokens=4096 --json=out.json
"""

import functools
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from pallas_paged import block_tables as bt
from pallas_paged.models import command_line

_NUM_SEQS = flags.DEFINE_integer("num_seqs", 256, "Sequences in the state.", lower_bound=2)
_NUM_TOKENS = flags.DEFINE_integer("num_tokens", 4096, "Tokens per sequence.", lower_bound=1)
_BLOCK_SIZE = flags.DEFINE_integer("block_size", 16, "Tokens per block.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 160, "Calls timed per figure.", lower_bound=1)
_JAX = flags.DEFINE_boolean("jax", True, "Also time the jitted functions.")
_JSON = flags.DEFINE_string("json", None, "Also write the figures, in microseconds, to this file.")


class ListAllocator:
    """A list of blocks per sequence, reference counts, a free list: what engines write by hand."""

    def __init__(
        self, num_blocks: int, max_num_seqs: int, max_blocks_per_seq: int, block_size: int
    ):
        self.max_blocks_per_seq, self.block_size = max_blocks_per_seq, block_size
        self.blocks: list[list[int]] = [[] for _ in range(max_num_seqs)]
        self.lens = [0] * max_num_seqs
        self.refs = [0] * num_blocks
        self.free_blocks = list(range(num_blocks - 1, 0, -1))

    def append(self, num_new: list[int]) -> list[tuple[int, int]] | None:
        """Returns the copies on write; None, with nothing changed, if there is no room."""
        if not self._has_room(num_new):
            return None
        size, lens, refs, free_blocks = self.block_size, self.lens, self.refs, self.free_blocks
        copies = []
        for row, count in enumerate(num_new):
            if not count:
                continue
            blocks, length = self.blocks[row], lens[row]
            if length % size and refs[blocks[-1]] > 1:
                block = free_blocks.pop()
                copies.append((blocks[-1], block))
                refs[blocks[-1]] -= 1
                refs[block], blocks[-1] = 1, block
            lens[row] = length + count
            for _ in range(-(-(length + count) // size) - len(blocks)):
                block = free_blocks.pop()
                refs[block] = 1
                blocks.append(block)
        return copies

    def _has_room(self, num_new: list[int]) -> bool:
        size, refs, needed = self.block_size, self.refs, 0
        leaving: dict[int, int] = {}
        for row, count in enumerate(num_new):
            if not count:
                continue
            blocks, length = self.blocks[row], self.lens[row]
            num_blocks = -(-(length + count) // size)
            if num_blocks > self.max_blocks_per_seq:
                return False
            needed += num_blocks - len(blocks)
            if length % size and refs[blocks[-1]] > 1:
                leaving[blocks[-1]] = leaving.get(blocks[-1], 0) + 1
        needed += sum(min(count, refs[block] - 1) for block, count in leaving.items())
        return needed <= len(self.free_blocks)

    def fork(self, parents: list[int], children: list[int]) -> None:
        """Lets each child share all blocks of its parent."""
        for parent, child in zip(parents, children, strict=True):
            self.blocks[child] = list(self.blocks[parent])
            self.lens[child] = self.lens[parent]
            for block in self.blocks[child]:
                self.refs[block] += 1

    def free(self, rows: list[int]) -> None:
        """Empties `rows`."""
        for row in rows:
            for block in self.blocks[row]:
                self.refs[block] -= 1
                if not self.refs[block]:
                    self.free_blocks.append(block)
            self.blocks[row], self.lens[row] = [], 0

    def tables(self) -> np.ndarray:
        """Returns the padded i32[R, M] that the device takes."""
        tables = np.zeros((len(self.blocks), self.max_blocks_per_seq), np.int32)
        for row, blocks in enumerate(self.blocks):
            tables[row, : len(blocks)] = blocks
        return tables


class FunctionalTables:
    """`pallas_paged.block_tables` with the same methods, in NumPy or jitted in jax."""

    def __init__(self, xp: Any, *sizes: Any):
        wrap: Callable[..., Any] = jax.jit if xp is jnp else lambda function: function
        self._append, self._fork, self._free = wrap(bt.append), wrap(bt.fork), wrap(bt.free)
        create = functools.partial(bt.create, xp=xp)
        self._state, self._asarray = create(*sizes), xp.asarray

    def append(self, num_new: np.ndarray) -> None:
        """Appends and waits."""
        self._state, result = self._append(self._state, self._asarray(num_new))
        jax.block_until_ready(self._state)
        assert result.ok

    def fork(self, parents: np.ndarray, children: np.ndarray) -> None:
        """Forks and waits."""
        pairs = self._asarray(parents), self._asarray(children)
        self._state = jax.block_until_ready(self._fork(self._state, *pairs))

    def free(self, rows: np.ndarray) -> None:
        """Frees, given a mask, and waits."""
        self._state = jax.block_until_ready(self._free(self._state, self._asarray(rows)))

    def tables(self) -> np.ndarray:
        """Returns the tables: they are the state."""
        return np.asarray(self._state.tables)


def _measure(allocator: Any, as_argument: Callable[..., Any], mask: Callable[..., Any]) -> dict:
    """Returns the median microseconds of each kind of call."""
    R, tokens, S, steps = _NUM_SEQS.value, _NUM_TOKENS.value, _BLOCK_SIZE.value, _STEPS.value
    half = R // 2
    counts = functools.partial(np.full, R, dtype=np.int32)
    # Lengths in every phase of a block, so that 1 sequence in S takes a block in each step.
    prompts = np.maximum(tokens - np.arange(R, dtype=np.int32) % S, 1)
    one_prompt = np.where(np.arange(R) == 0, tokens, 0).astype(np.int32)
    lower, upper = np.arange(half, dtype=np.int32), np.arange(half, 2 * half, dtype=np.int32)
    first_row, upper_rows, all_rows = np.arange(1), upper, np.arange(R)
    times: dict[str, list[float]] = {}

    def timed(name: str, call: Callable[..., Any], *args: Any) -> None:
        start = time.perf_counter()
        call(*args)
        times.setdefault(name, []).append(1e6 * (time.perf_counter() - start))

    ones = as_argument(counts(1))
    for _ in range(3):  # the first compiles
        timed(f"append {R} prompts", allocator.append, as_argument(prompts))
        timed(f"free {R} sequences", allocator.free, mask(all_rows))
    allocator.append(as_argument(prompts))
    for _ in range(steps):
        timed(f"append 1 token to each of {R}", allocator.append, ones)
        timed("padded tables for the device", allocator.tables)
    for _ in range(max(steps // 4, 3)):
        timed("free 1 sequence", allocator.free, mask(first_row))
        timed("append 1 prompt", allocator.append, as_argument(one_prompt))
    for _ in range(max(steps // 16, 3)):
        allocator.free(mask(upper_rows))
        timed(f"fork {half} sequences", allocator.fork, as_argument(lower), as_argument(upper))
        timed(f"append 1 token after {half} forks", allocator.append, ones)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def main() -> None:
    """Prints a table of medians."""
    R, S = _NUM_SEQS.value, _BLOCK_SIZE.value
    M = -(-(_NUM_TOKENS.value + 2 * _STEPS.value) // S) + 1
    sizes = (R * M + 1, R, M, S)

    def mask(rows: np.ndarray) -> np.ndarray:
        return np.isin(np.arange(R), rows)

    figures = {"list": _measure(ListAllocator(*sizes), np.ndarray.tolist, np.ndarray.tolist)}
    figures["numpy"] = _measure(FunctionalTables(np, *sizes), np.asarray, mask)
    if _JAX.value:
        figures["jax"] = _measure(FunctionalTables(jnp, *sizes), np.asarray, mask)
    print(
        f"{R} sequences of {_NUM_TOKENS.value} tokens, block size {S}, {sizes[0]} blocks; "
        f"{platform.processor() or platform.machine()}, jax on {jax.default_backend()}"
    )
    print("median microseconds per call".ljust(36), *(f"{n:>10}" for n in figures), "numpy / list")
    for name in figures["list"]:
        cells = [column[name] for column in figures.values()]
        ratio = figures["numpy"][name] / figures["list"][name]
        print(name.ljust(36), *(f"{cell:10.1f}" for cell in cells), f"{ratio:12.2f}")
    if _JSON.value:
        names = ("num_seqs", "num_tokens", "block_size", "steps")
        report = {name: flags.FLAGS[name].value for name in names} | {"median_us": figures}
        with open(_JSON.value, "w") as file:
            json.dump(report, file, indent=2)


if __name__ == "__main__":
    command_line.run(main)
