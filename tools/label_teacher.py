"""Asks a teacher model behind an OpenAI-compatible endpoint, several samples at once."""

import asyncio
import base64
import io
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import openai
from label_prompt import is_harmless, is_refusal, request_text
from label_rows import Sample

from mis_jax.data.images import image_format, open_image

State = Literal["ok", "harmless", "refused", "truncated", "empty", "error"]
#: Codes with which servers decline a request by its content, beside finish_reason.
_FILTERED = {"content_filter", "content_policy_violation", "data_inspection_failed"}
_SENT_AS_IS = {"PNG", "JPEG", "WEBP"}
#: A client that is connecting may take a cancellation for a failure, and try again.
_CANCELS = 20
_ERRORS_IN_A_ROW = 20  # then the server is down and the rest need not wait for it


class Stopped(RuntimeError):
    """The server fails every request."""


@dataclass(frozen=True)
class Reply:
    """What came back for one sample.

    Attributes:
        state: `ok` and `harmless` are the teacher's answers, `refused` its refusal; `truncated`,
            `empty` and `error` are worth asking again.
        label: the text, which only in state `ok` is a label.
        error: in state `error`, the kind in a few words; `detail` is the server's own message.
    """

    state: State
    label: str = ""
    finish_reason: str = ""
    served_model: str = ""
    usage: dict[str, int] | None = None
    error: str = ""
    detail: str = ""


class Teacher:
    """One model at one address; use `async with`."""

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None,
        timeout: float,
        retries: int,
        limits: dict[str, Any],
    ):
        """timeout: seconds an attempt; limits: fields of the request such as `max_tokens`."""
        self._base_url, self._model, self._limits = base_url, model, limits
        # Never without a key: the client would send the one in OPENAI_API_KEY to any address.
        self._client = openai.AsyncOpenAI(
            base_url=base_url, api_key=api_key or "none", timeout=timeout, max_retries=retries
        )

    async def __aenter__(self) -> "Teacher":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def ask(self, sample: Sample) -> Reply:
        """The reply to one sample; ValueError when the server knows neither key nor model."""
        try:
            urls = [await asyncio.to_thread(data_url, path) for path in sample.paths]
        except (ValueError, OSError) as error:
            return Reply("error", error="picture", detail=str(error))
        try:
            pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
            text = {"type": "text", "text": request_text(sample.question)}
            messages: Any = [{"role": "user", "content": [*pictures, text]}]
            completion = await self._client.chat.completions.create(
                model=self._model, messages=messages, **self._limits
            )
            return _read(completion)
        except openai.AuthenticationError:
            raise ValueError(
                f"{self._base_url}: the server refuses the key (HTTP 401); name the environment "
                "variable that holds a valid one with --api-key-env"
            ) from None
        except openai.NotFoundError:
            raise ValueError(
                f"{self._base_url}: no chat endpoint or no model {self._model!r} there (HTTP 404); "
                "check --base-url, which mostly ends in /v1, and --model"
            ) from None
        except openai.APIStatusError as error:
            detail = error.message[:500]
            if error.code in _FILTERED:
                return Reply("refused", finish_reason="content_filter", detail=detail)
            return Reply("error", error=f"HTTP {error.status_code}", detail=detail)
        except openai.APITimeoutError:
            return Reply("error", error="timeout")
        except (openai.OpenAIError, ValueError, OSError) as error:
            kind = type(error).__name__
            return Reply("error", error=kind, detail=str(error)[:500])


def data_url(path: Path) -> str:
    """A picture for the request: its own bytes, or PNG where servers do not know its format.

    ValueError when it is damaged: a server may answer about half a picture without a word.
    """
    content = path.read_bytes()
    image = open_image(io.BytesIO(content), name=str(path))
    kind = image_format(io.BytesIO(content), name=str(path))
    if kind not in _SENT_AS_IS:
        stream, kind = io.BytesIO(), "PNG"
        image.save(stream, kind)
        content = stream.getvalue()
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content).decode('ascii')}"


def _read(completion: Any) -> Reply:
    """Sort a reply; servers leave out what the client's types promise, so nothing is assumed."""
    choices = getattr(completion, "choices", None)
    if not choices or choices[0].message is None:
        return Reply("error", error="no chat completion", detail=str(completion)[:500])
    message, finish = choices[0].message, choices[0].finish_reason or ""
    content = message.content if isinstance(message.content, str) else ""
    refusal = getattr(message, "refusal", None)
    text = _clean(content or refusal or "")
    usage = completion.usage.model_dump() if completion.usage else {}
    state: State = "ok"
    if refusal or finish == "content_filter":
        state = "refused"
    elif finish == "length":
        state = "truncated"
    elif not text:
        state = "empty"
    elif is_harmless(text):
        state = "harmless"
    elif is_refusal(text):
        state = "refused"
    counts = {name: value for name, value in usage.items() if isinstance(value, int)}
    return Reply(state, text, finish, completion.model or "", counts or None)


def _clean(text: str) -> str:
    """Text that a CSV file and back leaves as it is: one kind of line end, no lone surrogates."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").strip()
    return text.encode("utf-8", "replace").decode("utf-8")


async def ask_all(
    samples: Sequence[Sample],
    ask: Callable[[Sample], Awaitable[Reply]],
    record: Callable[[Sample, Reply], None],
    concurrency: int,
) -> None:
    """Ask `concurrency` samples at a time and record each reply as it comes.

    Raises Stopped after many errors in a row. Whatever ends it, no reply that came is unrecorded.
    """
    queue, failed = iter(samples), 0

    async def work() -> None:
        nonlocal failed
        for sample in queue:
            reply = await ask(sample)
            record(sample, reply)
            failed = failed + 1 if reply.state == "error" else 0
            if failed >= _ERRORS_IN_A_ROW:
                raise Stopped(f"{failed} errors in a row, the last: {reply.error}")

    tasks = [asyncio.create_task(work()) for _ in range(concurrency)]
    try:
        finished, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for _ in range(_CANCELS):
            if not (running := [task for task in tasks if not task.done()]):
                break
            for task in running:
                task.cancel()
            await asyncio.wait(running, timeout=0.5)
    for task in finished:
        task.result()
