"""A loaded model, served until the process is told to stop: engine, socket and connections."""

import asyncio
import contextlib
import ipaddress
import json
import logging
import queue
import resource
import socket
import threading
from collections.abc import Callable
from types import FrameType

import jax
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from mis_jax.data.processor import Processor
from mis_jax.inference.async_engine import EngineFailure, Service
from mis_jax.inference.engine import Engine
from mis_jax.inference.requests import Request, RequestOutput
from mis_jax.model.internvl import InternVL
from mis_jax.model.unrolled import unrolled
from mis_jax.server.access import Settings
from mis_jax.server.app import create_app
from mis_jax.server.protocol import ApiError

STEPS = 8  # tokens of every answer between two looks at what has arrived
BETWEEN = 1  # tokens of every answer between two chunks of a new prompt
HEADER_SECONDS = 10.0  # from a connection's or a header's first byte to the header's end
STALL_SECONDS = 60.0  # for a client to read something of what is sent to it
_LAST_BYTES_SECONDS = 5  # for answers that are made, but not yet sent

log = logging.getLogger(__name__)


def serve(
    model: InternVL,
    processor: Processor,
    settings: Settings,
    bound: socket.socket,
    *,
    max_concurrent: int,
    max_queue: int,
    drain: float,
    int8_cache: bool = False,
    longest: int = 0,
    started: Callable[[], None],
) -> None:
    """Answers requests at a bound socket; returns after SIGTERM or SIGINT.

    What the engine raises on its very first prompts, such as for want of memory, is raised here.
    """
    engine = engine_for(
        model,
        processor,
        max_num_seqs=max_concurrent,
        max_length=settings.context,
        int8_cache=int8_cache,
    )
    if longest:
        engine.warm_up(min(longest, settings.context))
    service = Service(engine, max_concurrent=max_concurrent, max_queue=max_queue)
    warm_up(service, processor)
    app = create_app(service, processor, settings)
    serve_app(app, service, bound, drain=drain, started=started)


def engine_for(
    model: InternVL,
    processor: Processor,
    *,
    max_num_seqs: int,
    max_length: int,
    int8_cache: bool = False,
) -> Engine:
    """An engine that turns to new prompts soon, for answers that somebody is waiting for."""
    if jax.default_backend() == "cpu":
        model = unrolled(model)
    return Engine(
        model,
        stop_ids=processor.tokenizer.stop_ids,
        decode=processor.tokenizer.decode,
        max_num_seqs=max_num_seqs,
        between=BETWEEN,
        steps=STEPS,
        max_length=max_length,
        int8_cache=int8_cache,
    )


def warm_up(service: Service, processor: Processor) -> None:
    """Answer a prompt without and one with an image: clients do not wait for the compiler."""
    size = processor.config.vision.image_size
    for images in ([], [Image.new("RGB", (size, size))]):
        parts = [*({"type": "image"} for _ in images), {"type": "text", "text": "Hello"}]
        example = processor.example([{"role": "user", "content": parts}], images)
        outputs: queue.SimpleQueue[RequestOutput | Exception] = queue.SimpleQueue()
        service.submit(Request(example, max_new_tokens=2 * STEPS), outputs.put)
        while not (isinstance(output := outputs.get(), RequestOutput) and output.finish_reason):
            if isinstance(output, Exception):
                raise output


# The process


def bind(host: str, port: int) -> socket.socket:
    """A socket of this address, not yet listening; ValueError where it is not to be had."""
    if not 0 <= port < 2**16:
        raise ValueError(f"--port is {port}; give a number from 0 (any free one) to 65535")
    bound = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, UnicodeError) as error:
        if bound is not None:
            bound.close()
        raise ValueError(f"--host {host} --port {port} cannot be served on ({error})") from None
    return bound


def is_local(bound: socket.socket) -> bool:
    """Whether only this machine can reach it."""
    return ipaddress.ip_address(bound.getsockname()[0]).is_loopback


def address_of(bound: socket.socket) -> str:
    """Its URL."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def config_of(app: ASGIApp) -> uvicorn.Config:
    """How uvicorn serves the application."""
    return uvicorn.Config(
        app,
        http=Connection,  # always the same parser, whatever else is installed
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_LAST_BYTES_SECONDS,
    )


def serve_app(
    app: Starlette,
    service: Service,
    bound: socket.socket,
    *,
    drain: float,
    started: Callable[[], None],
) -> None:
    """Serve until SIGTERM or SIGINT; then refuse with 503 and finish what runs and waits.

    After `drain` seconds, or a second signal, what is left is broken off. Closes the service.
    Raises EngineFailure, soon after it, where the engine has failed.
    """
    _allow_many_connections()
    server = _Server(config_of(app), service, drain, started)
    service.when_broken(server.end)
    try:
        server.run(sockets=[bound])
    finally:
        service.close()
    if service.failure is not None:
        why = str(service.failure).partition("\n")[0]
        raise EngineFailure(f"{why}; the server has ended, start it again") from service.failure


def _allow_many_connections() -> None:
    """As many open files as the system lets this process have: a shell's 1024 are soon taken."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class _Server(uvicorn.Server):
    def __init__(
        self,
        config: uvicorn.Config,
        service: Service,
        drain: float,
        started: Callable[[], None],
    ):
        super().__init__(config)
        self._service = service
        self._drain = drain
        self._on_start = started
        self._draining = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn's own would close the door at once, and raise the signal again at the end.
        if self._draining:
            self.should_exit = self.force_exit = True
            return
        self._draining = True
        threading.Thread(target=self._end, name="drain", daemon=True).start()

    def end(self) -> None:
        """Stop soon, from any thread: answers that are made are still sent."""
        self.should_exit = True

    def _end(self) -> None:
        log.info("shutting down; answers under way are finished first")
        if not self._service.drain(self._drain):
            log.warning(
                "%d answers are broken off after %g s",
                self._service.running + self._service.waiting, self._drain,
            )  # fmt: skip
        self._service.close()
        self.end()


class Connection(H11Protocol):
    """HTTP/1.1 that waits only so long for a header to come and for an answer to be read.

    uvicorn's own waits for both for ever.
    """

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
            self.transport.write(_late_header())
        self.transport.close()
        self.loop.call_later(STALL_SECONDS, self.transport.abort)


def _late_header() -> bytes:
    error = ApiError(408, "the request's header did not come in time", code="timeout")
    body = json.dumps(error.body).encode()
    head = (
        "HTTP/1.1 408 Request Timeout\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body
