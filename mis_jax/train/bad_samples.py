"""What the processes of a run tell each other about samples that one of them cannot use.

All of them take every step together. One whose rows of a step cannot be had takes it with rows
that make its loss not finite, which leaves the state as it was, and the others find out why.
"""

from dataclasses import asdict, replace

import numpy as np

from mis_jax.data.loader import Rejected
from mis_jax.model.batch import Batch
from mis_jax.parallel import processes
from mis_jax.stopping import LostWorker
from mis_jax.train.outcome import FailedRun, Resumable


def tell_rejected(step: int, rejected: tuple[Rejected, ...]) -> None:
    """Tell process 0 which samples were left out of the rows of this process."""
    if rejected:
        processes.note(f"rejected/{step}", [asdict(item) for item in rejected])


def all_rejected(step: int) -> tuple[Rejected, ...]:
    """Bad samples of a step, in the order of the plan; several processes may hold the same row."""
    notes = processes.notes(f"rejected/{step}")
    found = {item["place"]: Rejected(**item) for _, note in notes for item in note}
    return tuple(found[place] for place in sorted(found))


def tell_failure(step: int, error: Exception) -> None:
    """Tell all processes why this one has no rows for a step; it takes it `unusable`."""
    if isinstance(error, LostWorker):
        kind, line = "resumable", str(error)
    elif isinstance(error, ValueError | OSError):
        kind, line = "input", str(error)
    else:
        kind, line = "fault", f"{type(error).__name__}: {error}"
    processes.note(f"no rows/{step}", [kind, line])


def failure_of(step: int) -> Exception | None:
    """Why a process had no rows for a step that was not finite."""
    kinds = {"resumable": Resumable, "input": ValueError, "fault": FailedRun}
    for process, (kind, line) in processes.notes(f"no rows/{step}", forget=False):
        return kinds[kind](f"process {process}: {line}")
    return None


def unusable(batch: Batch) -> Batch:
    """A batch whose loss is not finite."""
    return replace(batch, loss_weights=np.full_like(batch.loss_weights, np.nan))
