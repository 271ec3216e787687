"""grain's readers: a function over numbered items, in order, in threads or in processes."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import grain

_THREADS = 2  # without worker processes; a picture is decoded outside of Python's lock


def in_order(
    work: Callable[[Any], Any], items: Any, workers: int, *, ahead: int = 16
) -> grain.DatasetIterator:
    """`work(item)` of each item, in their order; an iterator with `close`.

    `items` is a sequence or an array. `workers` processes (0: threads of this one) read `ahead`
    items each before they are asked for.
    What `work` raises in a process ends the iterator with an error of grain's.
    """
    mapped = grain.MapDataset.source(items).map(work)
    options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=max(ahead, _THREADS))
    found = mapped.to_iter_dataset(options)
    if workers:
        _let_workers_start()
        found = found.mp_prefetch(
            grain.MultiprocessingOptions(workers, per_worker_buffer_size=ahead)
        )
    return iter(found)


def _let_workers_start() -> None:
    """grain's workers refuse to start before absl's flags (absl comes with grain) are parsed."""
    flags = import_module("absl.flags").FLAGS
    if not flags.is_parsed():
        flags.mark_as_parsed()
