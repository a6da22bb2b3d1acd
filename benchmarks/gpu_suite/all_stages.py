"""Every stage, in the order in which they run."""

from benchmarks.gpu_suite import (
    attention_speed,
    cache_speed,
    correctness,
    device,
    hints,
    model_step,
    rehearsal,
    torch_peer,
    tuning,
)
from benchmarks.gpu_suite.stage import Stage

STAGES: tuple[Stage, ...] = (
    device.STAGE,
    rehearsal.STAGE,
    correctness.CORRECTNESS,
    model_step.STAGE,
    attention_speed.DECODE,
    attention_speed.PREFILL,
    cache_speed.STAGE,
    tuning.STAGE,
    torch_peer.STAGE,
    correctness.MORE,
    hints.STAGE,
)
