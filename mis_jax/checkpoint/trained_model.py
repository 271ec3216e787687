"""One checkpoint of a run, read as a model: what was trained, in its place in the base model.

A checkpoint holds the trained parameters alone. The rest is the base model's, which the run's
config.yaml names.
"""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mis_jax.checkpoint import nnx_state
from mis_jax.checkpoint.parameter_source import ParameterSource, layer_key
from mis_jax.checkpoint.peft.files import ADAPTER_FILES
from mis_jax.checkpoint.peft.mapping import Adapter, LoraPair
from mis_jax.checkpoint.safetensors_reader import misfit
from mis_jax.checkpoint.train_state import (
    is_run_checkpoint,
    open_trained,
    saved_digests,
    unreadable,
)
from mis_jax.config import LoraConfig, RunConfig, load_config
from mis_jax.model.config import InternVLConfig
from mis_jax.model.lora import is_adapter
from mis_jax.storage.hashing import changed_files, digest, file_digests, folder_fingerprint
from mis_jax.storage.paths import is_step, newest_step

_KERNEL = ".kernel"
_CHECKPOINTS = "checkpoints"  # in a run's folder


def model_files(folder: Path) -> Path:
    """Where a model's config.json and tokenizer lie: for a checkpoint of a run, in its base."""
    if not is_run_checkpoint(folder):
        return folder
    return model_files(run_of(folder).model)


def model_name(folder: Path, adapter: Path | None = None) -> str:
    """What a model is called by its folder, and its adapter; a checkpoint also bears its run's."""
    if adapter is not None:
        return f"{model_name(folder)}+{adapter.resolve().name}"
    folder = folder.resolve()
    return f"{folder.parents[1].name}-{folder.name}" if is_run_checkpoint(folder) else folder.name


def model_fingerprint(folder: Path, adapter: Path | None = None) -> str:
    """The hash of everything that makes a model: its adapter and the base of a run included."""
    if adapter is not None:  # the two files that are read: trainers keep logs and states there too
        return digest([model_fingerprint(folder), file_digests(adapter, ADAPTER_FILES)])
    if not is_run_checkpoint(folder):
        return folder_fingerprint(folder)
    return digest([folder_fingerprint(folder), model_fingerprint(run_of(folder).model)])


def refuse_part_of_run(folder: Path) -> None:
    """ValueError for the folder of a run, or of all its checkpoints, or for an unfinished one."""
    if (folder / "config.json").exists():
        return
    run = folder.resolve()
    if is_step(run.name) and run.parent.name == _CHECKPOINTS and run.is_dir():
        raise ValueError(f"{folder}: not a complete checkpoint of a run; take another one")
    if run.name == _CHECKPOINTS:
        run = run.parent
    newest = newest_step(run / _CHECKPOINTS)
    if newest is not None:
        raise ValueError(
            f"{folder}: a run and no model; give {run / 'final'}, or a checkpoint such as "
            f"{run / _CHECKPOINTS / str(newest)}"
        )


def run_of(folder: Path) -> RunConfig:
    """Settings of the run that saved a checkpoint; ValueError where they, or its base, are gone."""
    path = folder.resolve().parents[1] / "config.yaml"
    if not path.is_file():
        raise ValueError(
            f"{folder}: {path} is missing, which names the base model that this checkpoint of a "
            "run needs; restore it"
        )
    config = load_config(path)
    if not config.model.is_dir():
        here = "" if config.model.is_absolute() else ", or work in the folder the run began in"
        raise ValueError(
            f"{path}: field 'model' is {config.model}, no folder, and {folder} needs this base "
            f"model; restore it{here}"
        )
    return config


def check_saved(folder: Path) -> None:
    """ValueError where a file is not what was saved; one without digests passes."""
    problems = changed_files(folder, saved_digests(folder) or {})
    if problems:
        raise ValueError(f"{problems[0]}; take another checkpoint of the run")


def trained_values(folder: Path, config: InternVLConfig, lora: LoraConfig) -> "TrainedValues":
    """What a checkpoint of a run holds; ValueError where it is not of a model of this `config`."""
    values = TrainedValues(folder, open_trained(folder), config.text.vocab_size)
    wanted = nnx_state.shapes(config, lora=lora if lora.rank else None)
    found = [
        f"parameter '{name}' has shape {shape}, the model asks for {wanted.get(name, 'none')}"
        for name, shape in values.shapes.items()
        if wanted.get(name) != shape
    ]
    if found:
        raise misfit(
            folder, found, "'model' in the run's config.yaml must be the one it began with"
        )
    return values


class TrainedValues:
    """Parameters by dotted path, each read as a whole; tables without the rows that are no tokens.

    One is forgotten after its last layer was asked for: it is then most likely done with.
    """

    def __init__(self, folder: Path, arrays: Mapping[str, Any], vocab_size: int):
        self._folder, self._arrays = folder, arrays
        tables = {n: (vocab_size, *arrays[n].shape[1:]) for n in nnx_state.TABLES if n in arrays}
        self.shapes = {name: tuple(array.shape) for name, array in arrays.items()} | tables
        self._read: dict[str, np.ndarray] = {}
        self._locks = {name: threading.Lock() for name in arrays}

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def whole(self, name: str) -> np.ndarray:
        """All of one parameter."""
        try:
            value = self._arrays[name].read().result()
        except (ValueError, OSError) as error:
            raise unreadable(self._folder, error) from error
        return value[: self.shapes[name][0]]

    def part(self, name: str, layer: int | None, rows: slice) -> np.ndarray:
        """As `Source.read`."""
        with self._locks[name]:
            if name not in self._read:
                self._read[name] = self.whole(name)
            value = self._read[name]
            result = (value if layer is None else value[layer])[rows]
            length = value.shape[0 if layer is None else 1]
            if layer in (None, len(value) - 1) and rows.indices(length)[1] == length:
                del self._read[name]
        return result


class Trained:
    """A source with trained parameters in the place of the base's."""

    def __init__(self, base: ParameterSource, values: TrainedValues):
        self._base, self._values = base, values

    def read(self, name: str, layer: int | None = None, rows: slice = slice(None)) -> np.ndarray:
        if name in self._values:
            return self._values.part(name, layer, rows)
        return self._base.read(name, layer, rows)

    def key(self, name: str, layer: int | None = None) -> str:
        return layer_key(name, layer) if name in self._values else self._base.key(name, layer)


def adapter_of(values: Mapping[str, Any], config: LoraConfig) -> Adapter:
    """Trained parameters as an adapter, on the host; those that are no factors come as arrays."""
    scale = (config.alpha or 2 * config.rank) / config.rank
    result: dict[str, Any] = {}
    for name, value in values.items():
        if not is_adapter(name):
            result[name] = np.asarray(value)
        elif name.endswith(".adapter.b"):
            linear = name.removesuffix(".adapter.b")
            own, shared = f"{linear}.adapter.a", f"{linear.rpartition('.')[0]}.adapter_a"
            a = values[own if own in values else shared]
            result[linear + _KERNEL] = LoraPair(np.asarray(a), np.asarray(value), scale)
    return result
