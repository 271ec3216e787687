"""Read a checkpoint of any of the three formats, write it in any of them."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mis_jax.model.config import InternVLConfig
from mis_jax.storage import finished_folder, restore_tree, save_tree, stored_arrays
from mis_jax.weights import parameters
from mis_jax.weights.config_json import Format, detect_format, read_config
from mis_jax.weights.config_write import native_json, processor_files, published_json
from mis_jax.weights.layouts import Layout, head_key, rules
from mis_jax.weights.published import (
    NUMPY_DTYPES,
    Progress,
    Shards,
    cast,
    export_arrays,
    import_arrays,
    misfit,
    problems,
)

PARAMS = "params"
_WEIGHT_FILES = ("*.safetensors", "*.index.json", "*.bin", "*.pt")
_TEXT_FILES = (".json", ".model", ".txt", ".jinja")
_REWRITTEN = ("config.json", "preprocessor_config.json", "processor_config.json")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Parameters in memory, with what is needed to write them again."""

    config: InternVLConfig
    arrays: dict[str, Any]  # by dotted path, as `parameters.flat` gives them
    dtype: str
    folder: Path  # where it was read from; its tokenizer files go with every export
    source: dict[str, Any] | None  # the published config.json it comes from


def read_checkpoint(
    folder: Path, dtype: str | None = None, progress: Progress | None = None
) -> Checkpoint:
    """Read any format; `dtype` None keeps that of the file (of most of its tensors).

    Raises ValueError: a folder, config.json or weight file that is missing or broken, a model
    outside the family, or tensors that do not fit the config, all of them in one error.
    """
    folder = Path(folder)
    if dtype is not None:
        _check_dtype(dtype)
    kind = detect_format(folder)
    config, raw = read_config(folder)
    if kind == "native":
        arrays, kept = _read_native(folder, config, dtype)
        return Checkpoint(config, arrays, kept, folder, raw.get("source"))
    shards = Shards(folder, kind)
    config = _tied_as_stored(config, kind, shards)
    shapes = parameters.shapes(config)
    kept = dtype or shards.dtype
    arrays = import_arrays(shards, kind, config, shapes, kept, progress)
    return Checkpoint(config, arrays, kept, folder, raw)


def find_problems(folder: Path) -> list[str]:
    """What keeps a folder from being read, one line each; empty when it is sound.

    Looks at headers alone and reads no weights.
    """
    folder = Path(folder)
    try:
        kind = detect_format(folder)
        config, _ = read_config(folder)
        if kind == "native":
            return _native_problems(stored_shapes(folder), parameters.shapes(config))
        shards = Shards(folder, kind)
        if config.text.tie_embeddings and head_key(kind, config) in shards.shapes:
            config = _untied(config)  # either way of reading it is sound
        return problems(shards, kind, config, parameters.shapes(config))
    except ValueError as error:
        return [str(error)]


def write_checkpoint(
    checkpoint: Checkpoint,
    destination: Path,
    kind: Format,
    *,
    dtype: str | None = None,
    shard_bytes: int = 5 * 10**9,
    progress: Progress | None = None,
) -> None:
    """Write a folder that the owner of the format opens; it appears whole or not at all.

    Raises ValueError when the destination exists, the dtype is unknown or too narrow, or the
    format cannot hold the model; OSError when the disk does not take it.
    """
    dtype = dtype or checkpoint.dtype
    _check_dtype(dtype)
    config = checkpoint.config
    with finished_folder(destination) as folder:
        # The original layout is opened by upstream's own code, which its folder brings along.
        copy_companions(checkpoint.folder, folder, code=kind != "hf")
        host = {name: np.asarray(array) for name, array in checkpoint.arrays.items()}
        if kind == "native":
            content = native_json(config, checkpoint.source)
            arrays = {name: cast(array, dtype, name) for name, array in host.items()}
            save_tree(folder / PARAMS, parameters.nested(arrays))
        else:
            content = published_json(config, kind, checkpoint.source, dtype)
            export_arrays(folder, kind, config, host, dtype, shard_bytes, progress)
        if kind == "hf":
            for name, settings in processor_files(config).items():
                _write_json(folder / name, settings)
        _write_json(folder / "config.json", content)


def copy_companions(source: Path, destination: Path, *, code: bool = False) -> None:
    """Copy tokenizer, generation and template files: everything readable but weights.

    With `code` upstream's Python files go along. They are never run here.
    """
    suffixes = (*_TEXT_FILES, ".py") if code else _TEXT_FILES
    for path in sorted(source.iterdir()):
        is_weight = any(path.match(pattern) for pattern in _WEIGHT_FILES)
        if is_weight or path.name in _REWRITTEN or path.suffix not in suffixes:
            continue
        if path.is_file():
            shutil.copyfile(path, destination / path.name)


def stored_shapes(folder: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of the parameters of a native checkpoint, from its metadata."""
    params = folder / PARAMS
    if not params.is_dir():
        raise ValueError(
            f"{params}: no such folder; the checkpoint is incomplete, convert it again"
        )
    try:
        return stored_arrays(params)
    except Exception as error:  # whatever orbax meets in a folder that is not whole
        raise ValueError(
            f"{params}: not readable ({_first_line(error)}); convert the checkpoint again"
        ) from error


def _read_native(
    folder: Path, config: InternVLConfig, dtype: str | None
) -> tuple[dict[str, Any], str]:
    stored = stored_shapes(folder)
    found = _native_problems(stored, parameters.shapes(config))
    if found:
        raise misfit(folder, found, "params and config.json must be of one conversion")
    kept = dtype or str(next(iter(stored.values())).dtype)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {
        name: jax.ShapeDtypeStruct(array.shape, NUMPY_DTYPES[kept], sharding=device)
        for name, array in stored.items()
    }
    try:
        tree = restore_tree(folder / PARAMS, parameters.nested(abstract))
    except Exception as error:  # a chunk that is missing or cut short
        raise ValueError(
            f"{folder / PARAMS}: not readable ({_first_line(error)}); convert the checkpoint again"
        ) from error
    return parameters.flattened(tree), kept


def _native_problems(
    found: Mapping[str, jax.ShapeDtypeStruct], wanted: Mapping[str, tuple[int, ...]]
) -> list[str]:
    lines = [f"missing parameter '{name}'" for name in wanted if name not in found]
    lines += [f"unexpected parameter '{name}'" for name in found if name not in wanted]
    return lines + [
        f"parameter '{name}' has shape {found[name].shape}, config.json asks for {wanted[name]}"
        for name in wanted
        if name in found and found[name].shape != wanted[name]
    ]


def _tied_as_stored(config: InternVLConfig, layout: Layout, shards: Shards) -> InternVLConfig:
    """The file decides: a head that differs from the embedding is one of its own.

    Published checkpoints have heads of their own under a config.json that calls them tied, and
    exports of tied models in the original layout hold the embedding twice.
    """
    head = head_key(layout, config)
    if not config.text.tie_embeddings or head not in shards.shapes:
        return config
    untied = _untied(config)
    if problems(shards, layout, untied, parameters.shapes(untied)):
        return untied  # whose import tells them
    embedding = next(r.theirs for r in rules(layout, config) if r.ours == ("text.embedding",))
    if not np.array_equal(shards.read(head), shards.read(embedding)):
        return untied
    shards.drop(head)
    return config


def _untied(config: InternVLConfig) -> InternVLConfig:
    return dataclasses.replace(config, text=dataclasses.replace(config.text, tie_embeddings=False))


def _check_dtype(dtype: str) -> None:
    if dtype not in NUMPY_DTYPES:
        raise ValueError(f"dtype {dtype!r} is not supported; choose from {', '.join(NUMPY_DTYPES)}")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
