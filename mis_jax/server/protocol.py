"""HTTP/1.1 connections that wait only so long for a header to come and for an answer to be read."""

import asyncio
import json

from uvicorn.protocols.http.h11_impl import H11Protocol

from mis_jax.server.errors import ApiError

HEADER_SECONDS = 10.0  # from a connection's or a header's first byte to the header's end
STALL_SECONDS = 60.0  # for a client to read something of what is sent to it


class Protocol(H11Protocol):
    """uvicorn's, which waits for both for ever."""

    _header_end: asyncio.TimerHandle | None = None
    _stall_end: asyncio.TimerHandle | None = None

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
        super().connection_lost(exc)  # which resumes writing

    def pause_writing(self) -> None:
        super().pause_writing()
        # Not close(), which would wait until all is read.
        self._stall_end = self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        if self._stall_end is not None:
            self._stall_end.cancel()
            self._stall_end = None
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self.loop.call_later(STALL_SECONDS, self.transport.abort)

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
        self.loop.call_later(STALL_SECONDS, self.transport.abort)


def _refusal() -> bytes:
    error = ApiError(408, "the request's header did not come in time", code="timeout")
    body = json.dumps(error.body).encode()
    head = (
        "HTTP/1.1 408 Request Timeout\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body
