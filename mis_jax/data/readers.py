"""Readers: a function over numbered items, in order, in grain's threads, here or in processes."""

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker, util
from multiprocessing.connection import Connection
from typing import Any, Protocol

import grain

from mis_jax.signals import SIGNALS, LostWorker

_THREADS = 2  # of each process; a picture is decoded outside of Python's lock


class Reader(Protocol):
    """Items in order; `close` ends the threads or processes that read ahead."""

    def __iter__(self) -> Iterator[Any]: ...
    def __next__(self) -> Any: ...
    def close(self) -> None: ...


def in_order(work: Callable[[Any], Any], items: Any, workers: int, *, ahead: int = 16) -> Reader:
    """`work(item)` of each item, in their order.

    `items` is a sequence or an array. `workers` processes (0: threads of this one) read `ahead`
    items each before they are asked for. What `work` raises comes in the place of its item and
    ends the iterator; LostWorker comes for a process that was killed.
    """
    if not workers:
        return _in_threads(work, items, ahead)
    return _Processes(work, items, workers, ahead)


def _in_threads(work: Callable[[Any], Any], items: Any, ahead: int) -> grain.DatasetIterator:
    options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=max(ahead, _THREADS))
    return iter(grain.MapDataset.source(items).map(work).to_iter_dataset(options))


class _Processes:
    """Every worker has a pipe whose other end it alone holds, so that its end is the pipe's.

    grain's own processes share theirs with the parent: one that is killed in the middle of an item
    leaves half of it there, and whoever reads on waits for ever.
    """

    def __init__(self, work: Callable[[Any], Any], items: Any, workers: int, ahead: int):
        self._count, self._given = len(items), 0
        self._pipes: list[Connection] = []
        self._workers: list[Any] = []
        context = multiprocessing.get_context("spawn")
        with _signals_blocked():
            for number in range(workers):
                pipe, theirs = context.Pipe(duplex=False)
                share = work, items[number::workers], ahead, theirs
                worker = context.Process(target=_serve, args=share, daemon=True)
                worker.start()
                theirs.close()
                self._pipes.append(pipe)
                self._workers.append(worker)
        # Python asks them to end by SIGTERM at its own end, and waits.
        util.Finalize(self, _kill, args=(self._workers,), exitpriority=1)

    def __iter__(self) -> "_Processes":
        return self

    def __next__(self) -> Any:
        if self._given == self._count:
            raise StopIteration
        number = self._given % len(self._pipes)
        try:
            item, error = self._pipes[number].recv()
        except (EOFError, OSError) as end:
            raise LostWorker(
                f"a process that reads data was ended ({self._reason(number)}); lower data.workers "
                "where memory is short"
            ) from end
        if error is not None:
            raise error
        self._given += 1
        return item

    def close(self) -> None:
        """End the processes; they hold nothing that could be lost."""
        _kill(self._workers)

    def _reason(self, number: int) -> str:
        worker = self._workers[number]
        worker.join(1)
        code = worker.exitcode
        return signal.Signals(-code).name if code and code < 0 else f"exit code {code}"


def _kill(workers: list[Any]) -> None:
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()


def _serve(work: Callable[[Any], Any], items: Any, ahead: int, pipe: Connection) -> None:
    """What a worker does. It ends with the parent: nobody reads the pipe then."""
    with suppress(BrokenPipeError):
        try:
            for item in _in_threads(work, items, ahead):
                pipe.send((item, None))
        except BrokenPipeError:
            raise
        except Exception as error:
            pipe.send((None, error))


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Processes that start in this block take no signals, from their first moment on.

    Slurm and terminals send them to all processes of a run, which ends its workers itself.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        resource_tracker.ensure_running()  # this lets SIGINT and SIGTERM through again
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
