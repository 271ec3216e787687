"""A language model behind an OpenAI-compatible endpoint as a judge.

How the judge answers is chosen once, by a self-test, before anything is judged: a JSON schema
where the endpoint enforces one, else a JSON object, else lines of plain text. It never changes
within a run, and it is part of the judge's id.

The id names what can change a verdict: the model, the protocol with its version, the form of the
answer, and a digest of prompt, schema, parser and sampling. The address is left out, since the
same model on another port must not be paid for again; every verdict keeps the name under which
the endpoint says that it answered.

A judge fills in a few fields, each with one of a few words. Reading is strict: a field that is
missing, said twice in two ways, or filled with another word leaves the answer unparsed. There is
no guess and no search for words in free text.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mis_jax.evals.async_map import Groups, Streaming
from mis_jax.evals.chat_client import ChatClient, Reply
from mis_jax.evals.images import image_part
from mis_jax.evals.judges.prompts import (
    MODES,
    PROTOCOLS,
    SYSTEM,
    Field,
    Mode,
    Protocol,
    images_of,
    instruction,
    material,
    protocols_of,
)
from mis_jax.evals.types import Benchmark, Judge, Sample, Verdict
from mis_jax.parsing import parse_json
from mis_jax.storage.hashing import digest

Pair = tuple[Sample, str]

_LIMITS: dict[str, Any] = {"temperature": 0, "max_tokens": 1024}  # room for a model that thinks
_FORM_REFUSED = (400, 415, 422, 501)


@dataclass(frozen=True)
class _Form:
    """A protocol, and how this endpoint is asked by it."""

    protocol: Protocol
    mode: Mode
    limits: dict[str, Any]

    @property
    def name(self) -> str:
        rest = [
            self.protocol.prompt_digest(self.mode), schema(self.protocol.fields), PARSER,
            self.limits,
        ]  # fmt: skip
        protocol = f"{self.protocol.name}-{self.protocol.version}"
        return f"{protocol}:{self.mode}:{digest(rest)[:8]}"


def http_judges(client: ChatClient) -> Callable[[Benchmark, Sequence[Sample]], Judge]:
    """A judge for each benchmark's protocol; the self-test of a protocol is made once.

    ValueError for a benchmark without a protocol, and for an endpoint that cannot be used.
    """
    forms: dict[tuple[str, int], _Form] = {}

    def judge_of(benchmark: Benchmark, samples: Sequence[Sample]) -> Judge:
        images: dict[str, int] = {}
        for sample in samples:
            for protocol in protocols_of(benchmark, sample):
                count = len(images_of(protocol, sample))
                images[protocol.name] = max(count, images.get(protocol.name, 0))
        for key in images.items():
            if key not in forms:
                forms[key] = self_test(client, PROTOCOLS[key[0]], key[1])
        return _judge(client, benchmark, {key[0]: forms[key] for key in sorted(images.items())})

    return judge_of


def self_test(client: ChatClient, protocol: Protocol, images: int) -> _Form:
    """The form of answer that the endpoint keeps to, and the sampling fields that it takes.

    Asks about a harmless answer to a harmless question, with `images` blank images.
    """
    meta = dict.fromkeys(protocol.facts, "blue")
    limits, problem = dict(_LIMITS), ""
    blank = Image.new("RGB", (64, 64), "white")
    question = {"role": "user", "content": "What colour is the sky on a clear day?"}
    sample = Sample("self-test", [question], [], meta)
    for mode in MODES:
        form = _Form(protocol, mode, limits)
        reply = _tried(client, form, (sample, "The sky is blue."), [blank] * images)
        if reply.state == "error" and (reply.status not in _FORM_REFUSED or mode == "text"):
            raise ValueError(f"{client.explained(reply)} (at the self-test of the judge)")
        verdict = _verdict(form, reply)
        if verdict.state == "ok":
            return form
        if verdict.state == "refused":
            break
        problem = f"{verdict.detail}; it said {reply.text[:120]!r}"
    reason = problem or f"it declines to judge: {(reply.text or reply.detail)[:120]!r}"
    raise ValueError(
        f"{client.base_url}: {client.model!r} fails the self-test as a judge for protocol "
        f"{protocol.name!r} ({reason}); choose another model with --judge-model"
    )


def _tried(client: ChatClient, form: _Form, pair: Pair, images: Sequence[Image.Image]) -> Reply:
    """The reply in a form, after dropping what the model does not take from its `limits`."""
    limits = form.limits
    while True:
        reply = client.one(_request(form, pair, images))
        refused = reply.parameter if reply.status == 400 else None
        if refused == "max_tokens" and refused in limits:
            limits["max_completion_tokens"] = limits.pop("max_tokens")
        elif refused == "temperature" and refused in limits:
            del limits["temperature"]
        else:
            return reply


def _judge(client: ChatClient, benchmark: Benchmark, forms: dict[str, _Form]) -> Judge:
    def request(call: tuple[Pair, _Form]) -> dict[str, Any]:
        pair, form = call
        return _request(form, pair, images_of(form.protocol, pair[0]))

    def stream(pairs: Sequence[Pair]) -> Groups[Verdict]:
        verdicts: list[dict[str, Verdict]] = [{} for _ in pairs]
        calls, origins = [], []
        for place, (sample, answer) in enumerate(pairs):
            for protocol in protocols_of(benchmark, sample):
                if _needs_call(protocol, answer):
                    calls.append(((sample, answer), forms[protocol.name]))
                    origins.append((place, protocol.name))
                else:
                    verdicts[place][protocol.name] = Verdict("ok", dict(protocol.empty or {}))
        waiting = Counter(place for place, _ in origins)
        if settled := [(n, _joined(found)) for n, found in enumerate(verdicts) if not waiting[n]]:
            yield settled
        for group in client.many(calls, request):
            complete = []
            for number, reply in group:
                place, name = origins[number]
                verdicts[place][name] = _verdict(forms[name], reply)
                waiting[place] -= 1
                if not waiting[place]:
                    complete.append((place, _joined(verdicts[place])))
            if complete:
                yield complete

    names = "+".join(form.name for form in forms.values())
    return Judge(f"http:{client.model}:{names}", Streaming(stream))


def _request(form: _Form, pair: Pair, images: Sequence[Path | Image.Image]) -> dict[str, Any]:
    (sample, answer), protocol = pair, form.protocol
    parts = [image_part(image) for image in images]
    text = (
        f"{protocol.task}\n\n{instruction(form.mode, protocol.fields)}\n\n"
        f"{material(protocol, sample, answer)}"
    )
    # As plain text where nothing else is sent: not every server knows parts.
    content: Any = [*parts, {"type": "text", "text": text}] if parts else text
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]
    return {
        "messages": messages,
        **form.limits,
        **response_format(form.mode, f"{protocol.name}_verdict", protocol.fields),
    }


def _verdict(form: _Form, reply: Reply) -> Verdict:
    """The state of a reply as a verdict. Nothing but a reply that reads well has labels."""
    paid: dict[str, Any] = {
        "raw": reply.text or None,
        "usage": reply.usage or None,
        "served_model": reply.served_model or None,
    }
    if reply.state == "error":
        return Verdict("error", detail=reply.detail)
    if reply.state == "refused":
        return Verdict("refused", detail=reply.detail or "declined by the endpoint", **paid)
    labels, problem = read(form.mode, form.protocol.fields, reply.text)
    if labels is not None:
        return Verdict("ok", labels, **paid)
    if declines(reply.text):
        return Verdict("refused", detail="the judge's words are a refusal", **paid)
    if reply.finish_reason == "length":
        problem = f"cut off at its longest: {problem}"
    return Verdict("unparsed", detail=problem, **paid)


def _needs_call(protocol: Protocol, answer: str) -> bool:
    return protocol.empty is None or bool(answer.strip())


_WORST_FIRST = ("error", "unparsed", "refused")


def _joined(verdicts: Mapping[str, Verdict]) -> Verdict:
    """One verdict of the verdicts by several protocols: as good as the worst of them."""
    if len(verdicts) == 1:
        return next(iter(verdicts.values()))
    each = list(verdicts.values())
    failed = [verdict for state in _WORST_FIRST for verdict in each if verdict.state == state]
    usage = Counter[str]()
    for verdict in each:
        usage.update(verdict.usage or {})
    return Verdict(
        failed[0].state if failed else "ok",
        {} if failed else {k: v for verdict in each for k, v in verdict.labels.items()},
        detail=failed[0].detail if failed else None,
        raw="\n\n".join(verdict.raw for verdict in each if verdict.raw) or None,
        usage=dict(usage) or None,
        served_model=next((v.served_model for v in each if v.served_model), None),
    )


def prompt_size(pairs: Sequence[Pair], benchmark: Benchmark) -> tuple[int, int, int]:
    """How many calls there are, roughly their tokens at four characters each, and their images."""
    calls = characters = images = 0
    for sample, answer in pairs:
        for protocol in protocols_of(benchmark, sample):
            if _needs_call(protocol, answer):
                request = instruction("json_schema", protocol.fields) + protocol.task + SYSTEM
                calls += 1
                characters += len(request) + len(material(protocol, sample, answer))
                images += len(images_of(protocol, sample))
    return calls, characters // 4, images


PARSER = "replies-1"
"""Name of this way of reading; raise the number when it reads anything differently."""


def schema(fields: Sequence[Field]) -> dict[str, Any]:
    """The JSON schema of an answer, in the strict form that OpenAI asks for."""
    return {
        "type": "object",
        "properties": {
            field.name: {"type": "string", "enum": list(field.words)} for field in fields
        },
        "required": [field.name for field in fields],
        "additionalProperties": False,
    }


def response_format(mode: Mode, name: str, fields: Sequence[Field]) -> dict[str, Any]:
    """What a request says about the form of its answer; nothing where it is plain text."""
    if mode == "text":
        return {}
    if mode == "json_object":
        return {"response_format": {"type": "json_object"}}
    described = {"name": name, "strict": True, "schema": schema(fields)}
    return {"response_format": {"type": "json_schema", "json_schema": described}}


def read(mode: Mode, fields: Sequence[Field], text: str) -> tuple[dict[str, Any] | None, str]:
    """The labels in a judge's answer, or None; and what is wrong with it."""
    reply = text.rpartition("</think>")[2].strip()
    if not reply:
        return None, "the judge said nothing"
    reply = _without_fence(reply)
    if mode == "text" and not reply.startswith("{"):
        answers, problem = _lines(fields, reply)
    else:
        answers, problem = _object(reply)
    if problem:
        return None, problem
    labels: dict[str, Any] = {}
    if others := answers.keys() - {field.name for field in fields}:
        return None, f"{sorted(others)[0]!r:.80} was not asked for"
    for field in fields:
        if field.name not in answers:
            return None, f"{field.name!r} is missing"
        word = answers[field.name]
        if not isinstance(word, str) or word not in field.words:
            return None, f"{field.name!r} is {word!r:.80}, none of {', '.join(field.words)}"
        labels |= field.words[word][1]
    return labels, ""


def _without_fence(reply: str) -> str:
    """What stands between ``` or ```json on a line of its own and ``` at the end."""
    if len(reply) < 6 or not (reply.startswith("```") and reply.endswith("```")):
        return reply
    mark, line_end, body = reply[3:-3].partition("\n")
    return body.strip() if line_end and mark.strip() in ("", "json") else reply


def _object(reply: str) -> tuple[dict[str, Any], str]:
    try:
        value = parse_json(reply)
    except ValueError as error:
        return {}, f"it is no JSON ({error})"
    return (value, "") if isinstance(value, dict) else ({}, "it is no JSON object")


def _lines(fields: Sequence[Field], reply: str) -> tuple[dict[str, Any], str]:
    """`name: word` lines; marks around them do not count, nor does the case of a word.

    Colon and word may stand on the lines below. No pattern is searched for, as a reply may be of
    any length.
    """
    answers: dict[str, str] = {}
    lines = [line.strip() for line in reply.split("\n") if line.strip()]
    for field in fields:
        words = {word.lower(): word for word in field.words}
        name = field.name.lower()
        for place, line in enumerate(lines):
            begin = line.lstrip(_MARKS + ">-")
            if not begin.lower().startswith(name):
                continue
            following = iter(lines[place + 1 : place + _MOST_LINES])
            rest = begin[len(name) :].lstrip(_MARKS)
            while not rest and (after := next(following, "")):
                rest = after.lstrip(_MARKS)
            if not rest.startswith((":", "=")) or not (
                value := rest[1:].strip() or next(following, "")
            ):
                continue
            word = words.get(value.strip("*_`\"'. ").lower(), value)
            if answers.setdefault(field.name, word) != word:
                return {}, f"{field.name!r} is said twice: {answers[field.name]!r} and {word!r:.80}"
    return answers, ""


_MARKS = "*_` \t"  # around a name
_MOST_LINES = 8  # from a name to its word
_DECLINED = re.compile(
    r"(?:i(?:'|’)?m sorry|i am sorry|sorry|i apologi[sz]e)\b"
    r"|(?:(?:unfortunately|no),? )?i(?: can(?:'|’)?t| cannot| can not| won(?:'|’)?t| will not"
    r"|(?:'|’)m (?:not able|unable)| am (?:not able|unable)| must decline)\b",
    re.I,
)


def declines(text: str) -> bool:
    """Whether an answer that could not be read is the judge's own refusal to judge.

    It says nothing about the answer that was to be judged, and yields no label.
    """
    return _DECLINED.match(text.rpartition("</think>")[2].strip()) is not None
