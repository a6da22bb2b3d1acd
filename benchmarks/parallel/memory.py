"""Where the bytes of each device go in an engine whose model several share, as rows of a table."""

from typing import Any

from benchmarks.parallel.compiled import Memory, room_bytes
from benchmarks.simulation.shapes import SHAPES as OF_PAPER
from pallas_paged.engine.compiling import NOT_OURS_BYTES
from pallas_paged.engine.device.pool_size import round_num_blocks
from pallas_paged.engine.kv.sharing import blocks_for


def row_of(found: Memory, share: float) -> dict[str, Any]:
    """Returns where a device's bytes go if an engine may fill that share of its memory."""
    case, plan = found.case, found.plan
    assert plan.temporary_bytes is not None
    fixed = plan.weight_bytes + plan.temporary_bytes + plan.rows_bytes + plan.row_state_bytes
    pool_bytes = max(0, room_bytes(found.card_bytes, share) - fixed)
    num_blocks = pool_bytes // plan.block_bytes
    paper = OF_PAPER.get(case.model)
    slots = None
    if paper is not None and (paper.gpu, paper.num_gpus, None) == case[1:]:
        slots = paper.num_slots
    needed = None
    if slots is not None:
        size = fixed + (1 + blocks_for(slots, plan.block_size)) * plan.block_bytes
        needed = (size + NOT_OURS_BYTES) / found.card_bytes
    return {
        "model": case.model,
        "GPU": case.target,
        "GPUs": case.num_devices,
        "share": share,
        "card GiB": found.card_bytes / 2**30,
        "weights GiB": plan.weight_bytes / 2**30,
        "temporaries GiB": plan.temporary_bytes / 2**30,
        "KV pool GiB": num_blocks * plan.block_bytes / 2**30,
        "slots": max(0, num_blocks - 1) * plan.block_size,
        "slots, rounded": max(0, round_num_blocks(num_blocks) - 1) * plan.block_size,
        "paper's slots": slots,
        "share for these": needed,
    }
