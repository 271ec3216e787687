"""The documents of the chat completions API: what is accepted, what is answered, and errors.

Fields that the server does not know are refused, as OpenAI does: a setting that is ignored in
silence makes wrong measurements. Fields that have no influence on the answer are accepted, and so
are unknown ones that hold nothing: clients send back the answers that they were given as they are.
"""

import logging
import time
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError, from_json
from pydantic_core.core_schema import no_info_after_validator_function
from starlette.responses import JSONResponse

from mis_jax.inference.async_engine import Busy, EngineFailure, Unavailable
from mis_jax.inference.memory import OutOfMemory
from mis_jax.inference.requests import MAX_TOP_LOGPROBS, FinishReason

log = logging.getLogger(__name__)
MAX_STOP_STRINGS = 4
MAX_STOP_CHARACTERS = 1024  # an answer is searched for them with every piece
MAX_TILES_PER_IMAGE = 40  # the most that InternVL's own settings use; a grid is searched up to it
RETRY_SECONDS = 1  # what a refused client is asked to wait
_HOST_MEMORY = "the request needs more memory than this server has; send fewer or smaller images"
_EMPTY = (None, "", [], {})
_MOST_CHARACTERS = 1000  # of what an error repeats: a client's own megabytes are not sent back


class _RequestPart(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, value: Any) -> Any:
        if not isinstance(value, dict) or value.keys() <= cls.model_fields.keys():
            return value
        known = cls.model_fields
        return {key: v for key, v in value.items() if key in known or v not in _EMPTY}


class _Only:
    """Marks a field of OpenAI's that must be left out, or as if it were."""

    def __init__(self, *accepted: Any):
        self._accepted = accepted

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        return {"enum": list(self._accepted)}

    def _check(self, value: Any) -> Any:
        if value not in self._accepted:
            raise ValueError("is not supported by this server; leave it out")
        return value


_Unsupported = Annotated[Any, _Only(None, [], {})]
_Tiles = Annotated[int | None, Field(ge=1, le=MAX_TILES_PER_IMAGE)]


class TextPart(_RequestPart):
    """A stretch of text."""

    type: Literal["text"]
    text: str


class ImageUrl(_RequestPart):
    """Where an image is: a data URI, or a file below the folder that the server allows."""

    url: str
    detail: Literal["auto", "low", "high", "original"] | None = Field(
        None, description="Accepted and ignored; see max_dynamic_patch."
    )
    max_dynamic_patch: _Tiles = Field(None, description="Of this image; wins over the request's.")


class ImagePart(_RequestPart):
    """An image, where it stands among the text."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Discriminator("type")]


def _kind_of(content: Any) -> str:
    return "text" if isinstance(content, str) else "parts"


class Message(_RequestPart):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: (
        Annotated[
            Annotated[str, Tag("text")] | Annotated[list[Part], Tag("parts")],
            Discriminator(_kind_of),
        ]
        | None
    ) = Field(None, validate_default=True, description="null in an assistant's message alone.")
    name: str | None = Field(None, description="Accepted and ignored.")

    @field_validator("content")
    @classmethod
    def _check_content(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None and info.data.get("role", "assistant") != "assistant":
            raise PydanticCustomError("missing", "is missing; give a text or a list of parts")
        return value


class StreamOptions(_RequestPart):
    """How an answer is streamed."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # has no influence


_Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]


class ChatRequest(_RequestPart):
    """The body of POST /v1/chat/completions."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2, allow_inf_nan=False)] = Field(
        None, description="0, which is greedy, where it is left out."
    )
    top_p: Annotated[float | None, Field(ge=0, le=1, allow_inf_nan=False)] = Field(
        None, description="0 is greedy."
    )
    top_k: Annotated[int | None, Field(ge=-1)] = Field(None, description="0 or -1 is off.")
    seed: int | None = None
    stop: (
        Annotated[
            Annotated[_Stop, Tag("text")]
            | Annotated[list[_Stop], Field(max_length=MAX_STOP_STRINGS), Tag("parts")],
            Discriminator(_kind_of),
        ]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=MAX_TOP_LOGPROBS)] = None
    n: Annotated[int | None, Field(ge=1, le=1)] = None
    max_dynamic_patch: _Tiles = Field(
        None, description="Largest grid of every image, in tiles; a thumbnail comes on top."
    )
    system_prompt: str | None = Field(
        None,
        description='"default" for the checkpoint\'s own, "none" or "off" for no system turn, or '
        "the text. A system message wins over it.",
    )
    continue_final_message: bool | None = Field(
        None,
        description="Continue the last message, which is the assistant's; with "
        "add_generation_prompt false, as vLLM wants it.",
    )
    add_generation_prompt: bool | None = None

    # Accepted where they ask for nothing.
    frequency_penalty: Annotated[float | None, _Only(None, 0)] = None
    presence_penalty: Annotated[float | None, _Only(None, 0)] = None
    repetition_penalty: Annotated[float | None, _Only(None, 1)] = None
    length_penalty: Annotated[float | None, _Only(None, 1)] = None
    min_p: Annotated[float | None, _Only(None, 0)] = None
    min_tokens: Annotated[int | None, _Only(None, 0)] = None
    best_of: Annotated[int | None, _Only(None, 1)] = None
    use_beam_search: Annotated[bool | None, _Only(None, False)] = None
    ignore_eos: Annotated[bool | None, _Only(None, False)] = None
    skip_special_tokens: Annotated[bool | None, _Only(None, True)] = None
    echo: Annotated[bool | None, _Only(None, False)] = None
    verbosity: Annotated[Any, _Only(None, "medium")] = None
    response_format: Annotated[Any, _Only(None, {"type": "text"})] = None
    modalities: Annotated[Any, _Only(None, ["text"])] = None
    tool_choice: Annotated[Any, _Only(None, "none", "auto")] = None
    function_call: Annotated[Any, _Only(None, "none", "auto")] = None
    tools: _Unsupported = None
    functions: _Unsupported = None
    logit_bias: _Unsupported = None
    audio: _Unsupported = None
    prediction: _Unsupported = None
    reasoning_effort: Annotated[Any, _Only(None, "none")] = None
    web_search_options: _Unsupported = None

    # Without influence on an answer here.
    user: str | None = None
    metadata: Any = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    parallel_tool_calls: bool | None = None


def parse(body: bytes | bytearray) -> Any:
    """The document in a body; ApiError 400 for what is no JSON."""
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise bad_request(f"the body is not valid JSON ({error})", code="invalid_json") from None


def count_parts(content: Any) -> int:
    """Turns and their parts in a document that may be no request at all."""
    messages = content.get("messages") if isinstance(content, dict) else None
    if not isinstance(messages, list):
        return 0
    parts = (m["content"] for m in messages if isinstance(m, dict) and "content" in m)
    return len(messages) + sum(len(part) for part in parts if isinstance(part, list))


def checked(content: Any) -> ChatRequest:
    """The request that a document is; ApiError 400 for what does not fit."""
    try:
        return ChatRequest.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = _place(first["loc"], content, missing=first["type"] == "missing")
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = "this server does not know this field; leave it out"
        raise bad_request(f"{where}: {message}" if where else message, where or None) from None


def _place(steps: tuple[int | str, ...], content: Any, *, missing: bool) -> str:
    """`messages[0].content[1].text`: pydantic's path without the names of its alternatives.

    An alternative can bear the name of a field beside the one meant: `text` and `cache_control` of
    a part of text. So the longest path counts, to a field that is there unless it is `missing`.
    """
    return "".join(_longest_path(steps, content, missing)).removeprefix(".")


def _longest_path(steps: tuple[int | str, ...], node: Any, missing: bool) -> list[str]:
    if not steps:
        return []
    step, rest = steps[0], steps[1:]
    path: list[str] = []
    if isinstance(step, int) and isinstance(node, list) and step < len(node):
        path = [f"[{step}]", *_longest_path(rest, node[step], missing)]
    elif isinstance(node, dict) and (step in node or (missing and not rest)):
        path = [f".{step}", *_longest_path(rest, node.get(step), missing)]
    return max(_longest_path(rest, node, missing), path, key=len)


# Answers


class TopLogprob(BaseModel):
    """A token that might have come; `bytes` is null for a part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A token of the answer."""

    top_logprobs: list[TopLogprob]


class Logprobs(BaseModel):
    """Of every token of the answer, or of a chunk of it."""

    content: list[TokenLogprob]
    refusal: None = None


class Usage(BaseModel):
    """Tokens; those of images count as prompt."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, prompt: int, completion: int) -> "Usage":
        return cls(
            prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion
        )


class AnswerMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    """The one answer of a completion."""

    index: int = 0
    message: AnswerMessage
    logprobs: Logprobs | None
    finish_reason: FinishReason


def _now() -> int:
    return int(time.time())


class _Answer(BaseModel):
    id: str
    created: int = Field(default_factory=_now)
    model: str
    system_fingerprint: None = None


class ChatCompletion(_Answer):
    """An answer as a whole."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[Choice]
    usage: Usage


def _absent(value: Any) -> bool:
    return value is None


class Delta(BaseModel):
    """What an answer grew by."""

    role: Literal["assistant"] | None = Field(default=None, exclude_if=_absent)
    content: str | None = Field(default=None, exclude_if=_absent)


class ChunkChoice(BaseModel):
    """The one answer in a chunk."""

    index: int = 0
    delta: Delta
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None


class ChatCompletionChunk(_Answer):
    """One event of a stream; `usage` comes with the last where it was asked for."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChunkChoice]
    usage: Usage | None = None


class Model(BaseModel):
    """The model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(default_factory=_now)
    owned_by: str = "mis-jax"


class Models(BaseModel):
    """A list of one."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """Whether requests are taken, and how many there are; busy is alive, and answers 429 now."""

    status: Literal["ok", "busy", "unavailable"]
    reason: str = ""
    running: int
    waiting: int


# Errors


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """OpenAI's shape of an error."""

    error: ErrorDetail


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
        error = ErrorDetail(message=self.message, type=kind, param=self.param, code=self.code)
        return Error(error=error).model_dump()

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
