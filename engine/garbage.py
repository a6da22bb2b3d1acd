"""The collector of garbage, for programs that serve."""

import gc

_THRESHOLD = 20_000


def leave_to_requests() -> None:
    """Lets collections of garbage walk through what is made from now on, and less often.

    For a program that has built its engine and does nothing but serve. What it has imported and
    loaded stays, and is a large part of a million objects: to walk through it takes 100 ms or more,
    in which no thread of the interpreter runs and the device stands still.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_THRESHOLD)
