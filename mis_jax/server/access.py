"""Limits and permissions of one server: what is asked, under which name and with which key.

A web page elsewhere can have its own name point to this machine (DNS rebinding): the browser then
takes the server for a part of that page and lets it read every answer. The name it asked for stands
in `Host`. An address in place of a name cannot be turned that way and is always accepted.
"""

import hmac
import ipaddress
import re
import socket
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from mis_jax.server.protocol import ApiError

MIB = 1 << 20
_LOOPBACK = frozenset({"localhost", "*.localhost"})
_LONGEST_NAME = 253  # of DNS
_ORIGIN = re.compile(r"null|[a-z][a-z0-9+.-]*://[a-z0-9_.:\[\]-]+")


@dataclass(frozen=True)
class Settings:
    """What a server is told when it starts.

    Attributes:
        model: the name clients ask for.
        context: tokens that prompt and answer may have together.
        api_key: what clients must send as bearer token under /v1; None lets everybody in.
        hosts: names it may be asked by, see `allowed_hosts`; None is every name.
        origins: web pages of these origins may ask from a browser (CORS); "*" is every one.
        image_folder: files below it may be named in `image_url`; None allows no file.
        timeout: seconds from a request's arrival to the end of its answer.
        max_body: bytes of a request.
        max_pixels: pixels of all images of a request together.
        max_new_tokens: length of an answer where the request names none.
        workers: threads that decode images and tokenise.
    """

    model: str
    context: int
    api_key: str | None = field(default=None, repr=False)
    hosts: frozenset[str] | None = None
    origins: tuple[str, ...] = ()
    image_folder: Path | None = None
    timeout: float = 600.0
    max_body: int = 32 * MIB
    max_pixels: int = 100_000_000
    max_new_tokens: int = 1024
    workers: int = 2


def allowed_hosts(
    bound: socket.socket, host: str, more: Collection[str] = ()
) -> frozenset[str] | None:
    """What a server on this socket answers to; None is every name.

    Where it listens on all addresses, nobody knows by what names others reach it: every one is
    accepted unless some are named in `more`. There `*` is every name and `*.a.org` those below it.
    """
    everywhere = ipaddress.ip_address(bound.getsockname()[0]).is_unspecified
    if "*" in more or (everywhere and not more):
        return None
    return _LOOPBACK | {_plain(name) for name in (host, socket.gethostname(), *more)}


def allowed_origins(names: Sequence[str]) -> tuple[str, ...]:
    """Origins as browsers send them; ValueError for what never is one."""
    for name in names:
        if name != "*" and not _ORIGIN.fullmatch(name):
            raise ValueError(
                f"--allow-origin {name!r:.80}: no browser sends this; give scheme, host and port "
                "in small letters and nothing behind them, such as http://localhost:3000"
            )
    return tuple(names)


class HostCheck:
    """ASGI middleware: 421 for a request to a name that is not among the allowed ones."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None):
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._hosts is None:
            await self._app(scope, receive, send)
            return
        name = _plain(_without_port(Headers(scope=scope).get("host", "")))
        if _is_address(name) or _is_among(name, self._hosts):
            await self._app(scope, receive, send)
            return
        refusal = ApiError(
            421,
            f"this server does not answer to the host {name!r:.80}; start it with "
            "--allow-host NAME",
            code="host_not_allowed",
        )
        await refusal.response()(scope, receive, send)


class KeyCheck:
    """ASGI middleware: 401 for a request without the server's key."""

    def __init__(self, app: ASGIApp, key: str | None):
        self._app = app
        self._key = key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._key is None or scope["type"] != "http" or _has_key(scope, self._key):
            await self._app(scope, receive, send)
            return
        refusal = ApiError(
            401,
            "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await refusal.response()(scope, receive, send)


def _has_key(scope: Scope, key: str) -> bool:
    header = dict(scope["headers"]).get(b"authorization", b"")
    kind, _, token = header.partition(b" ")
    # In a time that tells nothing of how much of it was right.
    return hmac.compare_digest(token.strip(), key.encode()) and kind.lower() == b"bearer"


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _plain(name: str) -> str:
    return name.strip().lower().removesuffix(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_among(name: str, hosts: frozenset[str]) -> bool:
    if len(name) > _LONGEST_NAME:
        return False
    above = name
    while above.partition(".")[2]:
        above = above.partition(".")[2]
        if f"*.{above}" in hosts:
            return True
    return name in hosts
