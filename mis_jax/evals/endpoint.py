"""Any OpenAI-compatible endpoint as the model under test.

Images are sent as data URIs where the prompt has its `<image>` markers. Decoding is greedy.
Two settings of a benchmark have no place in the chat API: tiles for each image, and whether the
checkpoint's own system turn is left out. Our server takes them as `max_dynamic_patch` and
`system_prompt`; another one answers with settings of its own, which is a condition of the run.
Templates of InternVL, ours
among them, write a line break behind every image of the chat API, so there the prompt's own is
left out.

A reply without an answer in it is an error: judged, it would count as safe. Reasoning models send
one when the token limit ends them in their reasoning, or when their answer is all in a field of
its own, which `includes_reasoning` puts before the answer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mis_jax.data.chat_template import IMAGE_MARKER, insert_image_markers
from mis_jax.evals.async_map import Groups, Streaming
from mis_jax.evals.chat_client import ChatClient, Reply
from mis_jax.evals.images import image_part, shown_images
from mis_jax.evals.run_dir import ENDPOINT_SETTINGS, REASONING
from mis_jax.evals.types import EMPTY, Answer, Benchmark, Sample
from mis_jax.storage.hashing import digest

OWNER = "mis-jax"  # what our own server says in /v1/models


@dataclass(frozen=True)
class Endpoint:
    """An endpoint that was found to answer, and whether it takes InternVL's two settings."""

    client: ChatClient
    takes_settings: bool
    includes_reasoning: bool = False

    @property
    def fingerprint(self) -> str:
        """The identity of what answers, as far as it shows from outside."""
        return digest([self.client.base_url, self.client.model, self.takes_settings])

    @property
    def conditions(self) -> tuple[str, ...]:
        """Settings of its own, where it takes no others; reasoning as a part of its answers."""
        settings = () if self.takes_settings else (ENDPOINT_SETTINGS,)
        return (*settings, *((REASONING,) * self.includes_reasoning))


def open_endpoint(
    client: ChatClient, *, takes_settings: bool = False, includes_reasoning: bool = False
) -> Endpoint:
    """Look at `/v1/models`; ValueError for an address, a key or a model that is wrong."""
    owners = client.owners()
    if owners is not None and client.model not in owners:
        models = ", ".join(list(owners)[:8]) or "none"
        raise ValueError(
            f"{client.base_url} has no model {client.model!r} (it has {models}); see --model-name"
        )
    ours = owners is not None and owners[client.model] == OWNER
    return Endpoint(client, takes_settings or ours, includes_reasoning)


def endpoint_answers(endpoint: Endpoint, benchmark: Benchmark) -> Streaming[Sample, Answer]:
    """Greedy answers under the benchmark's protocol, each handed on when it comes."""

    def request(sample: Sample) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "messages": chat_messages(sample, breaks_lines=endpoint.takes_settings),
            "temperature": 0,
            "max_tokens": benchmark.max_new_tokens,
        }
        extra: dict[str, Any] = {}
        if endpoint.takes_settings:
            extra["system_prompt"] = benchmark.system
            if tiles := benchmark.tiles_for(sample):
                extra["max_dynamic_patch"] = tiles
        elif benchmark.system not in ("default", "none"):
            system = {"role": "system", "content": benchmark.system}
            fields["messages"] = [system, *fields["messages"]]
        return fields | {"extra_body": extra}

    def stream(samples: Sequence[Sample]) -> Groups[Answer]:
        for group in endpoint.client.many(samples, request):
            yield [(place, _answer(endpoint, benchmark, reply)) for place, reply in group]

    return Streaming(stream)


def _answer(endpoint: Endpoint, benchmark: Benchmark, reply: Reply) -> Answer:
    """A refusal in the model's own words is an answer; one without words is none."""
    if reply.state == "error" or not (reply.text or reply.state == "ok"):
        detail = reply.detail or "the endpoint declined the request and gave no text"
        return Answer("", finish_reason=reply.finish_reason or "error", state="error", error=detail)
    text = reply.text
    if endpoint.includes_reasoning and reply.reasoning:
        text = f"{reply.reasoning}\n\n{text}".rstrip()
    usage = [reply.usage.get(name, 0) for name in ("prompt_tokens", "completion_tokens")]
    if not text.strip() and (problem := _missing_answer(benchmark, reply)):
        return Answer("", *usage, finish_reason=EMPTY, state="error", error=problem)
    return Answer(text, *usage, finish_reason=reply.finish_reason or "stop")


def _missing_answer(benchmark: Benchmark, reply: Reply) -> str | None:
    """Why an empty text is no answer; None where it is one."""
    if reply.reasoning:
        return "the answer is empty and the reasoning is not; see --include-reasoning"
    if reply.finish_reason == "length":
        return "the answer is empty: the token limit ended it before its first word"
    return None if benchmark.takes_empty_answers else "the answer is empty"


def chat_messages(sample: Sample, *, breaks_lines: bool = False) -> list[dict[str, Any]]:
    """The conversation as the chat API has it; ValueError where markers and images differ.

    `breaks_lines` says that the server writes a line break behind every image.
    """
    images = iter(shown_images(sample))
    marked = insert_image_markers(sample.conversation, len(sample.images))
    return [
        {"role": message["role"], "content": _content(message, images, breaks_lines)}
        for message in marked
    ]


def _content(
    message: Any, images: Iterator[Path | Image.Image], breaks_lines: bool
) -> str | list[dict[str, Any]]:
    """Text, or parts where there are images."""
    content = message["content"]
    if not isinstance(content, str):
        first, *others = _stretches(content)
    elif message["role"] == "user":
        first, *others = content.split(IMAGE_MARKER)
    else:
        return content
    if not others:
        return first
    parts: list[dict[str, Any]] = [{"type": "text", "text": first}]
    for text in others:
        parts.append(image_part(next(images)))
        parts.append({"type": "text", "text": text.removeprefix("\n") if breaks_lines else text})
    if not text.strip():  # some servers refuse a part of white space
        parts.pop()
    return [part for part in parts if part.get("text") != ""]


def _stretches(parts: list[dict[str, Any]]) -> list[str]:
    """The text between images; behind each is the line break that our processor writes."""
    stretches = [""]
    for part in parts:
        if part["type"] == "image":
            stretches.append("\n")
        else:
            stretches[-1] += part["text"]
    return stretches
