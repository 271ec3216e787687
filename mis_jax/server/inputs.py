"""A request's body -> what the engine is asked. Runs in threads, never on the event loop.

Images are data URIs, or files below the one folder that the server allows. Nothing is ever fetched:
a server that opens addresses for its clients opens its own network to them.
"""

import base64
import binascii
import io
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from PIL import Image

from mis_jax.data.collate import Example
from mis_jax.data.images import MAX_PIXELS, image_size, open_image
from mis_jax.data.processor import Processor
from mis_jax.inference.requests import Request
from mis_jax.inference.sampling import Sampling
from mis_jax.server import protocol
from mis_jax.server.access import Settings
from mis_jax.server.protocol import ApiError, bad_request

NamedUrl = tuple[str, str]  # the field it stands in, and its value
Source = Path | io.BytesIO

_GREEDY_BELOW = 1e-4  # a temperature that float32 arithmetic would turn into noise
# Tokens of ordinary text are far shorter; refusing here keeps megabytes from the tokenizer, and
# JSON that is all brackets and commas from a parser that holds the whole process up.
_CHARACTERS_PER_TOKEN = 64
_MARKS_PER_TOKEN = 16
_FEW_MARKS = 500_000
_TOKENS_PER_TURN = 3  # its two control tokens and its role
_LONGEST_PATH = 4096  # of the system


class ClientGone(Exception):
    """The client closed its connection."""


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
        content = protocol.parse(body)
        self._check_length(protocol.count_parts(content))
        chat = protocol.checked(content)
        if chat.model != self._settings.model:
            raise ApiError(
                404,
                f"the model {chat.model!r} does not exist here; this server has "
                f"{self._settings.model!r}",
                param="model",
                code="model_not_found",
            )
        if chat.top_logprobs and not chat.logprobs:
            raise bad_request("top_logprobs needs logprobs to be true", "top_logprobs")
        if chat.stream_options and not chat.stream:
            raise bad_request("stream_options needs stream to be true", "stream_options")
        _check_last_turn(chat)
        example = self._example(chat, gone)
        request = Request(
            example,
            max_new_tokens=self._max_new_tokens(chat, len(example.input_ids)),
            sampling=self._sampling(chat),
            stop=_stop(chat),
            logprobs=(chat.top_logprobs or 0) if chat.logprobs else None,
            streamed=bool(chat.stream),
            continued=bool(chat.continue_final_message),
        )
        options = chat.stream_options
        return ParsedRequest(request, bool(chat.stream), bool(options and options.include_usage))

    def _example(self, chat: protocol.ChatRequest, gone: Callable[[], bool]) -> Example:
        self._check_text(chat)
        messages, urls, tiles = _conversation(chat.messages)
        processor, settings = self._processor, self._settings
        sources = sources_of(urls, settings.image_folder)
        per_tile = processor.config.tokens_per_tile
        self._check_length(len(sources) * per_tile)
        sizes = sizes_of(urls, sources, settings.max_pixels)
        budgets = [
            processor.budget(len(sizes), max_tiles_per_image=own or chat.max_dynamic_patch)
            for own in tiles
        ]
        counts = [processor.tile_count(*each) for each in zip(sizes, budgets, strict=True)]
        self._check_length(sum(counts) * per_tile)
        system = chat.system_prompt or "default"
        _stop_if(gone())
        images = decoded(urls, sources)
        try:
            rendered = processor.render(
                messages,
                counts,
                system="none" if system == "off" else system,
                continue_final_message=bool(chat.continue_final_message),
            )
            tiled = [processor.tiles(*each) for each in zip(images, budgets, strict=True)]
            return processor.joined("0", rendered, tiled)
        except ValueError as error:
            raise bad_request(str(error), "messages") from None

    def _check_text(self, chat: protocol.ChatRequest) -> None:
        """The one bound of everything that becomes tokens or is compared with them."""
        characters = sum(map(len, [chat.system_prompt or "", *_stop(chat)]))
        for message in chat.messages:
            content = message.content
            if isinstance(content, str):
                characters += len(content)
            elif content is not None:
                characters += sum(len(p.text) for p in content if isinstance(p, protocol.TextPart))
        turns = _TOKENS_PER_TURN * len(chat.messages)
        self._check_length(turns + characters // _CHARACTERS_PER_TOKEN)

    def _check_length(self, tokens: int) -> None:
        context = self._settings.context
        if tokens >= context:
            raise bad_request(
                # litellm knows an overflow by the first words, LangChain by "prompt is too long".
                f"This model's maximum context length is {context} tokens; the prompt is too long "
                f"with {tokens} or more: shorten it, or send fewer turns, fewer or smaller images",
                "messages",
                "context_length_exceeded",
            )

    def _max_new_tokens(self, chat: protocol.ChatRequest, prompt: int) -> int:
        self._check_length(prompt)
        context = self._settings.context
        room = context - prompt
        wanted = chat.max_completion_tokens or chat.max_tokens
        if wanted is None:
            return min(self._settings.max_new_tokens, room)
        if wanted > room:
            name = "max_completion_tokens" if chat.max_completion_tokens else "max_tokens"
            raise bad_request(
                f"{name} is {wanted}, but this model's maximum context length is {context} tokens: "
                f"beside the {prompt} of the prompt there is room for {room}; lower it",
                name,
                "context_length_exceeded",
            )
        return wanted

    def _sampling(self, chat: protocol.ChatRequest) -> Sampling:
        temperature = 0.0 if chat.top_p == 0 else chat.temperature or 0.0
        return Sampling(
            temperature=temperature if temperature >= _GREEDY_BELOW else 0.0,
            top_p=chat.top_p or 1.0,
            top_k=min(max(chat.top_k or 0, 0), self._processor.config.text.vocab_size),
            seed=secrets.randbits(32) if chat.seed is None else chat.seed % 2**32,
        )


def _stop_if(gone: bool) -> None:
    if gone:
        raise ClientGone


def _stop(chat: protocol.ChatRequest) -> tuple[str, ...]:
    if chat.stop is None:
        return ()
    return (chat.stop,) if isinstance(chat.stop, str) else tuple(chat.stop)


def _check_last_turn(chat: protocol.ChatRequest) -> None:
    role, where = chat.messages[-1].role, f"messages[{len(chat.messages) - 1}].role"
    if chat.continue_final_message and chat.add_generation_prompt:
        raise bad_request(
            "add_generation_prompt and continue_final_message exclude each other; set one to false",
            "add_generation_prompt",
        )
    if chat.add_generation_prompt is False and not chat.continue_final_message:
        raise bad_request(
            "add_generation_prompt is false; that needs continue_final_message to be true",
            "add_generation_prompt",
        )
    if chat.continue_final_message and role != "assistant":
        raise bad_request(
            f"the last message has the role {role!r}; continue_final_message needs an assistant's",
            where,
        )
    if not chat.continue_final_message and role != "user":
        raise bad_request(
            f"the last message has the role {role!r}; end with a user message, or set "
            "continue_final_message to true to have an assistant's continued",
            where,
        )


def _conversation(
    messages: list[protocol.Message],
) -> tuple[list[dict[str, Any]], list[NamedUrl], list[int | None]]:
    """The processor's messages, the images in their order, and the tiles that each may have.

    All text goes in as parts, in which nothing is an image marker, and parts of text that follow
    one another as one: the template joins them one by one, which is quadratic. System messages at
    the beginning are joined, with an empty line between.
    """
    turns: list[dict[str, Any]] = []
    urls: list[NamedUrl] = []
    tiles: list[int | None] = []
    for number, message in enumerate(messages):
        role = "system" if message.role == "developer" else message.role
        if role == "system" and turns and turns[-1]["role"] != "system":
            field = f"messages[{number}].role"
            raise bad_request(
                f"{field} is {message.role!r}; system messages come before all others", field
            )
        parts: list[dict[str, str]] = []
        text: list[str] = []
        where = f"messages[{number}].content"
        content = message.content or []
        if isinstance(content, str):
            content = [protocol.TextPart(type="text", text=content)]
        for place, part in enumerate(content):
            if isinstance(part, protocol.TextPart):
                text.append(part.text)
            elif role != "user":
                raise bad_request(
                    f"{where}[{place}] is an image, but the role is {message.role!r}; only user "
                    "messages may hold images: move it to one",
                    f"{where}[{place}]",
                )
            else:
                parts += [{"type": "text", "text": "".join(text)}, {"type": "image"}]
                text = []
                urls.append((f"{where}[{place}].image_url.url", part.image_url.url))
                tiles.append(part.image_url.max_dynamic_patch)
        parts.append({"type": "text", "text": "".join(text)})
        turns.append({"role": role, "content": parts})
    first = list(takewhile(lambda turn: turn["role"] == "system", turns))
    if len(first) > 1:
        joined = "\n\n".join(turn["content"][0]["text"] for turn in first)  # the only part
        turns[: len(first)] = [{"role": "system", "content": [{"type": "text", "text": joined}]}]
    return turns, urls, tiles


# Images


def sources_of(urls: Sequence[NamedUrl], folder: Path | None) -> list[Source]:
    """Where every image is read from; ApiError 400 for a URL that is not allowed."""
    return [_source(url, name, folder) for name, url in urls]


def sizes_of(
    urls: Sequence[NamedUrl], sources: Sequence[Source], max_pixels: int
) -> list[tuple[int, int]]:
    """Widths and heights, from the headers alone; ApiError 400 for no image or too many pixels."""
    sizes = []
    for (name, _), source in zip(urls, sources, strict=True):
        try:
            sizes.append(image_size(source, name=name, max_pixels=min(max_pixels, MAX_PIXELS)))
        except ValueError as error:
            raise bad_request(str(error), name) from None
        if isinstance(source, io.BytesIO):
            source.seek(0)
    total = sum(width * height for width, height in sizes)
    if total > max_pixels:
        raise bad_request(
            f"the images have {total} pixels together; this server takes {max_pixels} in a "
            "request: scale them down",
            "messages",
        )
    return sizes


def decoded(urls: Sequence[NamedUrl], sources: Sequence[Source]) -> list[Image.Image]:
    """The images as RGB; ApiError 400 for one that is damaged."""
    images = []
    for (name, _), source in zip(urls, sources, strict=True):
        try:
            images.append(open_image(source, name=name))
        except ValueError as error:
            raise bad_request(str(error), name) from None
    return images


def _source(url: str, name: str, folder: Path | None) -> Source:
    scheme = url[: url.find(":")].lower() if ":" in url[:16] else ""
    if scheme == "data":
        return _data(url, name)
    if scheme in ("http", "https", "ftp"):
        raise bad_request(
            f"{name}: this server fetches nothing; send the image as a data URI "
            "(data:image/png;base64,...)",
            name,
        )
    return _file(url, name, folder)


def _data(url: str, name: str) -> io.BytesIO:
    head, comma, content = url.partition(",")
    kind, *options = head[len("data:") :].lower().split(";")
    if not comma or not kind.startswith("image/") or "base64" not in options:
        shown = head[:40]
        raise bad_request(f"{name} must start with 'data:image/...;base64,', not {shown!r}", name)
    for space in " \t\r\n":  # line breaks, as the command `base64` writes them
        content = content.replace(space, "")
    content += "=" * (-len(content) % 4)  # padding, which some leave out
    try:
        return io.BytesIO(base64.b64decode(content, validate=True))
    except (binascii.Error, ValueError) as error:
        raise bad_request(f"{name} is no valid base64 ({error})", name) from None


def _file(url: str, name: str, folder: Path | None) -> Path:
    if folder is None:
        raise bad_request(
            f"{name}: this server opens no files; send the image as a data URI, or start the "
            "server with --allow-image-folder",
            name,
        )
    # One message whatever lies outside the folder: nobody learns which files there are.
    outside = bad_request(f"{name} names no file inside the folder that this server allows", name)
    path = url
    if len(url) > _LONGEST_PATH:
        raise outside
    if url.lower().startswith("file:"):
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost"):
            raise outside
        path = unquote(parts.path)
    try:
        root = folder.resolve(strict=True)
        file = (root / path).resolve(strict=True)  # links are followed before the comparison
    except (OSError, ValueError, RuntimeError):  # absent, too long, a null byte, a loop of links
        raise outside from None
    if not (file.is_relative_to(root) and file.is_file()):
        raise outside
    return file
