"""POST /v1/chat/completions: reads, takes a place, prepares, answers whole or in a stream."""

import asyncio
import logging
import secrets
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, field

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from mis_jax.data.processor import Processor
from mis_jax.inference.async_engine import Service, Ticket
from mis_jax.inference.requests import RequestOutput
from mis_jax.server.bodies import Bodies
from mis_jax.server.engine_stream import ClientGone, pieces, until_gone
from mis_jax.server.errors import as_api_error
from mis_jax.server.inputs import ParsedRequest, Prompts
from mis_jax.server.metrics import CLIENT_GONE, Metrics
from mis_jax.server.response_builder import Writer
from mis_jax.server.settings import Settings
from mis_jax.server.sse import EventStream
from mis_jax.server.trimming import LARGE, Trimmer

log = logging.getLogger(__name__)


@dataclass
class _Course:
    """How one request goes; what the log and the metrics tell of it."""

    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    began: float = field(default_factory=time.monotonic)
    responded: bool = False  # the status has been sent
    stream: EventStream | None = None
    prompt_tokens: int = 0
    generated: int = 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began


class ChatCompletions:
    """The endpoint, as an ASGI application."""

    def __init__(
        self, service: Service, processor: Processor, settings: Settings, metrics: Metrics
    ):
        self._service = service
        self._tokenizer = processor.tokenizer
        self._settings = settings
        self._metrics = metrics
        self._prompts = Prompts(processor, settings)
        self._bodies = Bodies(settings.max_body, settings.max_body * service.places)
        self._trimmer = Trimmer()
        self._pool = ThreadPoolExecutor(settings.workers, thread_name_prefix="prompts")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        course = _Course()

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                course.responded = True
                message["headers"].append((b"x-request-id", course.id.encode()))
            await send(message)

        status = 200
        try:
            async with asyncio.timeout(self._settings.timeout):
                await self._answer(course, scope, receive, named)
        except (ClientGone, ClientDisconnect):
            status = CLIENT_GONE
        except Exception as error:
            refusal = as_api_error(error, self._settings.timeout)
            # Its frames hold the body, and this one holds it: garbage that would wait for a
            # collection, tens of megabytes a request.
            error.__traceback__ = refusal.__traceback__ = None
            status = refusal.status
            if not course.responded:
                await refusal.response()(scope, receive, named)
            elif course.stream is not None:
                await course.stream.fail(refusal)
        self._metrics.ended(status, course.seconds)
        log.info(
            "%s %d: %d + %d tokens, %.2f s",
            course.id, status, course.prompt_tokens, course.generated, course.seconds,
        )  # fmt: skip

    async def _answer(self, course: _Course, scope: Scope, receive: Receive, send: Send) -> None:
        self._service.check_open()  # a full server refuses before it reads
        with ExitStack() as ends:
            async with self._bodies.read(Request(scope, receive)) as body:
                ticket = self._service.reserve()
                ends.callback(ticket.cancel)
                gone = asyncio.create_task(until_gone(receive))
                ends.callback(gone.cancel)
                if len(body) > LARGE:
                    ends.callback(self._trimmer.ask)
                asked = await self._prepared(body, gone)
            course.prompt_tokens = asked.prompt_tokens
            self._metrics.prompt(asked.prompt_tokens)
            await self._generate(course, asked, ticket, gone, scope, receive, send)

    async def _prepared(self, body: bytearray, gone: asyncio.Task) -> ParsedRequest:
        """What is asked; ClientGone, and no more work, once the client has left."""
        bodies, left = [body], threading.Event()

        def prepare() -> ParsedRequest:
            asked = self._prompts(bodies.pop(), left.is_set)
            self._service.check(asked.request)
            return asked

        work = asyncio.get_running_loop().run_in_executor(self._pool, prepare)
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                raise ClientGone
            return work.result()
        finally:
            # One that has not begun never will; it lies in the pool's queue until then.
            work.cancel()
            left.set()
            bodies.clear()
            del work  # it holds the error whose frames hold it

    async def _generate(
        self, course: _Course, asked: ParsedRequest, ticket: Ticket, gone: asyncio.Task,
        scope: Scope, receive: Receive, send: Send,
    ) -> None:  # fmt: skip
        writer = Writer(
            course.id, self._settings.model, self._tokenizer, asked.prompt_tokens,
            logprobs=asked.request.logprobs is not None,
        )  # fmt: skip
        async with aclosing(pieces(ticket, asked.request, gone)) as answer:
            counted = self._counted(course, answer, timed=asked.stream)
            if not asked.stream:
                completion = await writer.whole(counted)
                await JSONResponse(completion.model_dump())(scope, receive, send)
                return
            async for piece in counted:
                if course.stream is None:  # errors before the first piece have a status of theirs
                    course.stream = EventStream(send)
                    await course.stream.open()
                    await course.stream.event(writer.opening().model_dump_json())
                if piece.text or piece.tokens or piece.finish_reason:
                    await course.stream.event(writer.chunk(piece).model_dump_json())
        assert course.stream is not None
        if asked.include_usage:
            await course.stream.event(writer.usage(course.generated).model_dump_json())
        await course.stream.end()

    async def _counted(
        self, course: _Course, answer: AsyncIterator[RequestOutput], *, timed: bool
    ) -> AsyncIterator[RequestOutput]:
        async for piece in answer:
            if timed and not course.generated:
                self._metrics.first_piece(course.seconds)
            self._metrics.generated(piece.generated - course.generated)
            course.generated = piece.generated
            yield piece
