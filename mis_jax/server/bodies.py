"""The bodies of requests: read within bounds, or dropped so that a refusal is heard.

A body has a size, a time and a share of the memory that all bodies may take together. A client that
sends its whole body before it reads still gets the answer that came early: closing a connection
with unread data in it makes the kernel throw away what was sent, and the client would see a reset.
"""

import asyncio
import ctypes
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mis_jax.server.protocol import RETRY_SECONDS, ApiError

BODY_SECONDS = 30.0  # for a body to come; more only while it comes at the least rate
LEAST_RATE = 500_000  # bytes a second: 32 MiB may take a minute and a half
DRAIN_SECONDS = 10.0  # for the rest of a body that is not wanted any more
_LARGE = 1 << 20  # bytes of a body from which on its memory is given back
_TRIM_AFTER = 1.0  # seconds


class Bodies:
    """Reads bodies of up to `largest` bytes; no more than `capacity` are held at a time."""

    def __init__(self, largest: int, capacity: int):
        self._largest = largest
        self._capacity = capacity
        self._size = 0  # of all that are held
        self._trimmer = _Trimmer()

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytearray]:
        """The body, which counts as held until the end of the block.

        ApiError 413 as soon as it is known to be too long, 415 for another type, 408 for one that
        does not come, 429 where others hold too much.
        """
        self._check_headers(request)
        body = bytearray()
        try:
            await self._fill(body, request)
            yield body
        finally:
            self._size -= len(body)

    def give_back(self, size: int) -> None:
        """A request whose body had so many bytes has ended: return its memory to the system."""
        if size > _LARGE:
            self._trimmer.ask()

    async def _fill(self, body: bytearray, request: Request) -> None:
        start = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout_at(start + BODY_SECONDS) as limit:
                async for chunk in request.stream():
                    body += chunk
                    self._size += len(chunk)
                    if len(body) > self._largest:
                        raise self._too_long()
                    if self._size > self._capacity:
                        raise ApiError(
                            429,
                            "the bodies of other requests fill this server's memory; try again "
                            "later",
                            code="queue_full",
                            headers={"Retry-After": str(RETRY_SECONDS)},
                        )
                    limit.reschedule(start + BODY_SECONDS + len(body) / LEAST_RATE)
        except TimeoutError:
            raise ApiError(
                408,
                f"the body did not come within {BODY_SECONDS:g} s at {LEAST_RATE} bytes a second; "
                "send it at once",
                code="timeout",
                headers={"Connection": "close"},
            ) from None

    def _check_headers(self, request: Request) -> None:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # A web page elsewhere cannot send this type here without asking, which is granted to
            # those of --allow-origin alone.
            raise ApiError(415, f"the content type is {kind!r}; send application/json")
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and (len(length) > 18 or int(length) > self._largest):
            raise self._too_long()

    def _too_long(self) -> ApiError:
        return ApiError(
            413,
            f"the body is longer than this server's limit of {self._largest} bytes; send fewer or "
            "smaller images",
            code="request_too_large",
        )


class DrainBody:
    """ASGI middleware: sends an answer that comes before the body's end, then drops the rest."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        unread = True

        async def watched() -> Message:
            nonlocal unread
            message = await receive()
            unread = unread and bool(message.get("more_body"))
            return message

        async def draining(message: Message) -> None:
            last = message["type"] == "http.response.body" and not message.get("more_body")
            if not (last and unread):
                await send(message)
                return
            await send({**message, "more_body": True})
            try:
                async with asyncio.timeout(DRAIN_SECONDS):
                    while unread:
                        await watched()
            except TimeoutError:
                pass
            await send({"type": "http.response.body", "body": b""})

        await self._app(scope, watched, draining)


class _Trimmer:
    """Gives free memory back soon after it is asked to; does nothing without glibc.

    glibc keeps what its threads have freed: without this a server held 2 to 4 GB after a minute of
    bodies of 16 MB, all of them refused.
    """

    def __init__(self) -> None:
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        self._waiting = threading.Lock()

    def ask(self) -> None:
        """In a second; requests that end meanwhile are covered by that."""
        if self._trim is not None and self._waiting.acquire(blocking=False):
            timer = threading.Timer(_TRIM_AFTER, self._give_back)
            timer.daemon = True
            timer.start()

    def _give_back(self) -> None:
        self._waiting.release()  # first: what is freed from here on asks again
        assert self._trim is not None
        self._trim(0)
