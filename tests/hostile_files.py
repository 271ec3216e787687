"""Image files that do more than show a picture, and a watch over what they bring about."""

import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager

POSTSCRIPT = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
    b"(%pipe%touch /tmp/x) (w) file\nshowpage\n%%EOF\n"
)
_WATCHED = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "tempfile.mkstemp")
_events: list[str] = []
_watching = False


def iptc(content: bytes, width: int = 10, height: int = 10) -> bytes:
    """An IPTC container that says so many pixels and holds any file; Pillow opens what it holds."""

    def field(record: int, number: int, data: bytes) -> bytes:
        return struct.pack(">BBBH", 0x1C, record, number, len(data)) + data

    head = (
        field(3, 20, struct.pack(">I", width))
        + field(3, 30, struct.pack(">I", height))
        + field(3, 60, b"\x01\x00")  # one layer, grey
        + field(3, 120, struct.pack(">I", 5))  # "jpeg", which may be anything
    )
    parts = (content[i : i + 20_000] for i in range(0, len(content), 20_000))
    return head + b"".join(field(8, 10, part) for part in parts)


def _hook(event: str, _: object) -> None:
    if _watching and event in _WATCHED:
        _events.append(event)


sys.addaudithook(_hook)  # there is no way to take one back


@contextmanager
def nothing_started() -> Iterator[None]:
    """Fail where a program is started or a temporary file is made in this process."""
    global _watching
    _events.clear()
    _watching = True
    try:
        yield
    finally:
        _watching = False
    assert _events == []
