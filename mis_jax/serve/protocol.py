"""HTTP/1.1 connections that wait for a request's header only so long."""

import asyncio
import json

from uvicorn.protocols.http.h11_impl import H11Protocol

from mis_jax.serve.errors import ApiError

HEADER_SECONDS = 10.0  # from a connection's or a header's first byte to the header's end


class Protocol(H11Protocol):
    """uvicorn's, which waits for a header for ever."""

    _header_end: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_header()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # Between two requests uvicorn has a timer of its own, which the first byte ends, be it of
        # a header or of a body whose answer is already out.
        if self.cycle is None or self.cycle.response_complete:
            self._await_header()
        else:
            self._forget_header()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_header()
        super().connection_lost(exc)

    def _await_header(self) -> None:
        if self._header_end is None:  # else it would be put off by every byte
            self._header_end = self.loop.call_later(HEADER_SECONDS, self._give_up)

    def _forget_header(self) -> None:
        if self._header_end is not None:
            self._header_end.cancel()
            self._header_end = None

    def _give_up(self) -> None:
        if self.transport.is_closing():
            return
        if self.conn.trailing_data[0]:  # a part of a header, not the silence before one
            self.transport.write(_refusal())
        self.transport.close()


def _refusal() -> bytes:
    error = ApiError(408, "the request's header did not come in time", code="timeout")
    body = json.dumps(error.body).encode()
    head = (
        "HTTP/1.1 408 Request Timeout\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body
