"""Which replica a prompt is sent to: by the longest prefix, then by load, always the same."""

import random

import pytest

from pallas_paged.engine.prefix_router import MAX_AHEAD, PrefixRouter, block_hashes
from tests.test_imports import ENGINE, JAX, ROOT, import_graph, way_to

SIZE = 4


def hashes(*blocks: int, tail: int = 0, salt: str | None = None) -> list[int]:
    """Returns the hashes of a prompt of these blocks, each of one token, and a part of one."""
    ids = [token for token in blocks for _ in range(SIZE)] + [0] * tail
    return block_hashes(ids, SIZE, salt)


def test_it_needs_no_jax() -> None:
    assert way_to(f"{ENGINE}.prefix_router", JAX, import_graph(ROOT)) == []


def test_a_hash_is_of_a_full_block_and_of_all_before_it() -> None:
    assert len(hashes(1, 2, tail=3)) == 2
    assert hashes(1, 2, tail=3) == hashes(1, 2) == block_hashes((1,) * 4 + (2,) * 4, SIZE)
    assert hashes(1, 2, 3)[:2] == hashes(1, 2)
    assert hashes(3, 2)[1] != hashes(1, 2)[1]
    assert not set(hashes(1, 2, salt="mine")) & set(hashes(1, 2))
    assert hashes(1, 2, salt="mine") == hashes(1, 2, salt="mine")
    assert hashes(tail=3) == []


def test_the_longest_known_prefix_wins() -> None:
    router = PrefixRouter(3, 100)
    router.note(hashes(1, 2), 2)
    router.note(hashes(1, 2, 3), 1)
    assert router.choose(hashes(1, 2, 3, 4), [0, 0, 0]) == 1
    assert router.choose(hashes(1, 2, 3, 4), [0, 9, 0]) == 1
    assert router.choose(hashes(1, 2, 9), [0, 5, 4]) == 2  # both know as much of it
    assert router.choose(hashes(1, 2, 9), [0, 4, 5]) == 1
    assert router.choose(hashes(2, 3), [0, 0, 0]) == 0  # nobody has seen these first
    assert router.choose(hashes(1, 2, salt="mine"), [0, 0, 0]) == 0


def test_a_replica_with_far_more_to_do_is_passed_over() -> None:
    router = PrefixRouter(2, 100)
    router.note(hashes(1, 2), 1)
    prompt = hashes(1, 2, 3)
    assert router.choose(prompt, [0, MAX_AHEAD]) == 1
    assert router.choose(prompt, [0, MAX_AHEAD + 1]) == 0
    assert router.choose(prompt, [100, 100 + MAX_AHEAD + 1]) == 1  # far more, but not many times
    assert router.choose(prompt, [100, 151]) == 0
    router.note(prompt, 0)
    prompt = hashes(1, 2, 4)  # both have its prefix
    assert router.choose(prompt, [50, 51]) == 0
    assert router.choose(prompt, [52, 51]) == 1


def test_a_short_prefix_is_no_reason() -> None:
    router = PrefixRouter(2, 100)
    router.note(hashes(*range(10)), 1)
    assert router.choose(hashes(0, *range(20, 29)), [0, 1]) == 1  # a tenth of it
    assert router.choose(hashes(0, *range(20, 30)), [0, 1]) == 0


def test_without_a_prefix_load_decides_then_blocks_then_order() -> None:
    router = PrefixRouter(3, 100)
    assert router.choose([], [0, 0, 0]) == 0
    assert router.choose(hashes(1), [2, 1, 1]) == 1
    router.note(hashes(1, 2), 0)
    router.note(hashes(3), 1)
    assert router.num_blocks == [2, 1, 0]
    assert router.choose(hashes(9), [0, 0, 0]) == 2
    assert router.choose(hashes(9), [0, 0, None]) == 1
    assert router.choose(hashes(9), [0, 1, None]) == 0


def test_who_takes_no_requests_is_not_chosen() -> None:
    router = PrefixRouter(2, 100)
    router.note(hashes(1, 2), 0)
    assert router.choose(hashes(1, 2), [None, 1000]) == 1
    with pytest.raises(ValueError, match="no replica takes requests"):
        router.choose(hashes(1, 2), [None, None])


def test_it_forgets_what_was_sent_the_longest_ago_from_its_end() -> None:
    router = PrefixRouter(2, 4)
    router.note(hashes(1, 2, 3), 0)
    router.note(hashes(7, 8), 1)
    assert len(router) == 4
    assert router.num_blocks == [2, 2]
    assert router.choose(hashes(1, 2, 3), [1, 0]) == 0  # block 3 alone is forgotten
    router.note(hashes(1, 2), 0)
    router.note(hashes(9), 0)
    assert router.choose(hashes(7, 8), [0, 0]) == 1  # its first block is there
    router.note(hashes(10), 0)
    assert router.num_blocks == [4, 0]
    router.clear()
    assert (len(router), router.num_blocks) == (0, [0, 0])
    with pytest.raises(ValueError, match="max_blocks=0 must be at least 1"):
        PrefixRouter(2, 0)


def test_many_prompts_in_little_memory_keep_the_counts() -> None:
    """The counts are those of the remembered blocks, and a second run chooses the same."""

    def choices(seed: int) -> list[int]:
        draw = random.Random(seed)
        router = PrefixRouter(3, 40)
        made = []
        for _ in range(2000):
            prompt = hashes(*(draw.randrange(3) for _ in range(draw.randrange(8))))
            loads = [draw.choice([None, *range(30)]) for _ in range(2)] + [draw.randrange(30)]
            made.append(router.choose(prompt, loads))
            assert loads[made[-1]] is not None
            router.note(prompt, made[-1])
            assert len(router) <= 40
            held = list(router._holders.values())
            assert router.num_blocks == [sum(h >> i & 1 for h in held) for i in range(3)]
        return made

    assert choices(1) == choices(1)
    assert set(choices(1)) == {0, 1, 2}
