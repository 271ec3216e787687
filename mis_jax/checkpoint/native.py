"""Our own format on disk: one zarr array a parameter, in chunks of one layer or less.

Orbax and tensorstore open the folder too: orbax's checkpoints have this form without OCDBT. Chunks
are not compressed (trained weights do not shrink), so the file of a chunk is the bytes of its rows,
which we map and write as they are, with no copy on the way. It has a known size, and a folder that
lacks one is noticed; zarr itself would read zeros. The digest of every file lies beside them, and a
chunk is compared with its own when it is first read: a process pays for what it reads.
"""

import errno
import itertools
import json
import logging
import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore

from mis_jax.checkpoint.dtype_cast import NUMPY_DTYPES, all_finite, packed
from mis_jax.checkpoint.parameter_source import (
    PIECE,
    Job,
    ParameterSource,
    is_stacked,
    layer_key,
    layers_of,
)
from mis_jax.storage.files import Region, make_folder, map_file, write_file, write_text
from mis_jax.storage.folders import JOURNAL, NOTICE
from mis_jax.storage.hashing import bytes_digest, changed_files, file_digests
from mis_jax.storage.json_files import read_json
from mis_jax.storage.paths import files_below, is_inside

_log = logging.getLogger(__name__)
PARAMS = "params"
DIGESTS = "digests.json"  # beside config.json
_METADATA = "_METADATA"
_CHUNK = 32 * 2**20  # bytes at most, so that a process reads little more than its share
Shape = tuple[int, ...]


class NativeSource:
    """Parameters of a native checkpoint, read by layer and row."""

    def __init__(self, folder: Path, *, check_digests: bool = True):
        self._folder = folder / PARAMS
        self._arrays = _open(self._folder)
        self._unread = native_digests(folder) if check_digests else {}
        _check_small_files(folder, self._unread)

    def read(self, name: str, layer: int | None = None, rows: slice = slice(None)) -> np.ndarray:
        array = self._arrays[name]
        index = () if layer is None else (layer,)
        shape = array.shape[len(index) :]
        chunk = array.chunk_layout.read_chunk.shape[len(index) :]
        first, last, _ = rows.indices(shape[0])
        parts = []
        for number in range(first // chunk[0], -(-last // chunk[0])):
            path = self._folder / name / _chunk_name(index, number, len(shape))
            values = _mapped(path, array.dtype.numpy_dtype, chunk)
            self._check(path, values)
            begin = number * chunk[0]
            parts.append(values[max(first - begin, 0) : min(last - begin, chunk[0])])
        if len(parts) == 1:
            return parts[0]
        return (
            np.concatenate(parts) if parts else np.empty((0, *shape[1:]), array.dtype.numpy_dtype)
        )

    def key(self, name: str, layer: int | None = None) -> str:
        return layer_key(name, layer)

    def _check(self, path: Path, values: np.ndarray) -> None:
        """ValueError where a chunk is not what was written; a second look costs nothing."""
        name = str(path.relative_to(self._folder.parent))
        saved = self._unread.get(name)
        if saved and bytes_digest(values.reshape(-1).view(np.uint8).data) != saved:
            raise ValueError(
                f"{path}: is not what was saved; restore it from a copy or convert the "
                "checkpoint again"
            )
        self._unread.pop(name, None)


def native_digests(folder: Path) -> dict[str, str]:
    """Digest by name of every file that was written; none of an earlier version's checkpoint."""
    path = folder / DIGESTS
    if not path.exists():
        return {}
    found = read_json(path)
    if not all(is_inside(name) and isinstance(value, str) for name, value in found.items()):
        raise ValueError(f"{path}: not a list of digests; restore it from a copy or remove it")
    return found


def _check_small_files(folder: Path, digests: Mapping[str, str]) -> None:
    """All but the chunks: the arrays' own are refused, what people edit is warned of."""
    small = {
        name: saved
        for name, saved in digests.items()
        if not name.startswith(f"{PARAMS}/") or name.endswith((".zarray", _METADATA))
    }
    for problem in changed_files(folder, small):
        if problem.startswith(str(folder / PARAMS)):
            raise ValueError(f"{problem}; restore it from a copy or convert the checkpoint again")
        _log.warning("%s; was it edited? without %s nothing is compared", problem, folder / DIGESTS)


def write_digests(folder: Path, known: Mapping[Path, str]) -> None:
    """Write the digest of every file of a native checkpoint, the last thing to be written.

    What is `known` was taken when the file was written, and is not read again.
    """
    found = {str(path.relative_to(folder)): value for path, value in known.items()}
    unwritten = {NOTICE, JOURNAL, DIGESTS}
    found |= file_digests(folder, set(files_below(folder)) - found.keys() - unwritten)
    text = json.dumps(found, indent=0, sort_keys=True) + "\n"
    write_text(folder / DIGESTS, text)


def stored_shapes(folder: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of the parameters of a native checkpoint; no value is read."""
    arrays = _open(folder / PARAMS)
    return {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype.numpy_dtype)
        for name, array in arrays.items()
    }


def native_problems(folder: Path, wanted: Mapping[str, Shape]) -> list[str]:
    """Every missing, extra, misshapen or incomplete parameter, one line each."""
    arrays = _open(folder / PARAMS)
    lines = [f"missing parameter '{name}'" for name in wanted if name not in arrays]
    lines += [f"unexpected parameter '{name}'" for name in arrays if name not in wanted]
    for name, array in arrays.items():
        if array.dtype.name not in NUMPY_DTYPES:
            lines.append(f"parameter '{name}' has dtype {array.dtype.name}")
        if name not in wanted:
            continue
        if array.shape != wanted[name]:  # nor are its chunks counted: there is no end to a shape
            lines.append(
                f"parameter '{name}' has shape {array.shape}, config.json asks for {wanted[name]}"
            )
            continue
        lines += _missing_chunks(folder / PARAMS / name, name, array)
    return lines


def native_jobs(
    folder: Path, source: ParameterSource, shapes: Mapping[str, Shape], dtype: str
) -> list[Job]:
    """Lay out `folder`'s params and give the pieces of work that fill them."""
    params = folder / PARAMS
    make_folder(params)
    itemsize = NUMPY_DTYPES[dtype].itemsize
    jobs = []
    for name, shape in shapes.items():
        inner = shape[1:] if is_stacked(name) else shape
        chunk = _chunk_rows(inner, itemsize)
        _create(params / name, shape, (*(1,) * is_stacked(name), chunk, *inner[1:]), dtype)
        row = itemsize * math.prod(inner[1:])
        step = max(1, PIECE // (row * chunk)) * chunk
        for layer in layers_of(name, shape):
            for start in range(0, inner[0], step):
                rows = slice(start, min(start + step, inner[0]))
                jobs.append(
                    Job(
                        f"{name} {layer} {start}",
                        source.key(name, layer),
                        row * (rows.stop - rows.start),
                        _fill(source, name, layer, rows, params / name, chunk, dtype),
                        _regions(layer, rows, params / name, chunk, row, len(inner)),
                    )
                )
    return jobs


def finish_native(folder: Path, shapes: Mapping[str, Shape]) -> None:
    """Write what orbax wants to find beside the arrays."""
    tree = {
        str(tuple(name.split("."))): {
            "key_metadata": [{"key": key, "key_type": 2} for key in name.split(".")],
            "value_metadata": {
                "value_type": "jax.Array",
                "skip_deserialize": False,
                "write_shape": list(shape),
            },
        }
        for name, shape in shapes.items()
    }
    content = {
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    write_text(folder / PARAMS / _METADATA, json.dumps(content))


def _fill(
    source: ParameterSource,
    name: str,
    layer: int | None,
    rows: slice,
    folder: Path,
    chunk: int,
    dtype: str,
):
    def run() -> bool:
        values = packed(source.read(name, layer, rows), dtype, source.key(name, layer))
        index = () if layer is None else (layer,)
        for start in range(rows.start, rows.stop, chunk):
            part = values[start - rows.start : start - rows.start + chunk]
            path = folder / _chunk_name(index, start // chunk, values.ndim)
            write_file(path, part.reshape(-1).view(np.uint8).data, chunk * part[0].nbytes)
        return all_finite(values)

    return run


def _regions(
    layer: int | None, rows: slice, folder: Path, chunk: int, row: int, axes: int
) -> tuple[Region, ...]:
    """Where `_fill` writes: whole files, the last one with zeros behind its rows."""
    index = () if layer is None else (layer,)
    return tuple(
        Region(folder / _chunk_name(index, start // chunk, axes), 0, row * chunk, row * chunk)
        for start in range(rows.start, rows.stop, chunk)
    )


def _chunk_name(index: tuple[int, ...], number: int, axes: int) -> str:
    """zarr's name of the chunk that holds the `number`th run of rows of one layer."""
    return ".".join(map(str, (*index, number, *(0,) * (axes - 1))))


def _mapped(path: Path, dtype: np.dtype, shape: Shape) -> np.ndarray:
    try:
        pages = map_file(path)
    except (OSError, ValueError) as error:  # gone, or empty
        raise _unreadable(path, error) from None
    if hasattr(mmap, "MADV_WILLNEED"):
        pages.madvise(mmap.MADV_WILLNEED)
    if len(pages) != dtype.itemsize * math.prod(shape):
        raise _unreadable(path, f"{len(pages)} bytes")
    return np.frombuffer(pages, np.uint8).view(dtype).reshape(shape)


def _chunk_rows(shape: Shape, itemsize: int) -> int:
    """Rows of a chunk: the fewest equal parts of the first axis that are small enough."""
    parts = -(-itemsize * math.prod(shape) // _CHUNK)
    return -(-shape[0] // min(parts, shape[0]))


def _spec(path: Path, **more: Any) -> dict[str, Any]:
    kvstore = {"driver": "file", "path": f"{path.resolve()}/"}  # it takes no `..`
    return {"driver": "zarr", "kvstore": kvstore, **more}


def _create(path: Path, shape: Shape, chunks: Shape, dtype: str) -> None:
    metadata = {"shape": shape, "chunks": chunks, "dtype": dtype, "compressor": None, "order": "C"}
    if dtype != "bfloat16":
        metadata["dtype"] = NUMPY_DTYPES[dtype].str
    try:
        tensorstore.open(_spec(path, metadata=metadata), create=True, open=True).result()
    except ValueError as error:  # tensorstore's word for a full disk, too
        full = os.strerror(errno.ENOSPC) in str(error)
        reason = " ".join(str(error).split())
        raise OSError(errno.ENOSPC if full else errno.EIO, f"{path}: {reason}") from error


def _open(params: Path) -> dict[str, Any]:
    if not params.is_dir():
        raise ValueError(
            f"{params}: no such folder; the checkpoint is incomplete, convert it again"
        )
    if not (params / _METADATA).is_file():
        raise _unreadable(params, f"no {_METADATA}")
    paths = [path for path in sorted(params.iterdir()) if path.is_dir()]
    opening = {path.name: tensorstore.open(_spec(path), read=True) for path in paths}
    arrays = {}
    for name, future in opening.items():
        try:
            arrays[name] = future.result()
        except (ValueError, OSError) as error:
            raise _unreadable(params / name, error) from None
    return arrays


def _missing_chunks(path: Path, name: str, array: Any) -> list[str]:
    """Chunk files that are absent or cut short; at most one line an array."""
    chunks = array.chunk_layout.read_chunk.shape
    size = array.dtype.numpy_dtype.itemsize * math.prod(chunks)
    sizes = {file.name: file.stat().st_size for file in path.iterdir()}
    counts = [-(-side // chunk) for side, chunk in zip(array.shape, chunks, strict=True)]
    names = [".".join(map(str, i)) for i in itertools.product(*map(range, counts))]
    bad = [chunk for chunk in names if sizes.get(chunk) != size]
    more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
    return [f"parameter '{name}' lacks chunk {bad[0]}{more}, or has it cut short"] if bad else []


def _unreadable(path: Path, reason: Any) -> ValueError:
    text = " ".join(str(reason).split()) or "unknown reason"
    return ValueError(f"{path}: not readable ({text[:300]}); convert the checkpoint again")
