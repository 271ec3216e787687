"""Server-sent events as OpenAI's clients read them."""

import asyncio
import json

from starlette.types import Send

from mis_jax.server.errors import ApiError

_LAST_WORD_SECONDS = 5.0  # for telling a client that may not be reading


class EventStream:
    """An open response of `data:` events."""

    def __init__(self, send: Send):
        self._send = send

    async def open(self) -> None:
        """Status 200 and the headers."""
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),  # nginx would hold events back
        ]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def event(self, document: str) -> None:
        """One event."""
        body = f"data: {document}\n\n".encode()
        await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def end(self) -> None:
        """The end of a whole answer."""
        await self._close(b"data: [DONE]\n\n")

    async def fail(self, error: ApiError) -> None:
        """The end of an answer that broke off; without `[DONE]`, so that none takes it as whole."""
        try:
            async with asyncio.timeout(_LAST_WORD_SECONDS):
                await self._close(f"data: {json.dumps(error.body)}\n\n".encode())
        except TimeoutError:
            pass

    async def _close(self, body: bytes) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": False})
