"""What goes wrong with requests of an `AsyncLLM` that are not wrong themselves."""


class EngineError(RuntimeError):
    """The engine could not serve a request; the cause is in the message, and in `__cause__`."""


class StepFailedError(EngineError):
    """A step failed with all requests that ran or waited; the engine takes new ones."""


class EngineDeadError(EngineError):
    """The engine has ended, and takes no more requests."""


class EngineDrainingError(EngineError):
    """The engine is shutting down: it ends the requests that it has, and takes no new ones."""


class EngineOverloadedError(EngineError):
    """As many requests wait as may; nothing has been queued.

    Attributes:
      retry_after_s: seconds after which the queue may be shorter, at least 1.
    """

    def __init__(self, message: str, retry_after_s: int):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceededError(EngineError, TimeoutError):
    """A request was not done in the time that it was given, and has been aborted."""


class ProcessLostError(EngineError):
    """One of the processes that share a model is gone, and the engine with it."""

    @classmethod
    def of(cls, index: int, count: int, cause: BaseException) -> "ProcessLostError":
        """Returns what process `index` of `count` says when it cannot reach another one."""
        return cls(
            f"one of the {count} processes of this engine is gone; this one is "
            f"number {index}. Look at the others' output for the reason, and start "
            f"all of them again ({str(cause).splitlines()[0]})"
        )


def step_failed(cause: BaseException) -> StepFailedError:
    """Returns what the requests of a step get that `cause` has ended."""
    error = StepFailedError(f"a step of the engine failed: {type(cause).__name__}: {cause}")
    error.__cause__ = cause
    return error


def ended(cause: BaseException | None) -> EngineDeadError:
    """Returns what requests get when the engine has ended, by an error or None."""
    if cause is None:
        return EngineDeadError("the engine has been shut down")
    error = EngineDeadError(f"the engine has ended: {type(cause).__name__}: {cause}")
    error.__cause__ = cause
    return error
