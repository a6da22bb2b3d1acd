"""Every stage, in the order in which they run."""

from benchmarks.gpu_suite import device, rehearsal
from benchmarks.gpu_suite.stage import Stage

STAGES: tuple[Stage, ...] = (device.STAGE, rehearsal.STAGE)
