"""A refusal is heard even by a client that sends its whole body before it reads."""

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SECONDS = 10.0


class Lingering:
    """ASGI middleware: an answer that comes before the body's end is sent, then the rest dropped.

    Closing a connection with unread data in it makes the kernel throw away what was sent; the
    client would see a reset in place of the reason.
    """

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

        async def lingering(message: Message) -> None:
            last = message["type"] == "http.response.body" and not message.get("more_body")
            if not (last and unread):
                await send(message)
                return
            await send({**message, "more_body": True})
            try:
                async with asyncio.timeout(_SECONDS):
                    while unread:
                        await watched()
            except TimeoutError:
                pass
            await send({"type": "http.response.body", "body": b""})

        await self._app(scope, watched, lingering)
