"""Errors as OpenAI's clients know them: `{"error": {message, type, param, code}}`."""

import logging
from typing import Any

from starlette.responses import JSONResponse

from mis_jax.inference.async_engine import Busy, EngineFailure, Unavailable
from mis_jax.inference.memory import OutOfMemory

log = logging.getLogger(__name__)
RETRY_SECONDS = 1  # what a refused client is asked to wait
_HOST_MEMORY = "the request needs more memory than this server has; send fewer or smaller images"
_MOST_CHARACTERS = 1000  # of what an error repeats: a client's own megabytes are not sent back


class ApiError(Exception):
    """An answer that is no answer, with its HTTP status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        message, param = _short(message), param and _short(param)
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """What is sent, as a JSON document or an event of a stream."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        """The whole HTTP response."""
        return JSONResponse(self.body, self.status, self.headers)


def _short(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}..."


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400, the client's to repair."""
    return ApiError(400, message, param=param, code=code)


def as_api_error(error: Exception, timeout: float) -> ApiError:
    """Whatever ended a request; what is no known case is logged and told as 500 without detail."""
    retry = {"Retry-After": str(RETRY_SECONDS)}
    match error:
        case ApiError():
            return error
        case Busy():
            return ApiError(429, f"{error}; try again later", code="queue_full", headers=retry)
        case Unavailable():
            return ApiError(503, str(error), code="unavailable", headers=retry)
        case TimeoutError():
            message = f"the answer took longer than this server's limit of {timeout:g} s"
            return ApiError(504, message, code="timeout")
        case ValueError():
            return bad_request(str(error))
        case OutOfMemory() | MemoryError():
            # OpenAI's clients would try again, and end just so.
            once = {"x-should-retry": "false"}
            message = str(error) if isinstance(error, OutOfMemory) else _HOST_MEMORY
            return ApiError(507, message, code="out_of_memory", headers=once)
        case EngineFailure():  # logged once, by the service
            return ApiError(500, "the model failed; the server's log says why", code="model_failed")
    log.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed to answer; its log says why", code="internal_error")
