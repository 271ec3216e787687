"""Every image of a set decoded once, by worker processes, before any of them is stored."""

import dataclasses
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from mis_jax.data.images import open_image
from mis_jax.data.mis.annotations import Sample, Split

Sizes = tuple[tuple[int, int], ...]
_MAX_CHUNK = 16  # samples that a worker takes at once


class WorkersDied(RuntimeError):
    """A process that decodes images ended by itself: no memory, or a crash of a decoder."""


def check_images(
    root: Path, splits: dict[str, Split], workers: int | None, progress: Callable[[int], None]
) -> None:
    """Decode the images of all samples; give the samples their sizes, reject the bad ones.

    Args:
        root: folder that the images' names are relative to.
        splits: changed in place.
        workers: processes; one for each CPU without it.
        progress: called with the number of samples that are done.

    Raises:
        WorkersDied: with the sample it happened at or shortly after.
    """
    samples = [sample for split in splits.values() for sample in split.samples]
    for split in splits.values():
        split.samples = []
    paths = [tuple(os.fspath(root / name) for name in sample.names) for sample in samples]
    workers = max(1, min(workers or os.cpu_count() or 1, len(samples)))
    # Started afresh, not forked: this process may hold the threads of JAX and of grain.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _leave_interrupts_to_parent) as pool:
        chunk = max(1, min(_MAX_CHUNK, len(paths) // (4 * workers)))
        results = pool.map(_sizes_or_reason, paths, chunksize=chunk)
        for done, sample in enumerate(samples, start=1):
            try:
                result = next(results)
            except (BrokenProcessPool, MemoryError) as error:
                raise _explained(error, samples, done - 1, chunk) from error
            if isinstance(result, str):
                splits[sample.split].reject(sample.split, sample.number, sample.id, result)
            else:
                splits[sample.split].samples.append(dataclasses.replace(sample, sizes=result))
            progress(done)


def _leave_interrupts_to_parent() -> None:
    """Ctrl-C reaches every process of the terminal; only the parent should answer it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _sizes_or_reason(paths: tuple[str, ...]) -> Sizes | str:
    """Width and height of each image, or why one of them is unusable."""
    try:
        return tuple(open_image(path).size for path in paths)
    except ValueError as error:
        return str(error)


def _explained(
    error: BaseException, samples: Sequence[Sample], done: int, chunk: int
) -> WorkersDied:
    first = samples[done]
    what = "had no memory left" if isinstance(error, MemoryError) else "ended without an answer"
    return WorkersDied(
        f"a process that decodes images {what}, within {chunk} samples from split "
        f"'{first.split}', row {first.number} on: it ran out of memory (try fewer workers), an "
        "image crashes its decoder (take it out), or a script called build outside of "
        "`if __name__ == '__main__':`"
    )
