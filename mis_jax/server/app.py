"""The routes, and who may use them."""

import hmac
from importlib.resources import files

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from mis_jax.data.processor import Processor
from mis_jax.inference.async_engine import Service
from mis_jax.server.chat_completions import ChatCompletions
from mis_jax.server.drain_body import Lingering
from mis_jax.server.errors import ApiError, as_api_error
from mis_jax.server.hosts import HostCheck
from mis_jax.server.metrics import CONTENT_TYPE, Metrics
from mis_jax.server.openapi import document
from mis_jax.server.schemas import Health, Model, Models
from mis_jax.server.settings import Settings

# The page runs its own script and talks to this server alone; pictures are those it was given.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


def create_app(service: Service, processor: Processor, settings: Settings) -> Starlette:
    """The server as an ASGI application; closing the service is the caller's."""
    metrics = Metrics(service)
    page = files("mis_jax.server").joinpath("page.html").read_text(encoding="utf-8")
    model = Model(id=settings.model)
    api = document(settings)

    async def chat_page(request: Request) -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": _PAGE_POLICY})

    async def models(request: Request) -> Response:
        return JSONResponse(Models(data=[model]).model_dump())

    async def one_model(request: Request) -> Response:
        name = request.path_params["model"]
        if name != model.id:
            raise ApiError(404, f"the model {name!r} does not exist", code="model_not_found")
        return JSONResponse(model.model_dump())

    async def health(request: Request) -> Response:
        refusal, full = service.refusal, service.full
        taken = f"all {service.places} places are taken; a request gets 429 now" if full else ""
        content = Health(
            status="unavailable" if refusal else "busy" if full else "ok",
            reason=refusal or taken,
            running=service.running,
            waiting=service.waiting,
        )
        return JSONResponse(content.model_dump(), 503 if refusal else 200)

    async def figures(request: Request) -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    async def openapi(request: Request) -> Response:
        return JSONResponse(api)

    async def as_json(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            refusal = ApiError(error.status_code, f"{error.detail}: {request.url.path}")
            refusal.headers = dict(error.headers or {})
        else:
            refusal = as_api_error(error, settings.timeout)
        return refusal.response()

    v1 = [
        Route(
            "/chat/completions",
            ChatCompletions(service, processor, settings, metrics),
            methods=["POST"],
        ),
        Route("/models", models),
        Route("/models/{model:path}", one_model),
    ]
    return Starlette(
        routes=[
            Mount("/v1", routes=v1, middleware=[Middleware(_KeyCheck, key=settings.api_key)]),
            Route("/", chat_page),
            Route("/health", health),
            Route("/metrics", figures),
            Route("/openapi.json", openapi),
        ],
        middleware=[Middleware(Lingering), Middleware(HostCheck, hosts=settings.hosts)],
        exception_handlers={ApiError: as_json, HTTPException: as_json, Exception: as_json},
    )


class _KeyCheck:
    """Lets only requests with the server's key through."""

    def __init__(self, app: ASGIApp, key: str | None):
        self._app = app
        self._key = key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._key is None or scope["type"] != "http" or _same(scope, self._key):
            await self._app(scope, receive, send)
            return
        refusal = ApiError(
            401,
            "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await refusal.response()(scope, receive, send)


def _same(scope: Scope, key: str) -> bool:
    given = dict(scope["headers"]).get(b"authorization", b"")
    kind, _, token = given.partition(b" ")
    # In a time that tells nothing of how much of it was right.
    return hmac.compare_digest(token.strip(), key.encode()) and kind.lower() == b"bearer"
