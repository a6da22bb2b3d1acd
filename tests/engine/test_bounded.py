"""Nothing grows with the requests that an engine has served, and nobody waits expensively."""

import collections
import dataclasses
import gc
import weakref
from typing import Any

import numpy as np
import pytest

from pallas_paged.engine import LLM, SamplingParams
from pallas_paged.engine.core.request import SequenceGroup, TokenSequence
from pallas_paged.engine.core.row_edits import RowEdits
from pallas_paged.engine.core.scheduled import ScheduledSequence
from tests.engine.mock_model import (
    device_of,
    generate_alone,
    make_engine,
    make_mock_llm,
    make_whole_engine,
)

SAMPLED = SamplingParams(temperature=1, max_tokens=4)


def containers(root: object) -> dict[str, int]:
    """Returns the sizes of all containers that an object refers to, by a path to each."""
    sizes: dict[str, int] = {}
    seen = {id(root)}
    left = collections.deque([("", root)])
    while left:
        path, found = left.popleft()
        parts: list[tuple[str, Any]] = []
        if isinstance(found, dict):
            parts = [(f"{path}[{key!r:.20}]", value) for key, value in found.items()]
            parts += [(f"{path}.key", key) for key in found]
        elif isinstance(found, list | tuple | set | frozenset | collections.deque):
            parts = [(f"{path}[]", value) for value in found]
        elif type(found).__module__.startswith(("pallas_paged", "tests")):
            names = [n for c in type(found).__mro__ for n in getattr(c, "__slots__", ())]
            names += getattr(found, "__dict__", {})
            parts = [(f"{path}.{name}", getattr(found, name, None)) for name in names]
        if isinstance(found, dict | list | set | collections.deque):
            sizes[path] = len(found)
        for name, part in parts:
            if id(part) not in seen and not isinstance(part, int | float | str | np.ndarray):
                seen.add(id(part))
                left.append((name, part))
    return sizes


def serve(llm: LLM, numbers: range) -> None:
    """Requests with salts of their own: finished, streamed, left, aborted, refused, pinned."""
    for number in numbers:
        prompt = {"prompt_token_ids": [number % 61, 2, 3, 4, 5], "cache_salt": f"salt {number}"}
        llm.generate([prompt, prompt], [SAMPLED, dataclasses.replace(SAMPLED, n=2)], use_tqdm=False)
        next(llm.stream(prompt, dataclasses.replace(SAMPLED, presence_penalty=0.5, logprobs=1)))
        group = llm.engine.make_group([7, number % 61], SAMPLED)
        llm.engine.add(group)
        llm.engine.abort(group.request_id)
        with pytest.raises(ValueError, match="outside the vocabulary"):
            llm.generate([prompt, {"prompt_token_ids": [-1]}], SAMPLED, use_tqdm=False)
        llm.pin_prefix(prompt)
        if number in (5, 35):
            device_of(llm.engine).fails_in = 2
            with pytest.raises(KeyboardInterrupt):
                llm.generate(prompt, SAMPLED, use_tqdm=False)
        else:
            llm.unpin_prefix(prompt)


def test_no_container_grows_with_the_requests_served() -> None:
    llm = make_mock_llm(num_blocks=17, enable_prefix_caching=True, num_host_blocks=8)
    serve(llm, range(30))
    before = containers(llm)
    assert {
        ".engine._processor._requests",
        ".engine.core._planner._row_edits._held",
    } <= before.keys()
    serve(llm, range(30, 90))
    llm.engine.drain()
    llm.engine.check_idle()
    sizes = containers(llm)
    del sizes[".engine.core.executor.events"]
    grown = {path: size for path, size in sizes.items() if size > 16}
    assert not grown, f"of 90 requests: {grown}"
    assert len(containers(llm)) < 1.2 * len(before)


def test_a_finished_sequence_is_not_kept_for_its_row() -> None:
    llm = make_mock_llm()
    group = llm.engine.make_group([1, 2], dataclasses.replace(SAMPLED, repetition_penalty=2.0))
    kept = weakref.ref(group.sequences[0])
    llm.engine.add(group)
    del group
    llm.engine.drain()
    llm.generate({"prompt_token_ids": [3]}, SAMPLED, use_tqdm=False)  # takes the others' places
    gc.collect()
    assert kept() is None


class CountingList(list):
    """A sequence's tokens; counts how often a part of them is looked at, and how large it was."""

    num_slices = 0
    largest = 0

    def __getitem__(self, place: Any) -> Any:
        found = super().__getitem__(place)
        if isinstance(place, slice):
            self.num_slices += 1
            self.largest = max(self.largest, len(found))
        return found


@pytest.mark.parametrize("last_is_known", [True, False])
@pytest.mark.parametrize(
    ("bad_sequences", "banned"), [((), []), (((5, 6, 7), (8, 9), (6, 1)), [7, 1])]
)
def test_rules_look_at_the_end_of_an_output(
    bad_sequences: tuple[tuple[int, ...], ...], banned: list[int], last_is_known: bool
) -> None:
    params = dataclasses.replace(SAMPLED, max_tokens=40, logit_bias={3: 1.0})
    group = make_whole_engine().make_group([1, 2], params)
    assert group.logit_rules is not None
    group.logit_rules = dataclasses.replace(group.logit_rules, bad_sequences=bad_sequences)
    (sequence,) = group.sequences
    sequence.token_ids = tokens = CountingList([1, 2, *range(10, 40), 5, 6])
    if not last_is_known:
        tokens.pop()
        banned = [sequence[-1] for sequence in bad_sequences if sequence[-2] in (6, 8)]
    share = ScheduledSequence(sequence, 0, 33, 1, samples=True, input_on_device=not last_is_known)
    edits = RowEdits(8)
    edits.next_edits([share])
    assert edits._held[0].banned == banned
    assert tokens.largest <= 2


def test_a_waiting_prompt_is_looked_at_once() -> None:
    """And from then on one block of it a step: the first that has not been cached yet."""
    engine = make_engine(num_blocks=11, enable_prefix_caching=True, max_num_batched_tokens=8)
    prompt = tuple(range(1, 33))
    first = SequenceGroup("first", (*prompt[:16], *range(50, 60)), 12).sequences[0]
    engine.scheduler.add(first.group)
    engine.step()
    waiting = SequenceGroup("waiting", prompt, 4).sequences[0]
    waiting.token_ids = tokens = CountingList(waiting.token_ids)
    engine.scheduler.add(waiting.group)
    num_slices = []
    while waiting.row is None:
        tokens.num_slices = 0
        engine.step()
        num_slices.append(tokens.num_slices)
    # The other's prompt is computed first, and the common part of it found; then nothing is new.
    num_new = num_slices.index(1)
    assert num_new <= 4
    assert num_slices[num_new:-1] == [1] * (len(num_slices) - num_new - 1)
    assert len(num_slices) > 10
    assert waiting.group.num_cached_tokens == 16
    engine.run()
    for sequence in (first, waiting):
        assert sequence.output_token_ids == generate_alone(sequence, 64)[0]


def test_freed_rows_are_touched_in_one_piece_and_without_padding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make_engine(max_model_len=64, enable_prefix_caching=True)
    memory, touched = engine.scheduler.memory, []
    touch = memory.prefix_cache.touch
    monkeypatch.setattr(memory.prefix_cache, "touch", lambda ids: touched.append(ids) or touch(ids))
    engine.scheduler.add(SequenceGroup("a", (1, 2, 3, 4, 5), 2))
    engine.step()
    row: TokenSequence = engine.scheduler.queues.running[0].sequences[0]
    blocks = memory.tables[row.row, :2].tolist()
    touched.clear()
    engine.scheduler.abort("a")
    (ids,) = touched
    assert isinstance(ids, np.ndarray)
    assert ids.tolist() == blocks
