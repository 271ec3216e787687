"""How a run ends: trained, asked to stop, or failed."""

from dataclasses import dataclass
from pathlib import Path

from mis_jax.signals import RESUMABLE, LostWorker


@dataclass(frozen=True)
class Trained:
    """Outcome of a run."""

    model: Path
    steps: int
    seconds: float  # of training, over all sessions of the run
    dtype: str  # of what was written


class FailedRun(RuntimeError):
    """A run that did not reach its end: a loss that is not finite, a disk that is full."""

    exit_code = 1


class Resumable(FailedRun):
    """A run that ended through no fault of its own: the same command goes on."""

    exit_code = RESUMABLE


class Interrupted(Resumable):
    """The run was asked to stop; everything up to `step` is saved."""

    def __init__(self, step: int):
        where = f"at step {step}, saved" if step else "before the first step"
        super().__init__(f"stopped {where}; run the same command again to go on")
        self.step = step


class SavedFailure(FailedRun):
    """A bad sample, a lost reader, a failed evaluation: all processes have saved what was trained.

    `exit_code` is that of the failure alone.
    """

    def __init__(self, failure: Exception, step: int):
        line, self.exit_code, mend = str(failure), 2, "mend this and run the same command again"
        if isinstance(failure, LostWorker | Resumable):
            self.exit_code, mend = RESUMABLE, "run the same command again to go on"
        elif not isinstance(failure, ValueError | OSError):
            self.exit_code = 1
            if not isinstance(failure, FailedRun):
                line = f"{type(failure).__name__}: {failure}"
        super().__init__(f"{line}; step {step} is saved: {mend}")
        self.__cause__ = failure
