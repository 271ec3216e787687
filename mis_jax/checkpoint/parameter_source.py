"""Parameters that flow piece by piece from where they are to where they shall be."""

import collections
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils

from mis_jax.storage.files import Region, region_digest
from mis_jax.storage.folders import Journal

Progress = Callable[[int, int], None]  # bytes done, bytes in all
#: Bytes of one piece. Memory is bounded by a few pieces, or by the few largest tensors of a layer.
PIECE = 256 * 2**20
#: More than there are cores: some wait for the disk.
WORKERS = min(8, 2 * (os.cpu_count() or 1))
_Entry = tuple[bool, list[str | None]]  # of a piece: all finite, and the digests of its regions
_IN_FLIGHT = 2**30  # bytes that the pieces under way may write, unless one alone writes more


class ParameterSource(Protocol):
    """Parameters of a model by our dotted path, in our orientation."""

    def read(self, name: str, layer: int | None = None, rows: slice = slice(None)) -> np.ndarray:
        """One parameter or, of a stacked one, one `layer`; `rows` cuts the first axis of that.

        The result may be a view, of memory or of a file, and is not to be written to.
        """
        ...

    def key(self, name: str, layer: int | None = None) -> str:
        """What the source itself calls a parameter, or one layer of it: an error's name for it."""
        ...


def layer_key(name: str, layer: int | None) -> str:
    """The key of one layer in sources that have parameters under our names."""
    return name if layer is None else f"{name}, layer {layer}"


class ArrayParameterSource:
    """Parameters that are in memory, on the host or on devices."""

    def __init__(self, arrays: Mapping[str, Any]):
        self._arrays = arrays

    def read(self, name: str, layer: int | None = None, rows: slice = slice(None)) -> np.ndarray:
        array = self._arrays[name]
        if isinstance(array, jax.Array) and all(d.platform == "cpu" for d in array.devices()):
            array = np.asarray(array)  # costs nothing, where slices would be compiled
        return np.asarray(array if layer is None else array[layer])[rows]

    def key(self, name: str, layer: int | None = None) -> str:
        return layer_key(name, layer)


class GatheredSource:
    """Parameters on the devices of several processes, gathered a layer at a time.

    Every process reads the same layers in the same order: a read is done by all of them together.
    """

    def __init__(self, arrays: Mapping[str, jax.Array]):
        self._arrays = arrays
        self._key: tuple[str, int | None] | None = None
        self._value = np.empty(0)

    def read(self, name: str, layer: int | None = None, rows: slice = slice(None)) -> np.ndarray:
        if self._key != (name, layer):  # rows of one layer are asked for one after the other
            array = self._arrays[name]
            part = array if layer is None else array[layer]
            self._value = multihost_utils.process_allgather(part, tiled=True)
            self._key = (name, layer)
        return self._value[rows]

    def key(self, name: str, layer: int | None = None) -> str:
        return layer_key(name, layer)

    def read_along(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Take part in the reads of the process that writes these parameters in native format."""
        for name, shape in shapes.items():
            for layer in layers_of(name, shape):
                self.read(name, layer)


def is_stacked(name: str) -> bool:
    """Whether a parameter has one slice a layer on its first axis."""
    return ".layers.block." in name


def layers_of(name: str, shape: tuple[int, ...]) -> Iterable[int | None]:
    """The layers of a stacked parameter; of another one, None once."""
    return range(shape[0]) if is_stacked(name) else (None,)


@dataclass(frozen=True)
class Job:
    """One piece of a conversion."""

    name: str  # unique in its conversion, the same in every run of it
    tensor: str  # what the source calls it
    size: int  # bytes it writes
    run: Callable[[], bool]  # does it; False when a value is NaN or infinite
    regions: tuple[Region, ...]  # where its bytes then lie


@dataclass(frozen=True)
class Done:
    """What a conversion wrote."""

    not_finite: list[str]  # tensors with NaN or infinity
    digests: dict[Path, str]  # of files that one piece alone wrote


def run_jobs(
    jobs: list[Job], journal: Journal | None, progress: Progress | None, workers: int = WORKERS
) -> Done:
    """Do what the journal does not have yet, a few at once.

    With one worker they are done in their order. The first error stops the rest and is raised.
    """
    entries = _still_there(jobs, journal, workers) if journal else {}
    total = sum(job.size for job in jobs)
    done = sum(job.size for job in jobs if job.name in entries)
    if progress:
        progress(done, total)
    coming = collections.deque(job for job in jobs if job.name not in entries)
    running: dict[Future[_Entry], Job] = {}

    def do(job: Job) -> _Entry:
        is_finite = job.run()
        return is_finite, _digests(job)  # of bytes that are still in memory

    with ThreadPoolExecutor(workers) as pool:
        try:
            while True:
                while coming and len(running) < workers:
                    under_way = sum(job.size for job in running.values())
                    if running and under_way + coming[0].size > _IN_FLIGHT:
                        break
                    job = coming.popleft()
                    running[pool.submit(do, job)] = job
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job = running.pop(future)
                    entries[job.name] = future.result()
                    if journal:
                        journal.record(job.name, entries[job.name])
                    done += job.size
                    if progress:
                        progress(done, total)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    not_finite = dict.fromkeys(job.tensor for job in jobs if not entries[job.name][0])
    digests = {
        region.path: digest
        for job in jobs
        for region, digest in zip(job.regions, entries[job.name][1], strict=True)
        if digest and region.size == region.length
    }
    return Done(list(not_finite), digests)


def _digests(job: Job) -> list[str | None]:
    return [region_digest(region) for region in job.regions]


def _still_there(jobs: list[Job], journal: Journal, workers: int) -> dict[str, _Entry]:
    """What the journal says of the pieces whose bytes are still those that were written."""
    known = [job for job in jobs if job.name in journal.done]
    with ThreadPoolExecutor(workers) as pool:
        found = list(pool.map(_digests, known))
    return {
        job.name: (journal.done[job.name][0], digests)
        for job, digests in zip(known, found, strict=True)
        if all(digests) and journal.done[job.name][1] == digests
    }
