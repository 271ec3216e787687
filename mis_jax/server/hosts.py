"""The names by which a server may be asked.

A web page elsewhere can have its own name point to this machine (DNS rebinding): the browser then
takes the server for a part of that page and lets it read every answer. The name it asked for stands
in `Host`. An address in place of a name cannot be turned that way and is always accepted.
"""

import ipaddress
import socket
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from mis_jax.server.errors import ApiError

_LOOPBACK = frozenset({"localhost", "*.localhost"})
_LONGEST_NAME = 253  # of DNS


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
