"""Named problems of the prefill kernels, for interpret mode and for compilation."""

import dataclasses
from typing import Any, NamedTuple

from benchmarks.attention_cases.arguments import AttentionSpec
from pallas_paged.ops.attention.hopper.prefill_config import PrefillTuning, prefill_tuning


class InterpretCase(NamedTuple):
    """A problem small enough to be interpreted, and how to cut it."""

    spec: AttentionSpec
    tuning: PrefillTuning


def _case(
    name,
    lens,
    queries,
    heads,
    head_dim,
    block_size,
    dtype,
    tile_keys=64,
    tuning=None,
    **options,
):
    spec = AttentionSpec(
        name,
        lens,
        queries,
        num_q_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
        num_rows=len(lens),
        **options,
    )
    return InterpretCase(spec, PrefillTuning(tile_keys, 2, in_registers=False, **(tuning or {})))


def interpret_cases() -> list[InterpretCase]:
    """Every head_dim, block size, dtype and feature; features pairwise; ragged lengths around S.

    Products in turns and ahead or not, with each kind of cache; a thread block for each tile, too.
    """
    bf16, fp16, fp8, int8 = "bfloat16", "float16", "float8_e4m3fn", "int8"
    features = {"sliding_window": 37, "logits_soft_cap": 1.5, "alibi": True, "sinks": True}
    window, cap, alibi, sinks = ({name: value} for name, value in features.items())
    narrow = {"sliding_window": 20}
    no_turns, not_ahead = ({"tuning": {name: False}} for name in ("turns", "ahead"))
    neither = {"tuning": {"turns": False, "ahead": False}}
    one_by_one = {"tuning": {"persistent": False}}
    two = {"tuning": {"converters": 2, "converted": 2}}
    # Three steps in two stages, the first without a mask; 3 tokens of padding.
    chunked = _case("chunked", (150, 0), (11, 0), (8, 2), 64, 16, bf16, num_tokens=14)
    return [
        chunked,
        # A tile that begins inside another sequence's last one; lengths S - 1, S, S + 1, and 1.
        _case(
            "group3",
            (31, 32, 33, 1),
            (31, 2, 33, 1),
            (3, 1),
            80,
            32,
            fp16,
            **narrow,
            **alibi,
            **one_by_one,
        ),
        _case("group5", (17, 64), (9, 3), (5, 1), 96, 16, fp16, **cap, **sinks),
        # More tokens than a warpgroup has rows; blocks freed left of the window.
        _case("group1", (200, 16), (70, 16), (1, 1), 128, 64, bf16, 128, **window, **sinks),
        # A step between the edges of all tokens' windows.
        _case("wide", (300,), (3,), (1, 1), 64, 64, bf16, sliding_window=150, **not_ahead),
        # Blocks of two steps each.
        _case("group7", (129, 5), (3, 5), (7, 1), 128, 128, bf16, **alibi, **cap, **no_turns),
        _case(
            "group2",
            (66, 20),
            (5, 1),
            (4, 2),
            192,
            16,
            bf16,
            **window,
            **cap,
            **neither,
        ),
        _case("group16", (40,), (9,), (16, 1), 256, 32, fp16, **sinks, **alibi),
        # Quantised caches: blocks freed left of the window, and tails, poisoned with their scales.
        _case(
            "fp8",
            (150, 17),
            (11, 3),
            (4, 2),
            64,
            16,
            bf16,
            **window,
            **sinks,
            cache_dtype=fp8,
            **neither,
        ),
        _case(
            "int8", (70, 32), (9, 2), (3, 1), 80, 32, fp16, **alibi, cache_dtype=int8, **not_ahead
        ),
        # More steps than are in flight.
        _case(
            "int8-cap", (270,), (5,), (2, 2), 128, 128, bf16, 128, **cap, cache_dtype=int8, **two
        ),
        _case("fp8-long", (200, 16), (66, 16), (1, 1), 96, 16, fp16, 128, cache_dtype=fp8, **two),
    ]


class CompileCase(NamedTuple):
    """What a program for a GPU is compiled for; the tuning is the one by rule but for `changed`."""

    name: str
    head_dim: int
    group: int
    block_size: int
    dtype: str
    sliding_window: int | None = None
    logits_soft_cap: float | None = None
    alibi: bool = False
    sinks: bool = False
    cache_dtype: str | None = None  # None is `dtype`
    changed: tuple[tuple[str, Any], ...] = ()  # fields of the tuning, and what they are instead

    @property
    def tuning(self) -> PrefillTuning:
        """How the kernel cuts its work."""
        rule = prefill_tuning(self.head_dim, quantised=self.cache_dtype is not None)
        return dataclasses.replace(rule, **dict(self.changed))


def compile_cases() -> list[CompileCase]:
    """Every head_dim with every option on, off, and for each group and block size."""
    cases = []
    groups, block_sizes, dtypes = (1, 3, 4, 5, 7, 8, 16), (16, 32, 64, 128), ("bfloat16", "float16")
    for i, head_dim in enumerate((64, 80, 96, 128, 192, 256)):
        for j, group in enumerate(groups):
            block_size, dtype = block_sizes[(i + j) % 4], dtypes[(i + j) % 2]
            cases.append(
                CompileCase(
                    f"dim{head_dim}-group{group}-block{block_size}-{dtype}",
                    head_dim,
                    group,
                    block_size,
                    dtype,
                    sliding_window=4096 if j % 2 else None,
                    logits_soft_cap=50.0 if (i + j) % 3 == 0 else None,
                    alibi=j % 3 == 1,
                    sinks=j % 4 in (1, 2),
                )
            )
        everything = (4096, 50.0, True, True)
        case = CompileCase(f"dim{head_dim}-everything", head_dim, 4, 16, "bfloat16", *everything)
        cases.append(case)
        for turns, ahead in ((False, True), (True, False), (False, False)):
            cases.append(_changed(case, turns=turns, ahead=ahead))
        cases.append(_changed(case, persistent=False))
    return cases + quantised_compile_cases()


def quantised_compile_cases() -> list[CompileCase]:
    """Every head_dim with every dtype of the cache; of queries, groups, blocks and options some."""
    cases = []
    groups, block_sizes, dtypes = (4, 1, 8, 7), (16, 64, 32, 128), ("bfloat16", "float16")
    everything: dict[str, Any] = {
        "sliding_window": 4096,
        "logits_soft_cap": 50.0,
        "alibi": True,
        "sinks": True,
    }
    for i, head_dim in enumerate((64, 80, 96, 128, 192, 256)):
        for j, cache_dtype in enumerate(("float8_e4m3fn", "int8")):
            dtype, has_all = dtypes[(i // 2 + j) % 2], (i + j) % 2 == 1
            cases.append(
                CompileCase(
                    f"dim{head_dim}-{cache_dtype}-{dtype}{'-everything' if has_all else ''}",
                    head_dim,
                    groups[(2 * i + j) % 4],
                    block_sizes[(i + 2 * j) % 4],
                    dtype,
                    cache_dtype=cache_dtype,
                    **(everything if has_all else {}),
                )
            )
            if has_all:
                case, rule = cases[-1], cases[-1].tuning
                cases.append(_changed(case, turns=not rule.turns, ahead=False))
                if rule.persistent:
                    cases.append(_changed(case, persistent=False))
                if rule.converters > 1:  # with fewer steps converted the oldest JAX's spills else
                    cases.append(_changed(case, converters=1, converted=1, persistent=False))
    return cases


def _changed(case: CompileCase, **changed: Any) -> CompileCase:
    """Returns a case with another tuning, and its name."""
    words = (f"{name}{int(value)}" for name, value in changed.items())
    name = "-".join((case.name, *words))
    return case._replace(name=name, changed=tuple(changed.items()))
