"""One batch on its way to the devices while they work on the one before."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, Protocol, TypeVar

Item = TypeVar("Item")
Placed = TypeVar("Placed")
Source = TypeVar("Source", covariant=True)


class Closable(Protocol[Source]):
    """An iterator that holds processes or files."""

    def __next__(self) -> Source: ...
    def close(self) -> None: ...


class Ahead(Generic[Item, Placed]):
    """`place(item)` of each item of an iterator, the next one always in the making.

    An error of the iterator comes where its item would have.
    """

    def __init__(self, items: Closable[Item], place: Callable[[Item], Placed]):
        self._items, self._place = items, place
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._coming = self._pool.submit(self._make)

    def _make(self) -> Placed | None:
        try:
            item = next(self._items)
        except StopIteration:  # which a future cannot carry
            return None
        return self._place(item)

    def __iter__(self) -> "Ahead[Item, Placed]":
        return self

    def __next__(self) -> Placed:
        made = self._coming.result()
        if made is None:
            raise StopIteration
        self._coming = self._pool.submit(self._make)
        return made

    def close(self) -> None:
        """Wait for the item in the making, and end the iterator."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._items.close()
