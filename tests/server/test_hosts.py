"""A page that makes its own name point to this machine reaches no server on it."""

import socket

import pytest
from serve_world import error_of, running

from mis_jax.cli import serving
from mis_jax.server import run
from mis_jax.server.access import allowed_hosts, allowed_origins
from mis_jax.server.run import bind

PATHS = ("/", "/health", "/metrics", "/openapi.json", "/v1/models", "/nothing")


@pytest.fixture(scope="module")
def world(tiny_processor):
    """As one that listens on 127.0.0.1."""
    with bind("127.0.0.1", 0) as bound:
        hosts = allowed_hosts(bound, "127.0.0.1", ["model.example.org", "*.lan"])
    with running(tiny_processor, hosts=hosts) as world:
        yield world


@pytest.mark.parametrize(
    "host",
    [
        "evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example",
        "evil-localhost", "lan", "x.lan.evil.example", "example.org", "2130706433", "", "[evil]",
        "localhost@evil.example", "\xff",
    ],
)  # fmt: skip
def test_other_names_are_refused_on_every_path(world, host):
    for path in PATHS:
        response = world.http.get(path, headers={"Host": host.encode("latin-1")})
        error = error_of(response, 421)
        assert error["code"] == "host_not_allowed"
        assert "--allow-host" in error["message"]
        assert "\n" not in error["message"]
    chat = world.http.post("/v1/chat/completions", json={}, headers={"Host": "evil.example"})
    error_of(chat, 421)


@pytest.mark.parametrize(
    "host",
    [
        "localhost", "LocalHost:8000", "localhost.", "model.localhost", "127.0.0.1", "127.0.0.1:80",
        "[::1]", "[::1]:8000", "192.168.1.5:8000", "model.example.org", "a.lan", "a.b.lan:1",
    ],
)  # fmt: skip
def test_local_names_addresses_and_allowed_names_are_answered(world, host):
    assert world.http.get("/health", headers={"Host": host}).status_code == 200


def test_what_a_server_answers_to_follows_from_where_it_listens():
    with bind("127.0.0.1", 0) as local, bind("0.0.0.0", 0) as everywhere:
        assert "box.lan" in allowed_hosts(local, "Box.lan.")
        assert socket.gethostname().lower() in allowed_hosts(local, "127.0.0.1")
        assert allowed_hosts(local, "127.0.0.1", ["*"]) is None
        assert allowed_hosts(everywhere, "0.0.0.0") is None
        assert "a.org" in allowed_hosts(everywhere, "0.0.0.0", ["a.org"])


def test_the_command_checks_names(tiny_checkpoint, monkeypatch):
    """On loopback without an option, and with the names that it is given."""
    asked = []
    monkeypatch.setattr(run, "serve", lambda *words, **_: asked.append(words[2].hosts))
    monkeypatch.setattr(serving, "load_quietly", lambda *_, **__: (None, Config))
    for names in ((), ("a.org", "b.org")):
        serving.serve(tiny_checkpoint, port=0, allow_host=names)
    assert "localhost" in asked[0] and "a.org" not in asked[0]
    assert {"a.org", "b.org"} <= asked[1]


class Config:
    """As much of a processor as the command looks at."""

    class config:
        class text:
            max_position = 100


def test_web_pages_of_allowed_origins_may_ask(tiny_processor):
    """The browser asks before it sends JSON or a key; without the option nobody is answered so."""
    asks = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }

    def allowed(world, origin: str) -> list[str | None]:
        headers = {"Origin": origin}
        before = world.http.options("/v1/chat/completions", headers=headers | asks)
        answer = world.http.get("/v1/models", headers=headers)
        name = "access-control-allow-origin"
        return [response.headers.get(name) for response in (before, answer)]

    page = "http://localhost:3000"
    with running(tiny_processor, origins=(page,), api_key="k") as world:
        assert allowed(world, page) == [page, page]  # also of a 401, so that the page can tell why
        assert allowed(world, "http://evil.example") == [None, None]
    with running(tiny_processor) as world:
        assert allowed(world, page) == [None, None]


def test_an_origin_that_no_browser_sends_is_refused():
    good = ("*", "null", "http://localhost:3000", "https://[::1]:8", "chrome-extension://abc")
    assert allowed_origins(good) == good
    for name in ("localhost:3000", "http://a.org/", "http://A.org", "https://*.a.org", ""):
        with pytest.raises(ValueError, match="no browser sends this; give scheme, host and port"):
            allowed_origins([name])
