"""The block tables on the device: what of them is sent, and that they are the memory's."""

from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from benchmarks.contiguous import ContiguousMemory
from pallas_paged.engine import SamplingParams
from pallas_paged.engine.core.plan import StepPlan
from pallas_paged.engine.core.table_edits import NUM_ENTRIES, TableEdits
from pallas_paged.engine.engine import Engine
from pallas_paged.engine.kv.block_memory import BlockTableMemory
from pallas_paged.engine.kv.sharing import FullBlocks, RowPlan
from tests.engine.mock_model import make_whole_engine
from tests.engine.test_memory import admit, make_memory, remember


class Device:
    """Tables to which edits are applied, as a device has them."""

    def __init__(self, memory: BlockTableMemory) -> None:
        self.memory = memory
        self.edits = TableEdits(memory)
        self.tables = np.zeros_like(memory.tables)

    def check(self, rows: list[int]) -> list[tuple[int, int]]:
        """Applies a step's edits; asserts that its rows are there; returns what was written."""
        edits, last = self.edits.next_edits(np.array(rows, np.int32), 4)
        entries = np.concatenate([*edits, last], axis=1)
        assert entries.dtype == np.int32
        places, blocks = entries[:, entries[0] < self.tables.size]
        self.tables.reshape(-1)[places] = blocks
        for row in rows:
            end = self.memory.num_blocks[row]
            assert self.tables[row, :end].tolist() == self.memory.tables[row, :end].tolist()
        M = self.tables.shape[1]
        return sorted((place // M, place % M) for place in places.tolist())


def test_only_what_changed_is_sent() -> None:
    memory = make_memory(num_blocks=30)
    device = Device(memory)
    admit(memory, [9, 3])
    assert device.check([0]) == [(0, 0), (0, 1), (0, 2)]
    assert device.check([0, 1]) == [(1, 0)]
    assert device.check([0, 1]) == []
    memory.append([0, 1], [3, 1])  # up to the ends of blocks
    assert device.check([1, 0]) == []
    memory.append([0, 1], [1, 6])
    assert device.check([0, 1]) == [(0, 3), (1, 1), (1, 2)]
    memory.fork([1])
    assert device.check([0, 1, 2]) == [(2, 0), (2, 1), (2, 2)]
    memory.append([1, 2], [1, 1])  # the first of them copies its last block
    assert device.check([0, 1, 2]) == [(1, 2)]
    memory.truncate([2], [3])
    assert device.check([2]) == []
    memory.append([2], [6])  # in blocks that it gave back, perhaps
    device.check([2])
    memory.drop_front({0: 2})
    assert device.check([0, 1, 2]) == [(0, 0), (0, 1)]


def test_a_row_of_another_owner_is_sent_again() -> None:
    memory = make_memory(num_blocks=30)
    device = Device(memory)
    admit(memory, [9, 9])
    device.check([0, 1])
    memory.free([0, 1])
    admit(memory, [5])
    memory.free([0])
    admit(memory, [5, 5])
    device.check([0, 1])
    memory.free([1])
    assert memory.fork([0]) == [1]
    device.check([0, 1])
    memory.free_all()
    admit(memory, [5, 30])
    device.check([1])
    device.check([0, 1])


def test_a_block_in_another_ones_place_is_sent() -> None:
    memory = make_memory(num_blocks=30, enable_prefix_caching=True)
    device = Device(memory)
    admit(memory, [9, 9])
    device.check([0, 1])
    remember(memory, 0, range(9))
    assert device.check([0, 1]) == []
    remember(memory, 1, range(9))
    assert device.check([0, 1]) == [(1, 0), (1, 1)]


def test_a_new_planner_sends_all() -> None:
    """Whatever the plans of another one have left on the device."""
    memory = make_memory(num_blocks=30)
    admit(memory, [9, 9])
    memory.drop_front({0: 1})
    device = Device(memory)
    device.tables[:] = 29
    assert device.check([0, 1]) == [(row, column) for row in range(2) for column in range(3)]


def test_memory_in_one_piece_is_sent() -> None:
    memory = ContiguousMemory(num_blocks=17, block_size=4, max_num_seqs=4, max_model_len=16)
    device = Device(memory)
    for lens in ([3, 9], [1]):
        admit(memory, lens)
    device.check([0, 1, 2])
    memory.free([1])
    memory.free([0])
    before = memory.versions.copy()
    assert admit(memory, [7]) == [0]
    assert memory.versions[0] > before[0], "its entries count again"
    device.check([0, 2])
    memory.free_all()
    admit(memory, [2, 2, 2])
    device.check([0, 1, 2])


VERBS = ("admit", "append", "fork", "truncate", "drop_front", "free", "remember", "free_all")


@hypothesis.given(st.data())
def test_whatever_happens_to_rows_a_step_finds_them_on_the_device(data: Any) -> None:
    memory = make_memory(num_blocks=40, max_num_seqs=4, enable_prefix_caching=True)
    device, dropped = Device(memory), dict.fromkeys(range(4), 0)
    for _ in range(data.draw(st.integers(1, 12))):
        lens = np.asarray(memory.state.seq_lens)
        used = np.flatnonzero(lens).tolist()
        verb = data.draw(st.sampled_from(VERBS))
        if verb == "admit" and len(used) < 4:
            dropped[admit(memory, [data.draw(st.integers(1, 20))])[0]] = 0
        if not used:
            continue
        row = data.draw(st.sampled_from(used))
        if verb == "append" and lens[row] < 27:
            assert memory.append([row], [data.draw(st.integers(1, 3))]) is not None
        elif verb == "fork" and len(used) < 4:
            dropped[memory.fork([row])[0]] = dropped[row]
        elif verb == "truncate" and not dropped[row]:
            memory.truncate([row], [data.draw(st.integers(1, int(lens[row])))])
        elif verb == "drop_front":
            most = (int(lens[row]) - 1) // 4
            dropped[row] = data.draw(st.integers(min(dropped[row], most), most))
            memory.drop_front({row: dropped[row]})
        elif verb == "free":
            memory.free([row])
        elif verb == "remember" and not dropped[row]:
            full = int(lens[row]) // 4
            memory.remember([FullBlocks(row, range(full * 4), 0, full, None, True)])
        elif verb == "free_all":
            memory.free_all()
        if data.draw(st.booleans()):
            used = np.flatnonzero(memory.state.seq_lens).tolist()
            device.check([row for row in used if data.draw(st.booleans())])
    device.check(np.flatnonzero(memory.state.seq_lens).tolist())


@pytest.mark.parametrize(
    ("count", "num_edits"),
    [(1, 0), (4, 0), (5, 1), (NUM_ENTRIES + 4, 1), (2 * NUM_ENTRIES + 5, 3)],
)
def test_entries_come_in_edits_of_two_sizes(count: int, num_edits: int) -> None:
    memory = BlockTableMemory(
        num_blocks=count + 1, block_size=4, max_num_seqs=2, max_model_len=4 * count
    )
    memory.admit([RowPlan(4 * count, tuple(range(-1, -count - 1, -1)))])
    edits, last = TableEdits(memory).next_edits(np.array([0], np.int32), 4)
    assert [edit.shape for edit in edits] == [(2, NUM_ENTRIES)] * num_edits
    assert last.shape == (2, 4)
    entries = np.concatenate([*edits, last], axis=1).T.tolist()
    blocks = memory.tables[0, :count].tolist()
    padding = [[2 * count, 0]] * (len(entries) - count)
    assert sorted(entries) == [*map(list, enumerate(blocks)), *padding]


def plans_of(engine: Engine) -> list[StepPlan]:
    """Returns a list to which the plans of the next steps are added."""
    plans: list[StepPlan] = []
    executor = engine.core.executor

    def dispatch(plan: StepPlan, dispatch: Any = executor.dispatch) -> Any:
        plans.append(plan)
        return dispatch(plan)

    executor.dispatch = dispatch
    return plans


def test_decode_steps_bring_their_few_entries_themselves() -> None:
    """As long as nobody comes or goes, there is no program but the step's own."""
    engine = make_whole_engine(num_blocks=400, max_num_seqs=8, max_num_batched_tokens=200)
    plans = plans_of(engine)
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    for length in (3, 10, 17, 24, 5):
        engine.add(engine.make_group(list(range(5, 5 + length)), params))
    while engine.has_unfinished:
        engine.step()
    first, *others = plans
    assert len(first.table_edits) == 1
    assert len(others) >= 39
    assert all(plan.bucket.is_decode and not plan.table_edits for plan in others)


def test_more_entries_than_one_edit_holds() -> None:
    length = 2 * NUM_ENTRIES + 100
    engine = make_whole_engine(
        num_blocks=length + 10, block_size=1, max_num_batched_tokens=512, max_model_len=length + 8
    )
    plans = plans_of(engine)
    prompt = [5 + i % 20 for i in range(length)]
    engine.add(engine.make_group(prompt, SamplingParams(max_tokens=4, ignore_eos=True)))
    while engine.has_unfinished:
        engine.step()
    assert len(plans[0].table_edits) == 3
