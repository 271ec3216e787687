"""A running server with a scripted engine behind it."""

import base64
import contextlib
import io
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import uvicorn
from PIL import Image
from scripted_engine import CONTEXT, ScriptedEngine
from waiting import DEADLINE, until

from mis_jax.inference.async_engine import Service
from mis_jax.server.access import Settings
from mis_jax.server.app import create_app
from mis_jax.server.run import address_of, bind, config_of

MODEL = "scripted"


@dataclass
class World:
    """The server's address and its parts."""

    url: str
    engine: Any
    service: Service
    http: httpx2.Client
    folder: Path | None = None  # the one with images that may be opened

    def openai(self, key: str = "none", **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, **options)

    def ask(self, text: Any = "hello", **fields: Any) -> httpx2.Response:
        """POST one user message."""
        return self.http.post("/v1/chat/completions", json=body(text, **fields))

    def refused(self, status: int, text: Any = "hello", **fields: Any) -> dict[str, Any]:
        """The error that this request is refused with."""
        return error_of(self.ask(text, **fields), status)


def body(text: Any = "hello", **fields: Any) -> dict[str, Any]:
    """A request of one user message."""
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], **fields}


def error_of(response: httpx2.Response, status: int) -> dict[str, Any]:
    """The error in a response, in OpenAI's shape."""
    assert response.status_code == status, response.text
    content = response.json()
    assert content.keys() == {"error"}
    assert content["error"].keys() == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text
    return content["error"]


def data_uri(seed: int = 0, width: int = 60, height: int = 60) -> str:
    """A PNG picture."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def image(url: str) -> dict[str, Any]:
    """A part with an image."""
    return {"type": "image_url", "image_url": {"url": url}}


@contextlib.contextmanager
def running(
    processor: Any, *, rows: int = 4, queue: int = 64, pause: float = 0.0, **settings: Any
) -> Iterator[World]:
    """A server with a scripted engine, on a free port, in a thread of this process."""
    engine = ScriptedEngine(processor, rows, pause)
    with serving(engine, processor, rows=rows, queue=queue, **settings) as world:
        yield world
        engine.gate.set()


@contextlib.contextmanager
def serving(
    engine: Any,
    processor: Any,
    *,
    rows: int,
    queue: int = 64,
    keep_alive: float | None = None,
    **settings: Any,
) -> Iterator[World]:
    """A server with this engine; `keep_alive` seconds of silence end a connection, or uvicorn's."""
    service = Service(engine, max_concurrent=rows, max_queue=queue)
    app = create_app(service, processor, Settings(MODEL, CONTEXT, **settings))
    bound = bind("127.0.0.1", 0)
    config = config_of(app)
    config.timeout_keep_alive = keep_alive or config.timeout_keep_alive
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    until(lambda: server.started)
    url = address_of(bound)
    with httpx2.Client(base_url=url, timeout=DEADLINE) as client:
        yield World(url, engine, service, client, settings.get("image_folder"))
    service.close()
    server.should_exit = True
    thread.join(DEADLINE)
    assert not thread.is_alive()
