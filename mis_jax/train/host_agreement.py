"""What the processes of a run must have alike, compared before anything is written.

Each of them reads its own disk: another learning rate, another order of rows or a stale clone on
one of them would make a model that is half of each, and other lengths a run that hangs.
"""

import logging
import platform
import socket
from collections import defaultdict
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from mis_jax.checkpoint.load import OpenCheckpoint
from mis_jax.checkpoint.native import DIGESTS
from mis_jax.config import RunConfig
from mis_jax.data.loader import TrainingData
from mis_jax.parallel import processes
from mis_jax.storage.hashing import digest, file_digest, sampled_digest

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
