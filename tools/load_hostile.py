"""Clients that do harm, for `load_test.py`: each kind has an end that a sound server gives it."""

import asyncio
import json
import struct
import time
import zlib
from base64 import b64encode
from collections import Counter
from collections.abc import Callable
from urllib.parse import urlsplit

import httpx2

CHAT = "/v1/chat/completions"
_PATIENCE = 60.0  # seconds in which a half request must be over


class Hostile:
    """What they did and what came of it, by kind; `wrong` is what no server should answer."""

    def __init__(self, url: str, model: str, headers: dict[str, str]):
        self.ends: Counter[str] = Counter()
        self.wrong: Counter[str] = Counter()
        self._place = urlsplit(url)
        self._headers = headers
        self._bodies = {
            "bomb": _asking(model, _picture(_bomb())),
            "postscript": _asking(model, _picture(b"%!PS-Adobe-3.0 EPSF-3.0\n" + b"x" * 200)),
            "16 MB field": json.dumps(
                {"model": model, "messages": [_turn("a")], "system_prompt": "x " * (8 << 20)}
            ).encode(),
            "empty turns": json.dumps({"model": model, "messages": [_turn("")] * 100_000}).encode(),
            "brackets": b'{"messages": ' + b"[" * (4 << 20),
            "numbers": b'{"model": "m", "seed": ' + b"9" * (1 << 20) + b"}",
        }
        self._gone = json.dumps(
            {"model": model, "messages": [_turn("Tell me all.")], "max_tokens": 200, "stream": True}
        ).encode()
        self.kinds: dict[str, Callable[[httpx2.AsyncClient], object]] = {
            "half header": lambda _: self._half(b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: x"),
            "half body": lambda _: self._half(self._head(10_000) + b'{"model": '),
            "gone": lambda _: self._leave(),
            **{kind: (lambda c, kind=kind: self._refused(c, kind)) for kind in self._bodies},
        }

    async def work(self, number: int, client: httpx2.AsyncClient, end: float) -> None:
        """One client, that takes the kinds in turn until the time is over."""
        kinds = list(self.kinds)
        while time.perf_counter() < end:
            kind = kinds[number % len(kinds)]
            number += 1
            try:
                said = await self.kinds[kind](client)
            except (httpx2.HTTPError, OSError) as error:  # thrown out while it spoke
                said = type(error).__name__
            self.ends[f"{kind}: {said}"] += 1

    async def _refused(self, client: httpx2.AsyncClient, kind: str) -> int:
        headers = {"content-type": "application/json"}
        response = await client.post(CHAT, content=self._bodies[kind], headers=headers)
        if response.status_code not in (400, 408, 413, 429):
            self.wrong[f"{kind} got {response.status_code}"] += 1
        if response.status_code == 429:
            await asyncio.sleep(1)
        return response.status_code

    async def _half(self, words: bytes) -> str:
        """A request that never ends: the server has to end it."""
        reader, writer = await asyncio.open_connection(self._place.hostname, self._place.port)
        try:
            writer.write(words)
            await writer.drain()
            said = await asyncio.wait_for(reader.read(), _PATIENCE)
            return said.split(b" ", 2)[1].decode() if said else "closed"
        except TimeoutError:
            self.wrong["a half request was not ended"] += 1
            return "left alone"
        finally:
            writer.close()

    async def _leave(self) -> str:
        """Asks, hears the first words and goes."""
        reader, writer = await asyncio.open_connection(self._place.hostname, self._place.port)
        try:
            writer.write(self._head(len(self._gone)) + self._gone)
            await writer.drain()
            await asyncio.wait_for(reader.read(200), _PATIENCE)
            return "left"
        except TimeoutError:
            return "left unheard"
        finally:
            writer.transport.abort()

    def _head(self, length: int) -> bytes:
        lines = {
            "Host": self._place.netloc, "Content-Type": "application/json",
            "Content-Length": str(length), **self._headers,
        }  # fmt: skip
        told = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        return f"POST {CHAT} HTTP/1.1\r\n{told}\r\n".encode()


def _turn(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _asking(model: str, part: dict[str, object]) -> bytes:
    content = [part, {"type": "text", "text": "What is it?"}]
    return json.dumps({"model": model, "messages": [{"role": "user", "content": content}]}).encode()


def _picture(content: bytes) -> dict[str, object]:
    url = "data:image/png;base64," + b64encode(content).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def _bomb() -> bytes:
    """A PNG of 30,000 by 30,000 pixels in a megabyte."""
    lines, parts = 100 * 30_001, 300
    packer = zlib.compressobj(9, wbits=-15)
    packed = packer.compress(bytes(lines)) + packer.flush(zlib.Z_FULL_FLUSH)
    check = (lines * parts % 65521) << 16 | 1  # Adler-32 of so many zeros
    data = b"\x78\xda" + packed * parts + packer.flush() + struct.pack(">I", check)

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    image = chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + image
