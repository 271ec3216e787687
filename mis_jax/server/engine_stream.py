"""Pieces of an answer, from the engine's thread to the event loop, while a client listens."""

import asyncio
from collections.abc import AsyncGenerator

from starlette.types import Receive

from mis_jax.inference.async_engine import Ticket
from mis_jax.inference.requests import Request, RequestOutput


class ClientGone(Exception):
    """The client closed its connection."""


async def until_gone(receive: Receive) -> None:
    """Returns when the client has closed its connection; its whole body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def pieces(
    ticket: Ticket, request: Request, gone: asyncio.Task
) -> AsyncGenerator[RequestOutput]:
    """Starts the request and gives its pieces; raises what the service tells, or ClientGone.

    `gone` is a task of `until_gone`.

    Close it (`contextlib.aclosing`): that cancels a request whose answer is not wanted any more.
    """
    loop = asyncio.get_running_loop()
    heard: asyncio.Queue[RequestOutput | Exception] = asyncio.Queue()

    def leave(gone: asyncio.Task) -> None:
        heard.put_nowait(ClientGone())

    gone.add_done_callback(leave)
    try:
        ticket.start(request, lambda what: _hand_over(loop, heard, what))
        while True:
            what = await heard.get()
            if isinstance(what, Exception):
                raise what
            yield what
            if what.finish_reason:
                return
    finally:
        gone.remove_done_callback(leave)
        ticket.cancel()


def _hand_over(loop: asyncio.AbstractEventLoop, heard: asyncio.Queue, what: object) -> None:
    loop.call_soon_threadsafe(heard.put_nowait, what)
