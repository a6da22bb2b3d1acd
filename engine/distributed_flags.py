"""Flags of programs that run in several processes, see `pallas_paged.engine.distributed`."""

from absl import flags

from pallas_paged.engine import distributed

_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "This process is one of several that share the model; Slurm, Open MPI or Kubernetes tells the "
    "next three. All processes get the same flags, and the first one of them serves.",
)
_COORDINATOR_ADDRESS = flags.DEFINE_string(
    "coordinator_address",
    None,
    "Host and port of the first process, as all processes reach it. With the next two it means "
    "--distributed.",
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "The number of this one, from 0 on.")


def has_followed() -> bool:
    """Joins the other processes, if flags say that there are any.

    In all but the first it then follows that one, and returns True when that has ended. In the
    first, or where there is no other, it returns False at once.

    Raises:
      ValueError, RuntimeError: as `distributed.initialize`.
    """
    given = (_COORDINATOR_ADDRESS.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    if not _DISTRIBUTED.value and given == (None, None, None):
        return False
    distributed.initialize(*given)
    if distributed.is_first():
        return False
    distributed.follow()
    return True
