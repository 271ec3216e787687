"""Pictures that lie inside a table, written out as files once.

They go to ``pictures/`` beside the table or, where that cannot be written to, to a private folder
under the system's temporary one. A file is named by the hash of its content and appears whole or
not at all, so an extraction that was killed goes on where it stopped, a changed table cannot meet
an old picture, and several processes may extract at once.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from mis_jax.storage.files import replace_file

_KINDS = {
    b"\xff\xd8\xff": ".jpg",
    b"\x89PNG\r\n\x1a\n": ".png",
    b"GIF8": ".gif",
    b"BM": ".bmp",
}


def picture_kind(content: bytes) -> str | None:
    """The suffix that fits the first bytes of a picture; None for what is no known picture."""
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return ".webp"
    return next((kind for head, kind in _KINDS.items() if content.startswith(head)), None)


class PictureFolder:
    """Where the pictures of the tables in a folder are kept; made with the first picture."""

    def __init__(self, tables: Path) -> None:
        self._wanted = tables / "pictures"
        self._folder: Path | None = None

    def keep(self, content: bytes, where: str) -> Path:
        """The file that holds a picture, written if it is not there yet."""
        kind = picture_kind(content)
        if kind is None:
            raise ValueError(
                f"{where}: the {len(content)} bytes there are no JPEG, PNG, WebP, GIF or BMP; "
                "download the file again"
            )
        if self._folder is None:
            self._folder = _writable(self._wanted)
        path = self._folder / f"{hashlib.sha256(content).hexdigest()[:32]}{kind}"
        # The size too: a machine that lost power may have kept the name and not the bytes.
        if not path.is_file() or path.stat().st_size != len(content):
            replace_file(path, content, durable=False)
        return path


def _writable(wanted: Path) -> Path:
    try:
        wanted.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=wanted):
            return wanted
    except OSError:
        pass
    name = hashlib.sha256(str(wanted.absolute()).encode()).hexdigest()[:16]
    private = Path(tempfile.gettempdir()) / f"mis_jax-pictures-{os.getuid()}"
    private.mkdir(mode=0o700, exist_ok=True)
    found = private.lstat()
    # Anybody may make this name in a shared folder first and put other pictures into it.
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ValueError(
            f"{wanted} cannot be written to and {private} is open to others; "
            "make the first writable, or remove the second"
        )
    folder = private / name
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder
