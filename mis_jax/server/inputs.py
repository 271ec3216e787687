"""A request's body -> what the engine is asked. Runs in threads, never on the event loop."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mis_jax.data.processor import Processor
from mis_jax.inference.requests import Request
from mis_jax.inference.sampling import Sampling
from mis_jax.server import images, schemas
from mis_jax.server.engine_stream import ClientGone
from mis_jax.server.errors import ApiError, bad_request
from mis_jax.server.settings import Settings

_GREEDY_BELOW = 1e-4  # a temperature that float32 arithmetic would turn into noise
# Tokens of ordinary text are far shorter; refusing here keeps megabytes from the tokenizer, and
# JSON that is all brackets and commas from a parser that holds the whole process up.
_CHARACTERS_PER_TOKEN = 64
_MARKS_PER_TOKEN = 16
_FEW_MARKS = 500_000
_TOKENS_PER_TURN = 3  # its two control tokens and its role


@dataclass(frozen=True)
class ParsedRequest:
    """A request that the engine can take, and how its answer is wanted."""

    request: Request
    stream: bool
    include_usage: bool

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.example.input_ids)


class Prompts:
    """Makes `Asked` out of bodies, for one model."""

    def __init__(self, processor: Processor, settings: Settings):
        self._processor = processor
        self._settings = settings

    def __call__(
        self, body: bytes | bytearray, gone: Callable[[], bool] = lambda: False
    ) -> ParsedRequest:
        """ApiError 400 or 404 for whatever is wrong with it.

        `gone` is asked before every costly part; where it is true, ClientGone is raised.
        """
        _stop_if(gone())
        marks = sum(map(body.count, (b"[", b"{", b",")))
        if marks > _FEW_MARKS:
            self._check_length(marks // _MARKS_PER_TOKEN)
        content = schemas.parse(body)
        self._check_length(schemas.count_parts(content))
        asked = schemas.checked(content)
        if asked.model != self._settings.model:
            raise ApiError(
                404,
                f"the model {asked.model!r} does not exist here; this server has "
                f"{self._settings.model!r}",
                param="model",
                code="model_not_found",
            )
        if asked.top_logprobs and not asked.logprobs:
            raise bad_request("top_logprobs needs logprobs to be true", "top_logprobs")
        if asked.stream_options and not asked.stream:
            raise bad_request("stream_options needs stream to be true", "stream_options")
        example = self._example(asked, gone)
        request = Request(
            example,
            max_new_tokens=self._max_new_tokens(asked, len(example.input_ids)),
            sampling=self._sampling(asked),
            stop=_stop(asked),
            logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
            streamed=bool(asked.stream),
        )
        options = asked.stream_options
        return ParsedRequest(request, bool(asked.stream), bool(options and options.include_usage))

    def _example(self, asked: schemas.ChatRequest, gone: Callable[[], bool]) -> Any:
        self._check_text(asked)
        messages, urls = _conversation(asked.messages)
        processor, settings = self._processor, self._settings
        sources = images.sources_of(urls, settings.image_folder)
        per_tile = processor.config.tokens_per_tile
        self._check_length(len(sources) * per_tile)
        sizes = images.sizes_of(urls, sources, settings.max_pixels)
        budget = processor.budget(len(sizes), max_tiles_per_image=asked.max_dynamic_patch)
        self._check_length(sum(processor.tile_count(size, budget) for size in sizes) * per_tile)
        system = asked.system_prompt or "default"
        _stop_if(gone())
        try:
            return processor.example(
                messages,
                images.decoded(urls, sources),
                system="none" if system == "off" else system,
                max_tiles_per_image=asked.max_dynamic_patch,
            )
        except ValueError as error:
            raise bad_request(str(error), "messages") from None

    def _check_text(self, asked: schemas.ChatRequest) -> None:
        """The one bound of everything that becomes tokens or is compared with them."""
        characters = sum(map(len, [asked.system_prompt or "", *_stop(asked)]))
        for message in asked.messages:
            content = message.content
            if isinstance(content, str):
                characters += len(content)
            else:
                characters += sum(len(p.text) for p in content if isinstance(p, schemas.TextPart))
        turns = _TOKENS_PER_TURN * len(asked.messages)
        self._check_length(turns + characters // _CHARACTERS_PER_TOKEN)

    def _check_length(self, tokens: int) -> None:
        context = self._settings.context
        if tokens >= context:
            raise bad_request(
                f"the prompt has {tokens} tokens or more; the model's context is {context}: "
                "shorten it, or send fewer turns, fewer or smaller images",
                "messages",
                "context_length_exceeded",
            )

    def _max_new_tokens(self, asked: schemas.ChatRequest, prompt: int) -> int:
        self._check_length(prompt)
        context = self._settings.context
        left = context - prompt
        wanted = asked.max_completion_tokens or asked.max_tokens
        if wanted is None:
            return min(self._settings.max_new_tokens, left)
        if wanted > left:
            name = "max_completion_tokens" if asked.max_completion_tokens else "max_tokens"
            raise bad_request(
                f"{name} is {wanted}, but beside the {prompt} tokens of the prompt the model's "
                f"context of {context} leaves {left}; lower it",
                name,
                "context_length_exceeded",
            )
        return wanted

    def _sampling(self, asked: schemas.ChatRequest) -> Sampling:
        temperature = asked.temperature or 0.0
        return Sampling(
            temperature=temperature if temperature >= _GREEDY_BELOW else 0.0,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            top_k=min(max(asked.top_k or 0, 0), self._processor.config.text.vocab_size),
            seed=secrets.randbits(32) if asked.seed is None else asked.seed % 2**32,
        )


def _stop_if(gone: bool) -> None:
    if gone:
        raise ClientGone


def _stop(asked: schemas.ChatRequest) -> tuple[str, ...]:
    if asked.stop is None:
        return ()
    return (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop)


def _conversation(
    messages: list[schemas.Message],
) -> tuple[list[dict[str, Any]], list[images.NamedUrl]]:
    """The processor's messages, and the images in their order.

    All text goes in as parts, in which nothing is an image marker, and parts of text that follow
    one another as one: the template joins them one by one, which is quadratic.
    """
    turns: list[dict[str, Any]] = []
    urls: list[images.NamedUrl] = []
    for number, message in enumerate(messages):
        parts: list[dict[str, str]] = []
        text: list[str] = []
        where = f"messages[{number}].content"
        content = message.content
        if isinstance(content, str):
            content = [schemas.TextPart(type="text", text=content)]
        for place, part in enumerate(content):
            if isinstance(part, schemas.TextPart):
                text.append(part.text)
            else:
                parts += [{"type": "text", "text": "".join(text)}, {"type": "image"}]
                text = []
                urls.append((f"{where}[{place}].image_url.url", part.image_url.url))
        parts.append({"type": "text", "text": "".join(text)})
        role = "system" if message.role == "developer" else message.role
        turns.append({"role": role, "content": parts})
    if turns[-1]["role"] != "user":
        raise bad_request(
            f"the last message has the role {messages[-1].role!r}; end with a user message",
            f"messages[{len(messages) - 1}].role",
        )
    return turns, urls
