"""What a server is told when it starts."""

from dataclasses import dataclass, field
from pathlib import Path

MIB = 1 << 20


@dataclass(frozen=True)
class Settings:
    """Limits and permissions of one server.

    Attributes:
        model: the name clients ask for.
        context: tokens that prompt and answer may have together.
        api_key: what clients must send as bearer token under /v1; None lets everybody in.
        hosts: names it may be asked by, see `hosts.py`; None is every name.
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
    image_folder: Path | None = None
    timeout: float = 600.0
    max_body: int = 32 * MIB
    max_pixels: int = 100_000_000
    max_new_tokens: int = 1024
    workers: int = 2
