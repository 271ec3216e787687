"""What the processes of a run must have alike, and what they tell each other of bad samples.

Each of them reads its own disk: another learning rate, another order of samples or a stale clone on
one of them would make a model that is half of each, and other lengths a run that hangs. So what
they have is compared before anything is written.

All of them take every step together. One whose samples of a step cannot be had takes it with a
batch whose loss is not finite, which leaves the state as it was, and the others find out why.
"""

import logging
import platform
import socket
from collections import defaultdict
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from mis_jax.checkpoint.load import OpenCheckpoint
from mis_jax.checkpoint.native import DIGESTS
from mis_jax.config import RunConfig
from mis_jax.data.loader import Rejected, TrainingData
from mis_jax.model.batch import Batch
from mis_jax.parallel import processes
from mis_jax.signals import LostWorker
from mis_jax.storage.hashing import digest, file_digest, sampled_digest
from mis_jax.train.outcome import FailedRun, Resumable

_log = logging.getLogger(__name__)
# Fields that say where things lie, or that concern one process: their content is compared instead.
_OWN = ("output", "model", "data.sources", "data.workers", "data.tile_cache", "distributed.")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pillow")
_SHOWN = 5  # differences in the line


def check_alike(config: RunConfig, opened: OpenCheckpoint, data: TrainingData) -> None:
    """Raise ValueError, on the first process, naming what differs and where; alone, do nothing."""
    if not processes.several():
        return
    facts = _facts(config, opened, data) | {"host": socket.gethostname()}
    processes.note("alike", facts)
    processes.meet("alike")
    if not processes.is_first():
        return
    (_, ours), *others = processes.notes("alike")
    here = ours.pop("host")
    places: dict[tuple[str, str], list[str]] = defaultdict(list)
    for process, theirs in others:
        there = theirs.pop("host")
        for name in sorted(ours.keys() | theirs.keys()):
            if (value := theirs.get(name, "absent")) != ours.get(name, "absent"):
                places[name, value].append(f"process {process} on {there}")
    if not places:
        return
    told = [
        f"{name} (process 0 on {here}: {ours.get(name, 'absent')}, {where[0]}"
        f"{f' and {len(where) - 1} more' if len(where) > 1 else ''}: {value})"
        for (name, value), where in places.items()
    ]
    for line in told[_SHOWN:]:
        _log.warning("differs: %s", line)
    more = f", and {len(told) - _SHOWN} more" if len(told) > _SHOWN else ""
    raise ValueError(
        f"the processes of this run do not have the same {'; '.join(told[:_SHOWN])}{more}: give "
        "every host the same code, configuration and files"
    )


def _facts(config: RunConfig, opened: OpenCheckpoint, data: TrainingData) -> dict[str, str]:
    """Each by a name that a user knows, in words short enough for a line."""
    facts = {
        name: value
        for name, value in _flat(asdict(config), "").items()
        if not name.startswith(_OWN)
    }
    code = Path(__file__).parents[1]
    modules = {str(p.relative_to(code)): file_digest(p) for p in sorted(code.rglob("*.py"))}
    facts["code of mis_jax"] = _short(digest(modules))
    facts["version of Python"] = ".".join(platform.python_version_tuple()[:2])
    facts |= {f"version of {name}": metadata.version(name) for name in _PACKAGES}
    for path in _weight_files(opened):
        facts[f"file of model: {_inside(path, opened.folder)}"] = _short(sampled_digest(path))
    for path in sorted(data.processor.tokenizer.folder.glob("*.*")):
        if path.suffix in (".json", ".model", ".txt") and path.is_file():
            facts[f"file of model: {path.name}"] = _short(file_digest(path))
    for place, source in enumerate(data.mixture.sources):
        files = [source["file"], *(one["file"] for one in source.get("sets", []))]
        for path in map(Path, files):
            value = file_digest(path) if path.is_file() else _folder(path)
            facts[f"data.sources[{place}]: {path.name}"] = _short(value)
    return facts | {"order of the samples": data.fingerprint}


def _weight_files(opened: OpenCheckpoint) -> list[Path]:
    """But those that a file of digests speaks for, with which they are compared when read."""
    folder = opened.folder
    if folder is None or not (folder / DIGESTS).is_file():
        return list(opened.files)
    return [path for path in opened.files if not path.is_relative_to(folder)]


def _inside(path: Path, folder: Path | None) -> str:
    """The name of a file that hosts share, wherever each of them has the model."""
    return str(path.relative_to(folder)) if folder and path.is_relative_to(folder) else path.name


def _folder(path: Path) -> str:
    """Of a set that was built."""
    files = sorted(p for p in path.rglob("*") if p.is_file())
    return digest({str(p.relative_to(path)): sampled_digest(p) for p in files})


def _flat(value: Any, name: str) -> dict[str, str]:
    if not isinstance(value, dict):
        return {name: str(value)}
    inside = [_flat(v, f"{name}.{key}" if name else key) for key, v in value.items()]
    return {key: text for part in inside for key, text in part.items()}


def _short(text: str) -> str:
    return text[:12]


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
