"""A client of OpenAI-compatible chat endpoints: many requests at once, patient, within a budget.

What can pass by itself is tried again: 408, 409, 425, 429, 5xx, timeouts, lost connections and
replies that are no chat completion. `Retry-After` holds back every request, not only the one
that was told. All attempts count as calls.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal, TypeVar

from mis_jax.evals.async_map import Groups, Stopped, as_they_come
from mis_jax.tokenizer.tokenizer import whole_text

T = TypeVar("T")
Fields = dict[str, Any]

FILTERED = {"content_filter", "content_policy_violation", "data_inspection_failed"}
"""Codes with which servers decline a request for its content."""
_RETRIED = {408, 409, 425, 429}
_OF_THE_SERVER = {401, 403, 404, *_RETRIED}
"""Statuses below 500 that tell of the server, the key or the model and not of one request."""
_LONGEST_BACKOFF = 30.0
_LONGEST_WAIT = 600.0  # a server that asks for more is as good as down
_ERRORS_IN_A_ROW = 20  # then the server is down and the rest need not wait for it
_REASONING = ("reasoning_content", "reasoning")  # the name depends on the server


def _whole(value: Any) -> Any:
    """The fields of a request without half surrogate pairs, which no HTTP body can carry."""
    if isinstance(value, str):
        return whole_text(value)
    if isinstance(value, dict):
        return {name: _whole(item) for name, item in value.items()}
    return [_whole(item) for item in value] if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class Reply:
    """What came back for one request.

    `refused` is a refusal that the server marks as such; `error` is no reply at all.
    `reasoning` is what servers of reasoning models send apart from the answer. `status` is the
    HTTP status of an error, `parameter` the field that it names, `wait` the server's Retry-After;
    `passing` errors are worth another try, and `lost` tells those that never reached the server.
    """

    state: Literal["ok", "refused", "error"]
    text: str = ""
    reasoning: str = ""
    finish_reason: str = ""
    served_model: str = ""
    usage: dict[str, int] = field(default_factory=dict)
    detail: str = ""
    status: int | None = None
    parameter: str | None = None
    wait: float | None = None
    passing: bool = False
    lost: bool = False


@dataclass(frozen=True)
class Patience:
    """How often a request is tried again, and how long is waited: doubled every time."""

    retries: int = 6
    backoff: float = 1.0
    timeout: float = 120.0


class ChatClient:
    """One model at one address. Its calls, its pace and its luck are counted over all uses."""

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        concurrency: int = 8,
        requests_per_minute: float | None = None,
        max_calls: int | None = None,
        patience: Patience = Patience(),
    ) -> None:
        """ValueError for the extra that is missing and for numbers that make no sense."""
        try:
            import openai  # noqa: F401
        except ImportError as error:
            raise ValueError(
                f"{error}; endpoints need the extra 'eval': pip install 'mis-jax[eval]'"
            ) from None
        for option, number in (
            ("--concurrency", concurrency),
            ("--requests-per-minute", requests_per_minute),
            ("--max-calls", max_calls),
        ):
            if number is not None and not 0 < number < float("inf"):
                raise ValueError(f"{option} is {number}; give a number above 0")
        self.base_url, self.model, self.concurrency = base_url.rstrip("/"), model, concurrency
        self.calls = 0
        self.seconds_a_call = 0.0
        self.requests_per_minute = requests_per_minute
        self._key, self._patience = api_key, patience
        self._max_calls = max_calls
        self._next_call = 0.0
        self._errors, self._trouble = 0, ""
        self._heard = False
        self._closed = False

    def pace(self) -> float:
        """Seconds from one reply to the next, as far as the calls so far tell."""
        slowest = 60 / self.requests_per_minute if self.requests_per_minute else 0.0
        return max(self.seconds_a_call / self.concurrency, slowest)

    def many(self, items: Sequence[T], build: Callable[[T], Fields]) -> Groups[Reply]:
        """A reply to each item, as they come; `build` makes the fields of its request.

        An item for which `build` raises ValueError or OSError has a reply in state `error`.
        Raises Stopped when the calls are used up, or when the server fails again and again.
        """
        return as_they_come(self._opened(build), items, self.concurrency)

    def one(self, fields: Fields) -> Reply:
        """The reply to one request."""
        ((_, reply),) = [pair for group in self.many([fields], lambda f: f) for pair in group]
        return reply

    def owners(self) -> dict[str, str] | None:
        """Who owns each model that the endpoint lists; None where it has no list.

        ValueError when it cannot be reached or refuses the key.
        """
        import openai

        with openai.OpenAI(
            base_url=self.base_url,
            api_key=self._key or "none",
            timeout=self._patience.timeout,
            max_retries=min(self._patience.retries, 2),
        ) as client:
            try:
                listed = client.models.list().data
                return {model.id: str(model.owned_by) for model in listed}
            except openai.NotFoundError:
                return None
            except openai.APIStatusError as error:
                failed = _of_status(error)
            except openai.OpenAIError as error:
                failed = Reply("error", detail=_cause(error))
            except (ValueError, TypeError, AttributeError):  # a page that is no list
                return None
        raise ValueError(self.explained(failed))

    def only_model(self, option: str) -> str:
        """The one model that the endpoint lists; ValueError where it lists none or several."""
        listed = list(self.owners() or ())
        if len(listed) == 1:
            return listed[0]
        models = f"it lists {', '.join(listed[:8])}" if listed else "it lists none"
        raise ValueError(
            f"{self.base_url}: say with {option} NAME which of its models is meant ({models})"
        )

    def explained(self, failed: Reply) -> str:
        """One line for a user about a reply in state `error`."""
        if failed.status in (401, 403):
            reason = (
                f"the server refuses the key (HTTP {failed.status}); name the environment variable "
                "that holds a valid one"
            )
        elif failed.status == 404:
            reason = (
                f"no chat endpoint or no model {self.model!r} there (HTTP 404: {failed.detail}); "
                "check the address, which mostly ends in /v1, and the model's name"
            )
        elif failed.status is not None:
            reason = f"HTTP {failed.status}: {failed.detail}"
        else:
            reason = f"no answer ({failed.detail}); check the address and that the server runs"
        return f"{self.base_url}: {reason}"

    @asynccontextmanager
    async def _opened(
        self, build: Callable[[T], Fields]
    ) -> AsyncIterator[Callable[[T], Awaitable[Reply]]]:
        import openai

        # Never without a key: the client would send the one in OPENAI_API_KEY to any address.
        client = openai.AsyncOpenAI(
            base_url=self.base_url,
            api_key=self._key or "none",
            timeout=self._patience.timeout,
            max_retries=0,
        )
        self._closed = False

        async def ask(item: T) -> Reply:
            try:
                fields = _whole(await asyncio.to_thread(build, item))
            except (ValueError, OSError) as error:
                return Reply("error", detail=str(error))
            return await self._patiently(client, fields)

        try:
            yield ask
        finally:
            # A client that is connecting may take a cancellation for a failure.
            self._closed = True
            await client.close()

    async def _patiently(self, client: Any, fields: Fields) -> Reply:
        for attempt in range(self._patience.retries + 1):
            await self._turn()
            began = time.monotonic()
            reply = await self._attempt(client, fields)
            if reply.lost and not self._heard:
                break  # a wrong address does not pass by itself
            self._heard = self._heard or not reply.lost
            if not reply.passing:
                self.seconds_a_call = time.monotonic() - began
                break
            wait = reply.wait
            if wait is not None and wait > _LONGEST_WAIT:
                break
            if wait is not None:
                self._next_call = max(self._next_call, time.monotonic() + wait)
            elif attempt < self._patience.retries:
                longest = min(self._patience.backoff * 2**attempt, _LONGEST_BACKOFF)
                await asyncio.sleep(longest * random.uniform(0.5, 1.0))
        self._note(reply)
        return reply

    async def _turn(self) -> None:
        """Wait until a request may be sent, and count it."""
        while (wait := self._next_call - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        if self._closed:
            raise Stopped("the client is closed")
        if self._errors >= _ERRORS_IN_A_ROW:
            raise Stopped(f"{self._errors} requests in a row failed; the last: {self._trouble}")
        if self._max_calls is not None and self.calls >= self._max_calls:
            raise Stopped(f"the {self._max_calls} calls of --max-calls are used up")
        self.calls += 1
        if self.requests_per_minute:
            self._next_call = time.monotonic() + 60 / self.requests_per_minute

    def _note(self, reply: Reply) -> None:
        if reply.state != "error":
            self._errors = 0
        elif reply.passing or reply.status in _OF_THE_SERVER:
            self._errors += 1
            self._trouble = self.explained(reply)

    async def _attempt(self, client: Any, fields: Fields) -> Reply:
        import openai

        try:
            completion = await client.chat.completions.create(model=self.model, **fields)
        except openai.APIStatusError as error:
            return _of_status(error)
        except openai.APITimeoutError:
            seconds = f"{self._patience.timeout:g}"
            return Reply("error", detail=f"timeout after {seconds} s", passing=True)
        except openai.APIConnectionError as error:
            return Reply("error", detail=_cause(error), passing=True, lost=True)
        except (openai.OpenAIError, ValueError, OSError, RecursionError) as error:
            return Reply("error", detail=_cause(error), passing=True)
        return _read(completion)


def _read(completion: Any) -> Reply:
    """Sort a reply. The client does not check what servers send, so nothing is taken for given."""
    choices = getattr(completion, "choices", None)
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = getattr(choice, "message", None)
    if message is None or not hasattr(message, "content"):
        shown = str(completion)[:200]
        return Reply("error", detail=f"no chat completion but {shown!r}", passing=True)
    content, refusal, finish, model, *reasoning = (
        value if isinstance(value, str) else ""
        for value in (
            message.content,
            getattr(message, "refusal", None),
            getattr(choice, "finish_reason", None),
            getattr(completion, "model", None),
            *(getattr(message, name, None) for name in _REASONING),
        )
    )
    counts = {
        name: getattr(getattr(completion, "usage", None), name, None)
        for name in ("prompt_tokens", "completion_tokens")
    }
    return Reply(
        "refused" if refusal or finish == "content_filter" else "ok",
        content or refusal,
        next(filter(None, reasoning), ""),
        finish,
        model,
        {name: count for name, count in counts.items() if isinstance(count, int)},
    )


def _of_status(error: Any) -> Reply:
    """The reply in an HTTP error."""
    body = error.body if isinstance(error.body, dict) else {}
    detail = " ".join(str(body.get("message") or error.message).split())[:300]
    if error.code in FILTERED:
        return Reply("refused", finish_reason="content_filter", detail=detail)
    passing = error.status_code in _RETRIED or error.status_code in (500, *range(502, 600))
    return Reply(
        "error",
        detail=detail,
        status=error.status_code,
        parameter=error.param,
        wait=_retry_after(error.response.headers.get("retry-after")) if passing else None,
        passing=passing,
    )


def _retry_after(value: str | None) -> float | None:
    """Seconds to wait, from a number or a date."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        then = parsedate_to_datetime(value)
    except (ValueError, TypeError, OverflowError):
        return None
    if then.tzinfo is None:
        then = then.replace(tzinfo=UTC)
    return max(0.0, (then - datetime.now(UTC)).total_seconds())


def _cause(error: BaseException) -> str:
    """What lies behind an error, such as 'Connection refused' behind 'Connection error.'."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
