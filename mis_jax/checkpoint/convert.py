"""Write a checkpoint in any of the three formats, streaming from wherever its values are."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from mis_jax.checkpoint import nnx_state
from mis_jax.checkpoint.dtype_cast import NUMPY_DTYPES, check_dtype
from mis_jax.checkpoint.hf.config import Format
from mis_jax.checkpoint.hf.config_writer import native_json, published_json
from mis_jax.checkpoint.hf.files import write_companions
from mis_jax.checkpoint.load import Checkpoint, OpenCheckpoint
from mis_jax.checkpoint.native import finish_native, native_jobs, write_digests
from mis_jax.checkpoint.parameter_source import (
    WORKERS,
    ArrayParameterSource,
    GatheredSource,
    Progress,
    run_jobs,
)
from mis_jax.checkpoint.safetensors_writer import finish_published, published_jobs
from mis_jax.storage.files import FULL, os_error_text
from mis_jax.storage.folders import Journal, finished_folder, resumable_folder
from mis_jax.storage.json_files import write_json

SHARD_BYTES = 5 * 10**9
_PLAN_VERSION = 4  # another order or size of pieces needs another
_log = logging.getLogger(__name__)


def convert(
    opened: OpenCheckpoint,
    destination: Path,
    kind: Format,
    *,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    allow_nonfinite: bool = False,
    progress: Progress | None = None,
    workers: int = WORKERS,
) -> None:
    """Write a folder that the owner of the format opens; it appears whole or not at all.

    Memory is bounded by a few of the largest tensors. Where values come from files, an error or a
    kill leaves `DESTINATION.incomplete`, and the same call goes on from there. Raises ValueError
    when the destination exists, the dtype is unknown or too narrow, the format cannot hold the
    model, or tensors hold NaN or infinity and `allow_nonfinite` is not set; OSError when the disk
    does not take it.
    """
    dtype = dtype or opened.dtype
    check_dtype(dtype)
    config = opened.config
    if kind == "native":
        content = native_json(config, opened.published)
    else:
        content = published_json(config, kind, opened.published, dtype)
    shapes = nnx_state.shapes(config)
    plan = {"format": kind, "dtype": dtype, "shard_bytes": shard_bytes}
    size = NUMPY_DTYPES[dtype].itemsize * sum(math.prod(shape) for shape in shapes.values())
    with _size_in_error(size), _workplace(opened, destination, plan) as (folder, journal):
        write_companions(opened.folder, folder, config, kind)  # first: a bad one is told at once
        if kind == "native":
            jobs = native_jobs(folder, opened.weights, shapes, dtype)
        else:
            jobs = published_jobs(folder, kind, config, opened.weights, shapes, dtype, shard_bytes)
        done = run_jobs(jobs, journal, progress, workers)
        if done.not_finite and not allow_nonfinite:
            raise _not_finite(opened, done.not_finite)
        write_json(folder / "config.json", content)
        if kind == "native":
            finish_native(folder, shapes)
            write_digests(folder, done.digests)
        else:
            finish_published(folder)


@contextmanager
def _size_in_error(size: int) -> Iterator[None]:
    """Add to a full disk's error how many bytes all weights take."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        reason = f"{os_error_text(error)}; all weights take {size / 1e9:.2f} GB"
        raise OSError(error.errno, reason) from error


def write_checkpoint(
    checkpoint: Checkpoint,
    destination: Path,
    kind: Format,
    *,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """`convert` of parameters in memory, which may hold whatever training made of them.

    Where several processes hold them, all of them call this together, and the first one writes.
    """
    gathered = GatheredSource(checkpoint.arrays) if jax.process_count() > 1 else None
    if gathered and jax.process_index() > 0:
        gathered.read_along(nnx_state.shapes(checkpoint.config))
        return
    opened = OpenCheckpoint(
        checkpoint.config,
        gathered or ArrayParameterSource(checkpoint.arrays),
        checkpoint.dtype,
        checkpoint.folder,
        checkpoint.source,
    )
    convert(
        opened,
        destination,
        kind,
        dtype=dtype,
        shard_bytes=shard_bytes,
        allow_nonfinite=True,
        progress=progress,
        workers=1 if gathered else WORKERS,
    )


@contextmanager
def _workplace(
    opened: OpenCheckpoint, destination: Path, plan: dict[str, Any]
) -> Iterator[tuple[Path, Journal | None]]:
    """The folder to write into, with a journal where a later process could go on."""
    if not opened.files:
        with finished_folder(destination) as folder:
            yield folder, None
        return
    stats = [(str(path.resolve()), path.stat()) for path in opened.files]
    plan |= {
        "version": _PLAN_VERSION,
        "files": [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats],
    }
    with resumable_folder(destination, plan) as (folder, journal):
        if journal.done:
            _log.info("going on with %s, %d pieces of which are done", folder, len(journal.done))
        yield folder, journal


def _not_finite(opened: OpenCheckpoint, tensors: list[str]) -> ValueError:
    named = ", ".join(tensors[:5]) + (f" and {len(tensors) - 5} more" if len(tensors) > 5 else "")
    return ValueError(
        f"{opened.folder}: {len(tensors)} tensor(s) hold NaN or infinite values: {named}; download "
        "the file again, or add --allow-nan to convert them as they are"
    )
