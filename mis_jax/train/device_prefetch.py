"""One batch on its way to the devices while they work on the one before."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Generic, Protocol, TypeVar

Item = TypeVar("Item")
Placed = TypeVar("Placed")
Source = TypeVar("Source", covariant=True)
_LOOK, _PATIENCE = 0.5, 5.0  # seconds


class Closable(Protocol[Source]):
    """An iterator that holds processes or files."""

    def __next__(self) -> Source: ...
    def close(self) -> None: ...


class DevicePrefetcher(Generic[Item, Placed]):
    """`place(item)` of each item of an iterator, the next one always in the making.

    An error of the iterator comes where its item would have. An item that does not come ends the
    iteration some seconds after the run was asked to stop.
    """

    def __init__(
        self,
        items: Closable[Item],
        place: Callable[[Item], Placed],
        asked_to_stop: Callable[[], bool] = lambda: False,
    ):
        self._items, self._place, self._asked_to_stop = items, place, asked_to_stop
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._coming = self._pool.submit(self._make)

    def _make(self) -> Placed | None:
        try:
            item = next(self._items)
        except StopIteration:  # which a future cannot carry
            return None
        return self._place(item)

    def __iter__(self) -> "DevicePrefetcher[Item, Placed]":
        return self

    def __next__(self) -> Placed:
        left = _PATIENCE
        while not wait([self._coming], _LOOK).done and left > 0:
            left -= _LOOK if self._asked_to_stop() else 0
        made = self._coming.result() if left > 0 else None
        if made is None:
            raise StopIteration
        self._coming = self._pool.submit(self._make)
        return made

    def close(self) -> None:
        """Wait a while for the item in the making, and end the iterator."""
        wait([self._coming], _PATIENCE)
        self._items.close()  # processes that hang in a read end by this
        self._pool.shutdown(wait=True, cancel_futures=True)
