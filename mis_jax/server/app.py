"""The routes, and the OpenAPI document that describes them."""

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Mount, Route

from mis_jax.data.processor import Processor
from mis_jax.inference.async_engine import Service
from mis_jax.server import protocol
from mis_jax.server.access import HostCheck, KeyCheck, Settings
from mis_jax.server.bodies import DrainBody
from mis_jax.server.chat_completions import ChatCompletions
from mis_jax.server.metrics import CONTENT_TYPE, Metrics
from mis_jax.server.protocol import ApiError, Health, Model, Models, as_api_error
from mis_jax.storage.files import package_text

# The page runs its own script and talks to this server alone; pictures are those it was given.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)

# What several SDKs ask for unless they are told otherwise.
_NO_RESPONSES = (
    "this server has no Responses API; ask /v1/chat/completions: openai "
    "client.chat.completions.create, npm 'ai' provider.chat(MODEL), LangChain "
    "ChatOpenAI(use_responses_api=False), pydantic-ai 'openai-chat:MODEL' or OpenAIChatModel, "
    "inspect_ai -M responses_api=false, litellm 'openai/MODEL' with completion()"
)


def create_app(service: Service, processor: Processor, settings: Settings) -> Starlette:
    """The server as an ASGI application; closing the service is the caller's."""
    metrics = Metrics(service)
    page = package_text("mis_jax.server", "page.html")
    model = Model(id=settings.model)
    document = openapi_document(settings)

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
        busy = f"all {service.places} places are taken; a request gets 429 now" if full else ""
        content = Health(
            status="unavailable" if refusal else "busy" if full else "ok",
            reason=refusal or busy,
            running=service.running,
            waiting=service.waiting,
        )
        return JSONResponse(content.model_dump(), 503 if refusal else 200)

    async def prometheus(request: Request) -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    async def openapi(request: Request) -> Response:
        return JSONResponse(document)

    async def as_json(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            refusal = ApiError(error.status_code, f"{error.detail}: {request.url.path}")
            refusal.headers = dict(error.headers or {})
        else:
            refusal = as_api_error(error, settings.timeout)
        return refusal.response()

    async def no_responses(request: Request) -> Response:
        raise ApiError(404, _NO_RESPONSES, code="unknown_url")

    chat = ChatCompletions(service, processor, settings, metrics)
    v1 = [
        Route("/chat/completions", chat, methods=["POST"]),
        Route("/responses", no_responses, methods=["POST"]),
        Route("/models", models),
        Route("/models/{model:path}", one_model),
    ]
    cors = Middleware(
        CORSMiddleware,
        allow_origins=settings.origins,
        allow_methods=("GET", "POST"),
        allow_headers=("*",),
        expose_headers=("x-request-id",),
    )
    return Starlette(
        routes=[
            Mount("/v1", routes=v1, middleware=[Middleware(KeyCheck, key=settings.api_key)]),
            Route("/", chat_page),
            Route("/health", health),
            Route("/metrics", prometheus),
            Route("/openapi.json", openapi),
        ],
        middleware=[Middleware(DrainBody), Middleware(HostCheck, hosts=settings.hosts)]
        + [cors] * bool(settings.origins),
        exception_handlers={ApiError: as_json, HTTPException: as_json, Exception: as_json},
    )


_REFERENCES = "#/components/schemas/{model}"
_REFUSALS = {
    400: "What was sent is malformed, too long for the model, or asks for what is not supported.",
    401: "The API key is missing or wrong.",
    404: "There is no such model.",
    408: "The body did not come in time.",
    413: "The body is too long.",
    415: "The content type is not application/json.",
    421: "The server does not answer to this name; see its option --allow-host.",
    429: "As many requests run and wait as may; try again after Retry-After seconds.",
    500: "A fault of the server.",
    503: "The server is shutting down, or its engine has failed.",
    504: "The answer took longer than the server's limit.",
    507: "The request needs more memory than the server has.",
}


def openapi_document(settings: Settings) -> dict[str, Any]:
    """The API of a server with these settings, of the schemas that requests are checked against."""
    answers = (
        protocol.ChatCompletion, protocol.ChatCompletionChunk, Models, Model, Health,
        protocol.Error,
    )  # fmt: skip
    _, definitions = models_json_schema(
        [(protocol.ChatRequest, "validation"), *((answer, "serialization") for answer in answers)],
        ref_template=_REFERENCES,
    )
    components: dict[str, Any] = {"schemas": definitions["$defs"]}
    components["schemas"]["ChatRequest"]["properties"]["model"]["enum"] = [settings.model]
    guarded: dict[str, Any] = {}
    if settings.api_key is not None:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        guarded = {"security": [{"key": []}]}
    completion = _json("The answer; events where 'stream' is true.", protocol.ChatCompletion)
    completion["content"]["text/event-stream"] = {}  # of chunks; 3.1 has no words for it
    body = {"required": True, "content": _json("", protocol.ChatRequest)["content"]}
    chat = {"summary": "Answer a conversation.", "requestBody": body}
    chat["responses"] = {"200": completion} | _refusals(*_REFUSALS)
    health = _get("Whether requests are taken.", _json, Health)
    health["responses"]["503"] = _json("They are not; 'reason' says why.", Health)
    name = {"name": "model", "in": "path", "required": True}
    name["schema"] = {"type": "string", "minLength": 1}
    models = _get("The model that is served.", _json, Models, 401)
    one_model = _get("One model.", _json, Model, 401, 404) | guarded | {"parameters": [name]}
    return {
        "openapi": "3.1.0",
        "info": {"title": "mis-jax", "version": version("mis-jax")},
        "paths": {
            "/v1/chat/completions": {"post": chat | guarded},
            "/v1/models": {"get": models | guarded},
            "/v1/models/{model}": {"get": one_model},
            "/health": {"get": health},
            "/metrics": {"get": _get("Figures in Prometheus' format.", _text, "text/plain")},
            "/": {"get": _get("A chat page.", _text, "text/html")},
        },
        "components": components,
    }


def _get(summary: str, response: Callable[..., Any], of: Any, *refusals: int) -> dict[str, Any]:
    responses = {"200": response(summary, of)} | _refusals(*refusals)
    return {"summary": summary, "responses": responses}


def _refusals(*statuses: int) -> dict[str, Any]:
    return {str(status): _json(_REFUSALS[status], protocol.Error) for status in statuses}


def _json(text: str, model: type[BaseModel]) -> dict[str, Any]:
    schema = {"$ref": _REFERENCES.format(model=model.__name__)}
    return {"description": text, "content": {"application/json": {"schema": schema}}}


def _text(text: str, kind: str) -> dict[str, Any]:
    return {"description": text, "content": {kind: {"schema": {"type": "string"}}}}
