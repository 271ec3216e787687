"""The OpenAPI document, built from the schemas that requests are checked against."""

from importlib.metadata import version
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from mis_jax.server import schemas
from mis_jax.server.settings import Settings

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


def document(settings: Settings) -> dict[str, Any]:
    """The API of a server with these settings."""
    _, definitions = models_json_schema(
        [
            (schemas.ChatRequest, "validation"),
            (schemas.ChatCompletion, "serialization"),
            (schemas.ChatCompletionChunk, "serialization"),
            (schemas.Models, "serialization"),
            (schemas.Model, "serialization"),
            (schemas.Health, "serialization"),
            (schemas.Error, "serialization"),
        ],
        ref_template=_REFERENCES,
    )
    components: dict[str, Any] = {"schemas": definitions["$defs"]}
    components["schemas"]["ChatRequest"]["properties"]["model"]["enum"] = [settings.model]
    guarded: dict[str, Any] = {}
    if settings.api_key is not None:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        guarded = {"security": [{"key": []}]}
    return {
        "openapi": "3.1.0",
        "info": {"title": "mis-jax", "version": version("mis-jax")},
        "paths": {
            "/v1/chat/completions": {"post": _chat() | guarded},
            "/v1/models": {"get": _get("The model that is served.", schemas.Models, 401) | guarded},
            "/v1/models/{model}": {
                "get": _get("One model.", schemas.Model, 401, 404)
                | guarded
                | {
                    "parameters": [
                        {
                            "name": "model", "in": "path", "required": True,
                            "schema": {"type": "string", "minLength": 1},
                        }
                    ]
                }
            },
            "/health": {"get": _health()},
            "/metrics": {"get": _text("Figures in Prometheus' format.", "text/plain")},
            "/": {"get": _text("A chat page.", "text/html")},
        },
        "components": components,
    }  # fmt: skip


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REFERENCES.format(model=model.__name__)}


def _json(text: str, model: type[BaseModel]) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": _reference(model)}}}


def _refusals(*statuses: int) -> dict[str, Any]:
    return {str(status): _json(_REFUSALS[status], schemas.Error) for status in statuses}


def _get(summary: str, model: type[BaseModel], *refusals: int) -> dict[str, Any]:
    return {"summary": summary, "responses": {"200": _json(summary, model)} | _refusals(*refusals)}


def _text(summary: str, kind: str) -> dict[str, Any]:
    content = {kind: {"schema": {"type": "string"}}}
    return {"summary": summary, "responses": {"200": {"description": summary, "content": content}}}


def _health() -> dict[str, Any]:
    told = _get("Whether requests are taken.", schemas.Health)
    told["responses"]["503"] = _json("They are not; 'reason' says why.", schemas.Health)
    return told


def _chat() -> dict[str, Any]:
    answer = _json("The answer; events where 'stream' is true.", schemas.ChatCompletion)
    answer["content"]["text/event-stream"] = {}  # of ChatCompletionChunk; 3.1 has no words for it
    return {
        "summary": "Answer a conversation.",
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": _reference(schemas.ChatRequest)}},
        },
        "responses": {"200": answer} | _refusals(*_REFUSALS),
    }
