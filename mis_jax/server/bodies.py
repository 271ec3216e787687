"""The bodies of requests: read within a time and a size, all of them together within another."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import Request

from mis_jax.server.errors import RETRY_SECONDS, ApiError

BODY_SECONDS = 30.0  # for a body to come; more only while it comes at the least rate
LEAST_RATE = 500_000  # bytes a second: 32 MiB may take a minute and a half


class Bodies:
    """Reads bodies of up to `most` bytes; no more than `most_together` are held at a time."""

    def __init__(self, most: int, most_together: int):
        self._most = most
        self._most_together = most_together
        self._held = 0

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
            self._held -= len(body)

    async def _fill(self, body: bytearray, request: Request) -> None:
        began = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout_at(began + BODY_SECONDS) as limit:
                async for chunk in request.stream():
                    body += chunk
                    self._held += len(chunk)
                    if len(body) > self._most:
                        raise self._too_long()
                    if self._held > self._most_together:
                        raise ApiError(
                            429,
                            "the bodies of other requests fill this server's memory; try again "
                            "later",
                            code="queue_full",
                            headers={"Retry-After": str(RETRY_SECONDS)},
                        )
                    limit.reschedule(began + BODY_SECONDS + len(body) / LEAST_RATE)
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
            # A web page elsewhere cannot send this type here without asking, which is never
            # granted.
            raise ApiError(415, f"the content type is {kind!r}; send application/json")
        told = request.headers.get("content-length", "0")
        if told.isdecimal() and (len(told) > 18 or int(told) > self._most):
            raise self._too_long()

    def _too_long(self) -> ApiError:
        return ApiError(
            413,
            f"the body is longer than this server's limit of {self._most} bytes; send fewer or "
            "smaller images",
            code="request_too_large",
        )
