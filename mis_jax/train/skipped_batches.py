"""Batches of steps that were left out because loss or gradient is no good, kept for inspection."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from mis_jax.model.batch import Batch
from mis_jax.storage.files import make_folder, remove_file, replace_file, write_arrays

FOLDER = "not_finite"  # in a run's folder
_KEPT = 10  # newest steps


def save_skipped_batch(
    output: Path, step: int, batch: Batch, ids: Sequence[str], metrics: Mapping[str, float]
) -> Path:
    """Write a step's batch and numbers for inspection; the file that lists its samples.

    Where there are several processes, each writes the rows that it holds.
    """
    folder = output / FOLDER
    make_folder(folder)
    process = f"-process-{jax.process_index()}" if jax.process_count() > 1 else ""
    fields = {name: getattr(batch, name) for name in batch.__dataclass_fields__}
    write_arrays(folder / f"step-{step}{process}.npz", fields, compressed=True)
    path = folder / f"step-{step}.json"
    if jax.process_index() == 0:
        values = {k: (v if math.isfinite(v) else str(v)) for k, v in metrics.items()}
        content = {"step": step, "ids": list(ids), "metrics": values}
        replace_file(path, json.dumps(content, indent=2) + "\n")
        _remove_old(folder)
    return path


def _remove_old(folder: Path) -> None:
    steps = sorted(int(path.stem.split("-")[1]) for path in folder.glob("step-*.json"))
    for step in steps[:-_KEPT]:
        for path in (*folder.glob(f"step-{step}.*"), *folder.glob(f"step-{step}-*")):
            remove_file(path)
