"""The process: a socket, uvicorn, and an end that lets what is running finish."""

import contextlib
import ipaddress
import logging
import resource
import socket
import threading
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.applications import Starlette
from starlette.types import ASGIApp

from mis_jax.inference.async_engine import EngineFailure, Service
from mis_jax.server.protocol import Protocol

log = logging.getLogger(__name__)
_LAST_BYTES_SECONDS = 5  # for answers that are made, but not yet sent


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
        http=Protocol,  # always the same parser, whatever else is installed
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_LAST_BYTES_SECONDS,
    )


def run(
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
        started_: Callable[[], None],
    ):
        super().__init__(config)
        self._service = service
        self._drain = drain
        self._started = started_
        self._draining = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._started()

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
