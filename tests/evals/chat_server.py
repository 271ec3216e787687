"""A chat endpoint that does as a test tells it, mishaps included, and counts what it is asked.

Built on http.server: neither our server nor the library that the client uses.
"""

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from waiting import DEADLINE

MODEL = "judge-model"
NONCE = re.compile(r"nonce (\d+)")


@dataclass
class Say:
    """One response: a chat completion of ``text``, unless another status or body is given."""

    text: str | None = None
    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    until: threading.Event | None = None
    finish_reason: str = "stop"
    refusal: str | None = None
    reasoning: dict[str, str] = field(default_factory=dict)

    def content(self) -> tuple[str, bytes]:
        """Content type and bytes."""
        if isinstance(self.body, str):
            return "text/html", self.body.encode()
        body = self.body or {
            "id": "c1", "object": "chat.completion", "created": 1, "model": f"{MODEL}-2026",
            "choices": [
                {
                    "index": 0,
                    "finish_reason": self.finish_reason,
                    "message": {
                        "role": "assistant", "content": self.text, "refusal": self.refusal,
                        **self.reasoning,
                    },
                }
            ],
            "usage": {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107},
        }  # fmt: skip
        return "application/json", json.dumps(body).encode()


def fault(status: int, message: str = "no", **more: Any) -> Say:
    """An error in OpenAI's shape; ``headers`` and ``delay`` are those of the response."""
    plain = {key: more.pop(key) for key in ("headers", "delay") if key in more}
    error = {"message": message, "type": "error", "param": None, "code": None} | more
    return Say(status=status, body={"error": error}, **plain)


def said_of(body: dict[str, Any]) -> str:
    """All text of a request."""
    texts = []
    for message in body["messages"]:
        content = message["content"]
        parts = [content] if isinstance(content, str) else [p.get("text", "") for p in content]
        texts += parts
    return "\n".join(texts)


def pictures_of(body: dict[str, Any]) -> list[str]:
    """All data URIs of a request."""
    return [
        part["image_url"]["url"]
        for message in body["messages"]
        if isinstance(message["content"], list)
        for part in message["content"]
        if part["type"] == "image_url"
    ]


Script = Callable[[str, int, dict[str, Any]], Say]


class ChatServer:
    """``script(nonce, which time, body)`` says what to answer; self-tests have the nonce 'self'."""

    def __init__(self, script: Script, owned_by: str = "somebody", models: bool = True):
        self.script, self.owned_by, self.models = script, owned_by, models
        self.others: tuple[str, ...] = ()  # models beside the one
        self.calls: Counter[str] = Counter()
        self.bodies: list[tuple[str, dict[str, Any]]] = []
        self.keys: list[str | None] = []
        self.at_once = self.most_at_once = 0
        self.last_moment = 0.0  # of an answer or a question
        self.lock = threading.Lock()
        self.url = ""

    def answer(self, body: dict[str, Any], key: str | None) -> Say:
        match = NONCE.search(said_of(body))
        nonce = match[1] if match else "self"
        with self.lock:
            self.calls[nonce] += 1
            self.bodies.append((nonce, body))
            self.keys.append(key)
            self.at_once += 1
            self.last_moment = time.monotonic()
            self.most_at_once = max(self.most_at_once, self.at_once)
            said = self.script(nonce, self.calls[nonce], body)
        time.sleep(said.delay)
        if said.until:
            said.until.wait(DEADLINE)
        with self.lock:
            self.at_once -= 1
            self.last_moment = time.monotonic()
        return said

    def quiet_for(self, seconds: float) -> bool:
        """Whether nothing is under way, and was not for so long."""
        with self.lock:
            return not self.at_once and time.monotonic() - self.last_moment >= seconds

    @property
    def judged(self) -> Counter[str]:
        """Calls without the self-tests."""
        return Counter({nonce: n for nonce, n in self.calls.items() if nonce != "self"})


@contextmanager
def serving(script: Script, **options: Any) -> Iterator[ChatServer]:
    """A server on a free port, with its address in ``url``."""
    chat = ChatServer(script, **options)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            chat.keys.append(self.headers.get("Authorization"))
            if not (self.path == "/v1/models" and chat.models):
                return self.send(fault(404))
            model = {"object": "model", "created": 1, "owned_by": chat.owned_by}
            models = [model | {"id": name} for name in (MODEL, *chat.others)]
            self.send(Say(body={"object": "list", "data": models}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != "/v1/chat/completions":
                return self.send(fault(404, "no such path"))
            self.send(chat.answer(body, self.headers.get("Authorization")))

        def send(self, said: Say) -> None:
            kind, content = said.content()
            try:
                self.send_response(said.status)
                for name, value in {"Content-Type": kind, **said.headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            except (BrokenPipeError, ConnectionResetError):  # the client gave up, or was killed
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    chat.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield chat
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
