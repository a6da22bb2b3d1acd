"""What one step was and how long it took, for whoever watches an engine."""

from typing import NamedTuple, Protocol

from pallas_paged.engine.core.buckets import Bucket


class StepRecord(NamedTuple):
    """A step whose results have been taken in; its shares of the host's time are in seconds.

    Attributes:
      step_id: counts the steps.
      bucket: its shape.
      num_seqs: sequences in it.
      num_tokens: tokens that it was to compute, those of several decode steps included.
      num_steps: decode steps that it was to make one after the other.
      num_drafts: guessed tokens among these.
      num_new_tokens: tokens that the requests got by it.
      num_admitted: requests that came in with it.
      num_preempted: requests that lost their blocks to it.
      num_copies: blocks copied on write.
      num_swap_outs: requests copied to the host.
      num_swap_ins: requests copied back.
      num_running: requests that run now.
      num_waiting: requests that wait now.
      schedule_s: to decide what is computed, and to plan it.
      dispatch_s: until the device has been told, compilations included.
      wait_s: the host waited so long for the results.
      commit_s: to take them in.
    """

    step_id: int
    bucket: Bucket
    num_seqs: int
    num_tokens: int
    num_steps: int
    num_drafts: int
    num_new_tokens: int
    num_admitted: int
    num_preempted: int
    num_copies: int
    num_swap_outs: int
    num_swap_ins: int
    num_running: int
    num_waiting: int
    schedule_s: float
    dispatch_s: float
    wait_s: float
    commit_s: float


class StepObserver(Protocol):
    """Watches steps. What it raises fails the step."""

    def begin(self, step_id: int) -> None:
        """Called before a step is dispatched."""

    def end(self, record: StepRecord) -> None:
        """Called when a step's results have been taken in."""
