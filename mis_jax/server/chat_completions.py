"""POST /v1/chat/completions: reads, takes a place, prepares, answers whole or in a stream."""

import asyncio
import json
import logging
import secrets
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, aclosing, suppress

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from mis_jax.data.processor import Processor
from mis_jax.inference.async_engine import Service, Ticket
from mis_jax.inference.requests import RequestOutput, Token
from mis_jax.server.access import Settings
from mis_jax.server.bodies import Bodies
from mis_jax.server.inputs import ClientGone, ParsedRequest, Prompts
from mis_jax.server.metrics import CLIENT_GONE, Metrics
from mis_jax.server.protocol import (
    AnswerMessage,
    ApiError,
    ChatCompletion,
    ChatCompletionChunk,
    Choice,
    ChunkChoice,
    Delta,
    Logprobs,
    TokenLogprob,
    TopLogprob,
    Usage,
    as_api_error,
)
from mis_jax.tokenizer.tokenizer import Tokenizer

log = logging.getLogger(__name__)
KEEP_ALIVE_SECONDS = 15.0  # of silence in a stream; proxies cut connections off after 30 to 60
_LAST_WORD_SECONDS = 5.0  # for telling a client that may not be reading
_LEAST_LOGPROB = -9999.0  # JSON has no minus infinity
_START = "http.response.start"
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
]


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
        self._pool = ThreadPoolExecutor(settings.workers, thread_name_prefix="prompts")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = _Answer(self._settings.model, self._tokenizer, scope, receive, send)
        status = 200
        try:
            async with asyncio.timeout(self._settings.timeout):
                await self._handle(answer, scope, receive)
        except (ClientGone, ClientDisconnect):
            status = CLIENT_GONE
        except Exception as error:
            refusal = as_api_error(error, self._settings.timeout)
            # Its frames hold the body, and this one holds it: garbage that would wait for a
            # collection, tens of megabytes a request.
            error.__traceback__ = refusal.__traceback__ = None
            status = refusal.status
            await answer.refuse(refusal)
        self._metrics.ended(status, answer.seconds)
        log.info(
            "%s %d: %d + %d tokens, %.2f s",
            answer.id, status, answer.prompt_tokens, answer.generated, answer.seconds,
        )  # fmt: skip

    async def _handle(self, answer: "_Answer", scope: Scope, receive: Receive) -> None:
        self._service.check_open()  # a full server refuses before it reads
        with ExitStack() as ends:
            async with self._bodies.read(Request(scope, receive)) as body:
                ticket = self._service.reserve()
                ends.callback(ticket.cancel)
                gone = asyncio.create_task(_until_gone(receive))
                ends.callback(gone.cancel)
                ends.callback(self._bodies.give_back, len(body))
                parsed = await self._prepare(body, gone)
            answer.prompt_tokens = parsed.prompt_tokens
            self._metrics.prompt(parsed.prompt_tokens)
            async with aclosing(_outputs(ticket, parsed, gone)) as outputs:
                counted = self._counted(answer, outputs, timed=parsed.stream)
                await (answer.stream if parsed.stream else answer.complete)(parsed, counted)

    async def _prepare(self, body: bytearray, gone: asyncio.Task) -> ParsedRequest:
        """What is asked; ClientGone, and no more work, once the client has left."""
        bodies, abandoned = [body], threading.Event()

        def prepare() -> ParsedRequest:
            parsed = self._prompts(bodies.pop(), abandoned.is_set)
            self._service.check(parsed.request)
            return parsed

        work = asyncio.get_running_loop().run_in_executor(self._pool, prepare)
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                raise ClientGone
            return work.result()
        finally:
            # One that has not begun never will; it lies in the pool's queue until then.
            work.cancel()
            abandoned.set()
            bodies.clear()
            del work  # it holds the error whose frames hold it

    async def _counted(
        self, answer: "_Answer", outputs: AsyncIterator[RequestOutput | None], *, timed: bool
    ) -> AsyncIterator[RequestOutput | None]:
        async for output in outputs:
            if output is None:
                yield None
                continue
            if timed and not answer.generated:
                self._metrics.first_piece(answer.seconds)
            self._metrics.generated(output.generated - answer.generated)
            answer.generated = output.generated
            yield output


async def _until_gone(receive: Receive) -> None:
    """Returns when the client has closed its connection; its whole body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _outputs(
    ticket: Ticket, parsed: ParsedRequest, gone: asyncio.Task
) -> AsyncGenerator[RequestOutput | None]:
    """Starts the request and gives its pieces; raises what the service tells, or ClientGone.

    None is given where nothing has come for a while.
    Close it (`contextlib.aclosing`): that cancels a request whose answer is not wanted any more.
    """
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[RequestOutput | Exception] = asyncio.Queue()

    def leave(gone: asyncio.Task) -> None:
        queue.put_nowait(ClientGone())

    gone.add_done_callback(leave)
    try:
        ticket.start(parsed.request, lambda out: _hand_over(loop, queue, out))
        while True:
            try:
                async with asyncio.timeout(KEEP_ALIVE_SECONDS):  # wait_for loses a cancellation
                    output = await queue.get()
            except TimeoutError:
                yield None
                continue
            if isinstance(output, Exception):
                raise output
            yield output
            if output.finish_reason:
                return
    finally:
        gone.remove_done_callback(leave)
        ticket.cancel()


def _hand_over(loop: asyncio.AbstractEventLoop, queue: asyncio.Queue, output: object) -> None:
    loop.call_soon_threadsafe(queue.put_nowait, output)


class _Answer:
    """One answer: its documents as they are sent, and what the log and the metrics tell of it."""

    def __init__(
        self, model: str, tokenizer: Tokenizer, scope: Scope, receive: Receive, send: Send
    ):
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        self.prompt_tokens = 0
        self.generated = 0
        self._start = time.monotonic()
        self._model = model
        self._tokenizer = tokenizer
        self._scope, self._receive, self._raw_send = scope, receive, send
        self._responded = False  # the status has been sent
        self._streaming = False

    @property
    def seconds(self) -> float:
        """Since the request came."""
        return time.monotonic() - self._start

    async def complete(
        self, parsed: ParsedRequest, outputs: AsyncIterator[RequestOutput | None]
    ) -> None:
        """Send one document, once the answer has ended."""
        pieces = [output async for output in outputs if output is not None]
        reason = pieces[-1].finish_reason
        assert reason is not None
        choice = Choice(
            message=AnswerMessage(content="".join(piece.text for piece in pieces)),
            logprobs=self._logprobs(parsed, [t for piece in pieces for t in piece.tokens]),
            finish_reason=reason,
        )
        usage = Usage.of(self.prompt_tokens, self.generated)
        completion = ChatCompletion(id=self.id, model=self._model, choices=[choice], usage=usage)
        await JSONResponse(completion.model_dump())(self._scope, self._receive, self._send)

    async def stream(
        self, parsed: ParsedRequest, outputs: AsyncIterator[RequestOutput | None]
    ) -> None:
        """Send server-sent events as OpenAI's clients read them, one a piece.

        A comment where nothing comes for a while keeps proxies from cutting the connection off.
        """
        async for output in outputs:
            if not self._streaming:  # errors before the first event have a status of theirs
                self._streaming = True
                headers = [*_STREAM_HEADERS]
                await self._send({"type": _START, "status": 200, "headers": headers})
                await self._event([ChunkChoice(delta=Delta(role="assistant", content=""))])
            if output is None:
                await self._send_event(": waiting", more=True)
            elif output.text or output.tokens or output.finish_reason:
                delta = Delta(content=output.text) if output.text or output.tokens else Delta()
                logprobs = self._logprobs(parsed, output.tokens) if output.tokens else None
                reason = output.finish_reason
                choice = ChunkChoice(delta=delta, logprobs=logprobs, finish_reason=reason)
                await self._event([choice])
        if parsed.include_usage:
            await self._event([], Usage.of(self.prompt_tokens, self.generated))
        await self._send_body("[DONE]", more=False)

    async def refuse(self, error: ApiError) -> None:
        """Send an error in the answer's place, or as its last event.

        A stream that broke off has no `[DONE]`, so that nobody takes it as whole.
        """
        if self._streaming:
            with suppress(TimeoutError):
                async with asyncio.timeout(_LAST_WORD_SECONDS):
                    await self._send_body(json.dumps(error.body), more=False)
        elif not self._responded:
            await error.response()(self._scope, self._receive, self._send)

    async def _event(self, choices: list[ChunkChoice], usage: Usage | None = None) -> None:
        chunk = ChatCompletionChunk(id=self.id, model=self._model, choices=choices, usage=usage)
        await self._send_body(chunk.model_dump_json(), more=True)

    async def _send_body(self, document: str, *, more: bool) -> None:
        await self._send_event(f"data: {document}", more=more)

    async def _send_event(self, line: str, *, more: bool) -> None:
        body = f"{line}\n\n".encode()
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def _send(self, message: Message) -> None:
        if message["type"] == _START:
            self._responded = True
            message["headers"].append((b"x-request-id", self.id.encode()))
        await self._raw_send(message)

    def _logprobs(self, parsed: ParsedRequest, tokens: Iterable[Token]) -> Logprobs | None:
        if parsed.request.logprobs is None:
            return None
        content = []
        for token in tokens:
            assert token.logprob is not None
            top = [self._top(*alternative) for alternative in token.top]
            chosen = self._top(token.id, token.logprob)
            content.append(TokenLogprob(**chosen.model_dump(), top_logprobs=top))
        return Logprobs(content=content)

    def _top(self, token: int, logprob: float) -> TopLogprob:
        text = self._tokenizer.decode((token,), skip_special_tokens=False)
        whole = "\ufffd" not in text  # else the token is some bytes of a longer character
        return TopLogprob(
            token=text,
            logprob=max(float(logprob), _LEAST_LOGPROB),
            bytes=list(text.encode()) if whole else None,
        )
