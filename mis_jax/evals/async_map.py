"""Functions of many items whose results are handed on one by one, as they are ready."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")

Groups = Iterator[list[tuple[int, R]]]
"""Results with the place of their item, in the order in which they are ready."""


class Stopped(RuntimeError):
    """There is no sense in asking on; what was answered so far is good."""


@dataclass(frozen=True)
class Streaming(Generic[T, R]):
    """A function of a list that can also hand out each result when it comes.

    A result that has cost money must be on disk before the next is waited for, hence `stream`.
    Called like any other function, it gives the whole list in order.
    """

    stream: Callable[[Sequence[T]], Groups[R]]

    def __call__(self, items: Sequence[T]) -> list[R]:
        results = dict(pair for group in self.stream(items) for pair in group)
        return [results[place] for place in range(len(items))]


def groups_of(
    function: Callable[[list[T]], list[R]] | Streaming[T, R], items: Sequence[T], size: int
) -> Groups[R]:
    """The results of a function: streamed where it can, else in batches of `size`."""
    if isinstance(function, Streaming):
        yield from function.stream(items)
        return
    for start in range(0, len(items), size):
        batch = list(items[start : start + size])
        results = function(batch)
        if len(results) != len(batch):
            raise RuntimeError(f"{len(results)} results came for {len(batch)} samples")
        yield list(enumerate(results, start))


def as_they_come(
    opened: AbstractAsyncContextManager[Callable[[T], Awaitable[R]]],
    items: Sequence[T],
    concurrency: int,
) -> Groups[R]:
    """The results of an asynchronous function, at most `concurrency` of them under way.

    Nothing runs while the caller has a group in hand. After an exception no item is begun, those
    under way are waited for and handed out, and then it is raised. An abandoned iterator, or
    Ctrl-C, ends what is under way.
    """
    waiting = iter(enumerate(items))
    running: dict[asyncio.Task[R], int] = {}
    failure: Exception | None = None

    async def step(function: Callable[[T], Awaitable[R]]) -> list[tuple[int, R]]:
        nonlocal failure
        while failure is None and len(running) < concurrency:
            if (following := next(waiting, None)) is None:
                break
            place, item = following
            running[asyncio.ensure_future(function(item))] = place
        if not running:
            return []
        done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        group = []
        for task in done:
            place = running.pop(task)
            try:
                group.append((place, task.result()))
            except Exception as reason:
                failure = failure or reason
        return group

    with asyncio.Runner() as runner:
        function = runner.run(opened.__aenter__())
        try:
            while True:
                group = runner.run(step(function))
                if group:
                    yield group
                elif not running:
                    break
        finally:
            for task in running:
                task.cancel()
            runner.run(opened.__aexit__(None, None, None))
    if failure is not None:
        raise failure
